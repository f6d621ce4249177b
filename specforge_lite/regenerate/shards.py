"""Where answers go: append-only parts while a shard is open, sorted final files once it is complete.

shard_0-100.jsonl.part   rows 0..99 answered so far, one line each, in the order they arrived
error_0-100.jsonl.part   rows 0..99 given up, with reasons
        every row of the shard is in one of the two  ->  both sorted by row, error file renamed, then shard file renamed

The final shard file is the mark that a shard is complete, so it comes last. A line that a crash cut off is removed on
resume and its row asked again; so every row ends in exactly one of the two files.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import atomic_file, lock_directory, remove_leftovers, write_json
from specforge_lite.core.log import warn

MANIFEST = "regeneration.json"
PART = ".part"
MAX_OPEN_FILES = 64
_ROW_PREFIX = re.compile(rb'\{"row": ([0-9]+),')  # how `_append` begins a line; cheaper than parsing all of it


@dataclass
class OpenShard:
    """A shard in progress: which of its rows are done, and whether the input has given all of them."""

    start: int
    done: set[int] = field(default_factory=set)
    num_rows: int = 0  # rows of this shard the input has given so far
    closed: bool = False  # the input has no more rows for it


class ShardStore:
    """The output directory of a run, held by a lock. Raises ConfigError when another run holds it or made it
    with other settings."""

    def __init__(self, directory: Path, num_per_shard: int, settings: dict[str, Any], resume: bool) -> None:
        self.directory, self.num_per_shard = directory, num_per_shard
        self._open: dict[int, OpenShard] = {}
        self._handles: dict[Path, int] = {}
        self._unsynced: set[Path] = set()
        self.reasons: Counter[str] = Counter()
        self.num_answered = self.num_errors = self.num_kept = 0
        self._lock = lock_directory(directory, "output_dir")
        try:
            remove_leftovers(directory, held=True)
            check_manifest(directory, settings, resume)
            self._remove_finished_parts()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> ShardStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
        self._lock.close()

    def shard_path(self, start: int) -> Path:
        """Final path of the answers of the shard that begins at row `start`."""
        return self.directory / f"shard_{start}-{start + self.num_per_shard}.jsonl"

    def error_path(self, start: int) -> Path:
        """Final path of the error rows of that shard."""
        return self.directory / f"error_{start}-{start + self.num_per_shard}.jsonl"

    def is_needed(self, number: int) -> bool:
        """True if row `number` has no answer and no error row yet. Rows must be asked for in ascending order, each
        once: this is also how the store learns what a shard holds."""
        start = number - number % self.num_per_shard
        if self.shard_path(start).exists() and start not in self._open:
            self._close_before(start)
            return False
        if start not in self._open:
            self._close_before(start)
            self._open[start] = self._load(start)
        shard = self._open[start]
        shard.num_rows = number - start + 1
        return number not in shard.done

    def end_of_input(self) -> None:
        """No more rows come: shards that wait for nothing else are completed."""
        self._close_before(None)

    def add_answer(self, number: int, row: dict[str, Any]) -> None:
        """Append an answered row; it is in the file when this returns."""
        self._add(number, row, is_error=False)
        self.num_answered += 1

    def add_error(self, number: int, row: dict[str, Any]) -> None:
        """Append a row that was given up; `row["reason"]` is counted."""
        self._add(number, row, is_error=True)
        self.num_errors += 1
        self.reasons[row["reason"]] += 1

    def sync(self) -> None:
        """Force what was appended to the disk."""
        sync_handles(self.unsynced_handles())

    def unsynced_handles(self) -> list[int]:
        """Duplicates of the handles written to since the last call, for `sync_handles` in another thread."""
        handles = [os.dup(self._handles[path]) for path in self._unsynced]
        self._unsynced.clear()
        return handles

    def retry_errors(self) -> int:
        """Reopen the shards that have error rows and drop these; return how many rows will be asked again."""
        count = 0
        for final in sorted(self.directory.glob("error_*.jsonl")) + sorted(self.directory.glob(f"error_*.jsonl{PART}")):
            shard = final.with_name(final.name.replace("error_", "shard_", 1).removesuffix(PART))
            if shard.exists():
                os.replace(shard, shard.with_name(shard.name + PART))
            count += sum(1 for _ in read_lines(final))
            final.unlink()
        return count

    def complete_shards(self) -> list[Path]:
        """Final shard files, in the order of their rows."""
        return sorted(self.directory.glob("shard_*.jsonl"), key=lambda p: int(p.stem.split("_")[1].split("-")[0]))

    def write_merged(self, path: Path) -> int:
        """Copy all answered rows, in the order of the input, to one file; return their number."""
        count = 0
        with atomic_file(path, "wb") as merged:
            for shard in self.complete_shards():
                with open(shard, "rb") as file:
                    for line in file:
                        merged.write(line)
                        count += 1
        return count

    def _add(self, number: int, row: dict[str, Any], is_error: bool) -> None:
        shard = self._open[number - number % self.num_per_shard]
        if number in shard.done:
            raise AssertionError(f"row {number} was written twice")
        final = self.error_path(shard.start) if is_error else self.shard_path(shard.start)
        self._append(final.with_name(final.name + PART), {"row": number, **row})
        shard.done.add(number)
        self._finish_if_complete(shard)

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if path not in self._handles:
            while len(self._handles) >= MAX_OPEN_FILES:
                self._close_handle(next(iter(self._handles)))
            self._handles[path] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        line = encode_row(row)
        if (written := os.write(self._handles[path], line)) != len(line):
            raise DataError(f"{path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        self._unsynced.add(path)

    def _remove_finished_parts(self) -> None:
        """A crash between naming a shard's final file and deleting what it was made from."""
        for shard in self.complete_shards():
            for final in (shard, shard.with_name(shard.name.replace("shard_", "error_", 1))):
                final.with_name(final.name + PART).unlink(missing_ok=True)

    def _close_handle(self, path: Path) -> None:
        handle = self._handles.pop(path, None)
        if handle is not None:
            os.fsync(handle)
            os.close(handle)
        self._unsynced.discard(path)

    def _close_before(self, start: int | None) -> None:
        for shard in [s for s in self._open.values() if start is None or s.start < start]:
            shard.closed = True
            self._finish_if_complete(shard)

    def _finish_if_complete(self, shard: OpenShard) -> None:
        full = shard.closed or shard.num_rows == self.num_per_shard
        if not full or len(shard.done) < shard.num_rows:
            return
        del self._open[shard.start]
        for final in (self.error_path(shard.start), self.shard_path(shard.start)):  # the shard file is the mark
            part = final.with_name(final.name + PART)
            self._close_handle(part)
            if part.exists() or final == self.shard_path(shard.start):
                write_sorted(part, final)
                part.unlink(missing_ok=True)

    def _load(self, start: int) -> OpenShard:
        """A shard that was begun: its parts, repaired. A final error file without its shard file is a part again."""
        shard = OpenShard(start)
        error, error_part = self.error_path(start), self.error_path(start).with_name(self.error_path(start).name + PART)
        if error.exists():
            os.replace(error, error_part)
        for part in (self.shard_path(start).with_name(self.shard_path(start).name + PART), error_part):
            if part.exists():
                numbers = repair(part, shard.done, start, start + self.num_per_shard)
                shard.done |= numbers
                self.num_kept += len(numbers)
        return shard


