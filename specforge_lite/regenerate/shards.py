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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import (
    atomic_file,
    lock_directory,
    remove_leftovers,
    sync_to_disk,
    write_json,
)
from specforge_lite.core.log import info, warn

MANIFEST = "regeneration.json"
KINDS = ("error", "shard")  # in the order in which they get their final names
PART = ".part"


@dataclass
class OpenShard:
    """A shard in progress: rows of it that the input has given so far, and which of them are done."""

    num_rows: int = 0
    done: set[int] = field(default_factory=set)


class ShardStore:
    """The output directory of a run, held by a lock. Raises ConfigError when another run holds it or made it
    with other settings."""

    def __init__(self, directory: Path, num_per_shard: int, settings: dict[str, Any], resume: bool) -> None:
        self.directory, self.num_per_shard = directory, num_per_shard
        self._open: dict[int, OpenShard] = {}  # by the number of the first row
        self._input_ended = False
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
        self.sync()
        self._lock.close()

    def is_needed(self, number: int) -> bool:
        """True if row `number` has no answer and no error row yet. Rows must be asked for in ascending order, each
        once: this is also how the store learns what a shard holds."""
        start = number - number % self.num_per_shard
        shard = self._open.get(start)
        if shard is None:
            if self._path("shard", start).exists():
                return False
            shard = self._open[start] = OpenShard(done=self._recover(start))
        shard.num_rows += 1
        self._finish_if_complete(start)
        return number not in shard.done

    def end_of_input(self) -> None:
        """No more rows come: shards that wait for nothing else are completed."""
        self._input_ended = True
        for start in list(self._open):
            self._finish_if_complete(start)

    def add_answer(self, number: int, row: dict[str, Any]) -> None:
        """Append an answered row; it is in the file when this returns."""
        self._append("shard", number, row)

    def add_error(self, number: int, row: dict[str, Any]) -> None:
        self._append("error", number, row)

    def sync(self) -> None:
        """Force what was appended to the disk. May run in another thread: parts that became final files meanwhile are
        there already."""
        for part in [_part(self._path(kind, start)) for start in list(self._open) for kind in KINDS]:
            with suppress(FileNotFoundError):
                sync_to_disk(part)

    def retry_errors(self) -> int:
        """Reopen the shards that have error rows and drop these; return how many rows will be asked again."""
        count = 0
        for path in list(self.directory.glob("error_*.jsonl*")):
            shard = path.with_name(path.name.replace("error_", "shard_", 1).removesuffix(PART))
            if shard.exists():
                os.replace(shard, _part(shard))
            count += len(_index(path)[0])
            path.unlink()
        return count

    def complete_files(self, kind: str = "shard") -> list[Path]:
        """Final files of a kind, in the order of their rows."""
        return sorted(self.directory.glob(f"{kind}_*.jsonl"), key=lambda p: int(p.stem.split("_")[1].split("-")[0]))

    def write_merged(self, output_file: Path | None) -> None:
        """All answers as one file, if one is asked for, and all errors as error.jsonl, if there are any; in the order
        of the input."""
        errors = self.directory / "error.jsonl"
        if not self.complete_files("error"):
            errors.unlink(missing_ok=True)
        for kind, path, what in (("shard", output_file, "rows"), ("error", errors, "rows without an answer")):
            files, count = self.complete_files(kind), 0
            if path is None or (kind == "error" and not files):
                continue
            with atomic_file(path, "wb") as merged:
                for file in files:
                    with open(file, "rb") as lines:
                        for line in lines:
                            merged.write(line)
                            count += 1
            info(f"{count} {what} in {path}")

    def _path(self, kind: str, start: int) -> Path:
        return self.directory / f"{kind}_{start}-{start + self.num_per_shard}.jsonl"

    def _append(self, kind: str, number: int, row: dict[str, Any]) -> None:
        start = number - number % self.num_per_shard
        shard = self._open[start]
        if number in shard.done:
            raise AssertionError(f"row {number} was written twice")
        path = _part(self._path(kind, start))
        line = json.dumps({"row": number, **row}, ensure_ascii=False).encode("utf-8") + b"\n"
        with open(path, "ab", buffering=0) as file:  # one write, so that a kill cuts at most this line
            if (written := file.write(line)) != len(line):
                raise DataError(f"{path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        shard.done.add(number)
        self._finish_if_complete(start)

    def _finish_if_complete(self, start: int) -> None:
        shard = self._open[start]
        all_given = self._input_ended or shard.num_rows == self.num_per_shard
        if not all_given or len(shard.done) < shard.num_rows:
            return
        for kind in KINDS:
            final = self._path(kind, start)
            part = _part(final)
            if part.exists() or kind == "shard":
                _copy_lines(part, final, [place for _, place in sorted(_index(part)[0].items())])
                part.unlink(missing_ok=True)
        del self._open[start]

    def _recover(self, start: int) -> set[int]:
        """Rows of a shard that are done, its parts repaired. A final error file without its shard file is a part."""
        if (error := self._path("error", start)).exists():
            os.replace(error, _part(error))
        done: set[int] = set()
        for kind in reversed(KINDS):
            done |= repair(_part(self._path(kind, start)), done, start, start + self.num_per_shard)
        return done


def check_manifest(directory: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write regeneration.json in a new directory; in a used one compare it, and raise ConfigError where they differ."""
    path = directory / MANIFEST
    used = [p.name for kind in reversed(KINDS) for p in directory.glob(f"{kind}_*.jsonl*")]
    if used and not path.exists():
        raise ConfigError(f"output_dir {directory}: holds {used[0]} but no {MANIFEST}; use another --output-dir")
    if used and not resume:
        raise ConfigError(f"output_dir {directory}: holds {used[0]} of an earlier run, and --resume is off")
    if used:
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ConfigError(f"{path}: not a JSON object; use another --output-dir") from None
        differing = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
        if differing:
            changes = "; ".join(f"{k} was {before.get(k)!r}, now {settings.get(k)!r}" for k in differing)
            raise ConfigError(f"output_dir {directory}: made with other settings ({changes}); use another --output-dir")
    write_json(path, settings)


def repair(path: Path, done: set[int], start: int, end: int) -> set[int]:
    """Cut `path` down to its valid lines of rows start..end-1 that are not `done`; return their row numbers."""
    index, num_bad = _index(path)
    kept = {number: place for number, place in index.items() if start <= number < end and number not in done}
    if num_bad := num_bad + len(index) - len(kept):
        warn(f"{path}: {num_bad} line(s) were cut off or damaged; their rows are asked again")
        _copy_lines(path, path, kept.values())
    return set(kept)


def _index(path: Path) -> tuple[dict[int, tuple[int, int]], int]:
    """({row: (offset, size) of its first valid line}, number of other lines) of a file that may be missing."""
    index: dict[int, tuple[int, int]] = {}
    num_bad = offset = 0
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            number = None
            with suppress(ValueError, RecursionError, AttributeError):
                number = json.loads(line).get("row") if line.endswith(b"\n") else None
            if type(number) is not int or number in index:  # True is no number
                num_bad += 1
            else:
                index[number] = (offset, len(line))
            offset += len(line)
    return index, num_bad


def _copy_lines(source: Path, destination: Path, places: Iterable[tuple[int, int]]) -> None:
    """Write lines of `source`, which may be missing, to `destination`; memory is that of one line."""
    with atomic_file(destination, "wb") as output, suppress(FileNotFoundError), open(source, "rb") as file:
        for offset, size in places:
            file.seek(offset)
            output.write(file.read(size))


def _part(final: Path) -> Path:
    return final.with_name(final.name + PART)
