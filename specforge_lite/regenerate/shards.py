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
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import atomic_file, lock_directory, remove_leftovers, sync_to_disk, write_json
from specforge_lite.core.log import warn

MANIFEST = "regeneration.json"
PART = ".part"
LineIndex = dict[int, tuple[int, int]]  # row number -> (offset, size) of its line


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
        self._unsynced: set[Path] = set()
        self.reasons: Counter[str] = Counter()
        self.num_answered = self.num_errors = 0
        self._lock = lock_directory(directory, "output_dir")
        try:
            remove_leftovers(directory, held=True)
            check_manifest(directory, settings, resume)
            for shard in self.complete_files():  # a crash between the final name and the end of its part
                for final in (shard, shard.with_name(shard.name.replace("shard_", "error_", 1))):
                    _part(final).unlink(missing_ok=True)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> ShardStore:
        return self

    def __exit__(self, *_: object) -> None:
        sync_files(self.take_unsynced())
        self._lock.close()

    def _path(self, kind: str, start: int) -> Path:
        return self.directory / f"{kind}_{start}-{start + self.num_per_shard}.jsonl"

    def is_needed(self, number: int) -> bool:
        """True if row `number` has no answer and no error row yet. Rows must be asked for in ascending order, each
        once: this is also how the store learns what a shard holds."""
        start = number - number % self.num_per_shard
        if start not in self._open:
            self._close_before(start)
            if self._path("shard", start).exists():
                return False
            self._open[start] = self._load(start)
        shard = self._open[start]
        shard.num_rows = number - start + 1
        return number not in shard.done

    def end_of_input(self) -> None:
        """No more rows come: shards that wait for nothing else are completed."""
        self._close_before(None)

    def add_answer(self, number: int, row: dict[str, Any]) -> None:
        """Append an answered row; it is in the file when this returns."""
        self._add("shard", number, row)
        self.num_answered += 1

    def add_error(self, number: int, row: dict[str, Any]) -> None:
        """Append a row that was given up; `row["reason"]` is counted."""
        self._add("error", number, row)
        self.num_errors += 1
        self.reasons[row["reason"]] += 1

    def take_unsynced(self) -> set[Path]:
        """Files appended to since the last call, for `sync_files` (in another thread, perhaps)."""
        taken, self._unsynced = self._unsynced, set()
        return taken

    def retry_errors(self) -> int:
        """Reopen the shards that have error rows and drop these; return how many rows will be asked again."""
        count = 0
        for path in [*self.directory.glob("error_*.jsonl"), *self.directory.glob(f"error_*.jsonl{PART}")]:
            shard = path.with_name(path.name.replace("error_", "shard_", 1).removesuffix(PART))
            if shard.exists():
                os.replace(shard, _part(shard))
            count += len(index_lines(path)[0])
            path.unlink()
        return count

    def complete_files(self, kind: str = "shard") -> list[Path]:
        """Final files of a kind, in the order of their rows."""
        return sorted(self.directory.glob(f"{kind}_*.jsonl"), key=lambda p: int(p.stem.split("_")[1].split("-")[0]))

    def write_merged(self, path: Path, kind: str = "shard") -> int:
        """Copy all answered rows (or those of kind `error`), in the order of the input, to one file; return their
        number."""
        count = 0
        with atomic_file(path, "wb") as merged:
            for file in self.complete_files(kind):
                with open(file, "rb") as lines:
                    for line in lines:
                        merged.write(line)
                        count += 1
        return count

    def _add(self, kind: str, number: int, row: dict[str, Any]) -> None:
        shard = self._open[number - number % self.num_per_shard]
        if number in shard.done:
            raise AssertionError(f"row {number} was written twice")
        path = _part(self._path(kind, shard.start))
        line = json.dumps({"row": number, **row}, ensure_ascii=False).encode("utf-8") + b"\n"
        with open(path, "ab", buffering=0) as file:  # one write, so that a kill cuts at most this line
            if (written := file.write(line)) != len(line):
                raise DataError(f"{path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        self._unsynced.add(path)
        shard.done.add(number)
        self._finish_if_complete(shard)

    def _close_before(self, start: int | None) -> None:
        for shard in [s for s in self._open.values() if start is None or s.start < start]:
            shard.closed = True
            self._finish_if_complete(shard)

    def _finish_if_complete(self, shard: OpenShard) -> None:
        full = shard.closed or shard.num_rows == self.num_per_shard
        if not full or len(shard.done) < shard.num_rows:
            return
        del self._open[shard.start]
        for final in (self._path("error", shard.start), self._path("shard", shard.start)):  # the shard file is the mark
            part = _part(final)
            if part.exists() or final == self._path("shard", shard.start):
                index, _ = index_lines(part)
                copy_lines(part, final, [index[number] for number in sorted(index)])
                part.unlink(missing_ok=True)
                self._unsynced.discard(part)

    def _load(self, start: int) -> OpenShard:
        """A shard that was begun: its parts, repaired. A final error file without its shard file is a part again."""
        shard = OpenShard(start)
        error = self._path("error", start)
        if error.exists():
            os.replace(error, _part(error))
        for part in (_part(self._path("shard", start)), _part(error)):
            shard.done |= repair(part, shard.done, start, start + self.num_per_shard)
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


def sync_files(paths: Iterable[Path]) -> None:
    """Force files to the disk; those that have become final files meanwhile are there already."""
    for path in paths:
        with suppress(FileNotFoundError):
            sync_to_disk(path)


def index_lines(path: Path) -> tuple[LineIndex, int]:
    """({row: place of its first valid line}, number of other lines) of a file that may be missing."""
    index: LineIndex = {}
    num_bad = offset = 0
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            number = _row_number(line)
            if number is None or number in index:
                num_bad += 1
            else:
                index[number] = (offset, len(line))
            offset += len(line)
    return index, num_bad


def copy_lines(source: Path, destination: Path, places: Iterable[tuple[int, int]]) -> None:
    """Write lines of `source` to `destination`; memory is that of one line."""
    with atomic_file(destination, "wb") as output:
        if source.exists():
            with open(source, "rb") as file:
                for offset, size in places:
                    file.seek(offset)
                    output.write(file.read(size))


def repair(path: Path, done: set[int], start: int, end: int) -> set[int]:
    """Cut `path` down to its valid lines of rows start..end-1 that are not `done`; return their row numbers."""
    index, num_bad = index_lines(path)
    kept = {number: place for number, place in index.items() if start <= number < end and number not in done}
    if num_bad := num_bad + len(index) - len(kept):
        warn(f"{path}: {num_bad} line(s) were cut off or damaged; their rows are asked again")
        copy_lines(path, path, list(kept.values()))
    return set(kept)


def _row_number(line: bytes) -> int | None:
    with suppress(ValueError, RecursionError):
        value = json.loads(line) if line.endswith(b"\n") else None
        number = value.get("row") if isinstance(value, dict) else None
        return number if isinstance(number, int) and not isinstance(number, bool) else None
    return None


def _part(final: Path) -> Path:
    return final.with_name(final.name + PART)