def check_manifest(directory: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write regeneration.json in a new directory; in a used one compare it, and raise ConfigError where they differ."""
    path = directory / MANIFEST
    used = [p.name for p in directory.glob("shard_*.jsonl*")] + [p.name for p in directory.glob("error_*.jsonl*")]
    if path.exists() and used:
        if not resume:
            raise ConfigError(f"output_dir {directory}: holds {used[0]} of an earlier run, and --resume is off")
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ConfigError(f"{path}: not a JSON object; use another --output-dir") from None
        differing = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
        if differing:
            changes = "; ".join(f"{k} was {before.get(k)!r}, now {settings.get(k)!r}" for k in differing)
            raise ConfigError(f"output_dir {directory}: made with other settings ({changes}); use another --output-dir")
    elif used:
        raise ConfigError(f"output_dir {directory}: holds {used[0]} but no {MANIFEST}; use another --output-dir")
    write_json(path, settings)


def sync_handles(handles: list[int]) -> None:
    """Force files to the disk and close these handles of them."""
    try:
        for handle in handles:
            os.fsync(handle)
    finally:
        for handle in handles:
            os.close(handle)


def encode_row(row: dict[str, Any]) -> bytes:
    """One line of jsonl."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(row number, line) of every complete, valid line."""
    with open(path, "rb") as file:
        for line in file:
            number = _row_number(line)
            if number is not None:
                yield number, line


def repair(path: Path, done: set[int], start: int, end: int) -> set[int]:
    """Cut `path` down to its valid lines of rows start..end-1 that are not `done`; return their row numbers."""
    numbers: set[int] = set()
    bad = 0
    with open(path, "rb") as file:
        for line in file:
            number = _row_number(line)
            if number is None or not start <= number < end or number in done or number in numbers:
                bad += 1
            else:
                numbers.add(number)
    if bad:
        warn(f"{path}: {bad} line(s) were cut off or damaged; their rows are asked again")
        kept: set[int] = set()
        with atomic_file(path, "wb") as file:
            for number, line in read_lines(path):
                if number in numbers and number not in kept:
                    kept.add(number)
                    file.write(line)
    return numbers


def _row_number(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    with suppress(ValueError, RecursionError):
        value = json.loads(line)
        number = value.get("row") if isinstance(value, dict) else None
        return number if isinstance(number, int) and not isinstance(number, bool) else None
    return None


def write_sorted(part: Path, final: Path) -> None:
    """Write the lines of `part` (which may be missing) to `final` by row number; memory is one index, not the rows."""
    index: list[tuple[int, int, int]] = []
    if part.exists():
        with open(part, "rb") as file:
            offset = 0
            for line in file:
                match = _ROW_PREFIX.match(line)
                assert match is not None, f"{part}: a damaged line at byte {offset}"
                index.append((int(match[1]), offset, len(line)))
                offset += len(line)
    index.sort()
    with atomic_file(final, "wb") as output:
        if index:
            with open(part, "rb") as file:
                for _, offset, size in index:
                    file.seek(offset)
                    output.write(file.read(size))
