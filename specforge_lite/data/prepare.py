"""Rows of any kind -> files in the normal form: recognised, cleaned of duplicates, sampled, split.

One pass writes what is usable to a spool file and remembers where each row starts; a second copies the chosen rows. So
memory is a few dozen bytes per row, and nothing appears under a final name before everything is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from specforge_lite.core import log
from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import atomic_file, user_errors
from specforge_lite.data.conversations import RowRejected, content_digest, to_conversation, to_row
from specforge_lite.data.fim import is_fim_row, to_fim_row
from specforge_lite.data.forms import ignored_fields
from specforge_lite.data.reading import BadRow, Row
from specforge_lite.data.sources import Source
from specforge_lite.data.store import ignored_warning

SHOWN_ROW_CHARS = 2000


@dataclass(frozen=True)
class PrepareOptions:
    """sample_size: rows to draw at random (None: all). split_eval: share kept for evaluation, 0 for none. data_format:
    auto, chat or fim."""

    sample_size: int | None = None
    split_eval: float = 0.0
    seed: int = 0
    data_format: str = "auto"


@dataclass(frozen=True)
class OutputFiles:
    """Where the results go. `evaluation` is written only when there is a split."""

    train: Path
    evaluation: Path
    rejected: Path
    summary: Path


def output_files(output_path: Path, source: Source, split: bool) -> OutputFiles:
    """Names of the results: `DIR/<name>.jsonl`, with a split `DIR/<name>_train.jsonl` and `<name>_eval.jsonl`; or, for
    an output path that ends in .jsonl, that file and its neighbours. Never the file that is read."""
    if output_path.suffix in (".json", ".gz", ".parquet"):
        raise ConfigError(f"output_path {output_path}: expected a directory or a name ending in .jsonl")
    read = source.path.resolve() if source.path is not None else None
    if output_path.suffix == ".jsonl":
        directory, name, train = output_path.parent, output_path.stem, output_path
    else:
        directory, name = output_path, source.name
        train = directory / f"{name}.jsonl"
        if split or train.resolve() == read:
            train = directory / f"{name}_train.jsonl"
    if train.resolve() == read:
        raise ConfigError(f"output_path {output_path}: that is the file to read; give another name")
    others = (directory / f"{name}_{what}" for what in ("eval.jsonl", "rejected.jsonl", "summary.json"))
    return OutputFiles(train, *others)


@dataclass
class PrepareReport:
    """What came in, what went out, and why rows did not. format_since: the row that decided the format; ignored: fields
    without effect -> rows that have them."""

    num_rows: int = 0
    num_usable: int = 0
    num_train: int = 0
    num_eval: int = 0
    data_format: str = ""
    format_since: str = ""
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejected: str = ""
    ignored: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.most_common())
        left_out = f"; left out: {reasons}" if reasons else ""
        train, held_out = f"{self.num_train:,} written for training", f"{self.num_eval:,} for evaluation"
        return f"{self.num_rows:,} rows read, {train}, {held_out}{left_out}"


def prepare(source: Source, files: OutputFiles, options: PrepareOptions) -> PrepareReport:
    """Read a source and write its training, evaluation, rejected and summary files, all or none of them.

    Raises DataError when the source cannot be read, mixes FIM rows and conversations, or has no usable row.
    """
    if not 0 <= options.split_eval < 1:
        raise ConfigError(f"split_eval {options.split_eval}: expected a share from 0 up to, not including, 1")
    with user_errors(files.train), contextlib.ExitStack() as stack:
        files.train.parent.mkdir(parents=True, exist_ok=True)
        train = stack.enter_context(atomic_file(files.train, "wb"))  # entered first: named last, when the rest is
        spool = stack.enter_context(tempfile.TemporaryFile(dir=files.train.parent))
        rejected = stack.enter_context(atomic_file(files.rejected))
        summary = stack.enter_context(atomic_file(files.summary))
        evaluation = stack.enter_context(atomic_file(files.evaluation, "wb")) if options.split_eval else None
        report, starts, groups = _collect(source, spool, rejected, options.data_format)
        if not report.num_usable:
            first = f"; first: {report.first_rejected}" if report.first_rejected else ""
            raise DataError(f"{source}: no usable row of {report.num_rows}{first}")
        chosen, held_out = _choose_rows(groups, options)
        report.num_train = _copy(spool, starts, chosen, train)
        if evaluation is not None:
            report.num_eval = _copy(spool, starts, held_out, evaluation)
        facts = {
            "source": source.name,
            "format": report.data_format,
            "rows_read": report.num_rows,
            "rows_usable": report.num_usable,
            "train": report.num_train,
            "eval": report.num_eval,
            "rejected": dict(report.rejected.most_common()),
            "sample_size": options.sample_size,
            "split_eval": options.split_eval,
            "seed": options.seed,
        }
        json.dump(facts, summary, indent=1, ensure_ascii=False)
    for warning in ignored_warning(report.ignored):
        log.warn(f"{source}: {warning}")
    if evaluation is None and files.evaluation.exists():
        log.warn(f"{files.evaluation} is left from an earlier run; its rows may be in the training data now")
    return report


def _collect(
    source: Source, spool: IO[bytes], rejected: IO[str], data_format: str
) -> tuple[PrepareReport, array[int], array[int]]:
    """Write usable rows to the spool, refused ones with their reasons to `rejected`. Returns also the offset of each
    row, and of the end; and a group of each: the file that a FIM row was cut from, the row itself for conversations."""
    report = PrepareReport(data_format="" if data_format == "auto" else data_format)
    starts, groups = array("q", [0]), array("q")
    seen: set[bytes] = set()
    ids: set[bytes] = set()
    group_of: dict[str, int] = {}
    with log.progress(None, f"read {source.name}", unit="row") as bar:
        for place, read in source.rows():
            report.num_rows += 1
            bar.update(1)
            try:
                row, digest, name = _usable(place, read, report)
                if digest[:12] in seen:
                    raise RowRejected("duplicate", f"the same content as an earlier row (id {row['id']})")
            except RowRejected as error:
                if error.reason == "mixed-formats":
                    raise DataError(f"{place}: {error}") from None
                _reject(place, read, error, report, rejected)
                continue
            seen.add(digest[:12])
            if (key := hashlib.sha256(row["id"].encode("utf-8")).digest()[:12]) in ids:
                row["id"] += f"-{digest.hex()[:8]}"  # ids must be unique: regeneration and capture go by them
                key = hashlib.sha256(row["id"].encode("utf-8")).digest()[:12]
            ids.add(key)
            starts.append(starts[-1] + spool.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"))
            groups.append(group_of.setdefault(name, len(group_of)) if name else report.num_usable)
            report.num_usable += 1
    return report, starts, groups


def _usable(place: str, read: Row | BadRow, report: PrepareReport) -> tuple[dict[str, Any], bytes, str]:
    """(normal form, digest of its content, name of the file it was cut from) of a row. Raises RowRejected."""
    if isinstance(read, BadRow):
        raise RowRejected(read.reason, read.detail)
    found = "fim" if is_fim_row(read.value) else "chat"
    if isinstance(read.value, dict) and not report.data_format:
        report.data_format, report.format_since = found, f" (since {place})"
    if isinstance(read.value, dict) and found != report.data_format:
        among = f"a {found} row among {report.data_format} rows{report.format_since}"
        raise RowRejected("mixed-formats", f"{among}; expected one format")
    if found == "fim":
        hole = to_fim_row(read.value)
        return hole.to_row(), bytes.fromhex(hole.content_digest), hole.source
    conversation = to_conversation(read.value)
    report.ignored.update(ignored_fields(read.value))
    return to_row(conversation), bytes.fromhex(content_digest(conversation)), ""


def _reject(place: str, read: Row | BadRow, error: RowRejected, report: PrepareReport, rejected: IO[str]) -> None:
    report.rejected[error.reason] += 1
    report.first_rejected = report.first_rejected or f"{place}: {error}"
    entry: dict[str, Any] = {"place": place, "reason": error.reason, "detail": str(error)}
    if error.reason != "duplicate" and isinstance(read, Row):
        try:
            entry["row"] = json.dumps(read.value, ensure_ascii=False, default=str)[:SHOWN_ROW_CHARS]
        except (RecursionError, ValueError):  # nested deeper than JSON can be written
            entry["row"] = ""
    rejected.write(json.dumps(entry, ensure_ascii=True) + "\n")


def _choose_rows(groups: array[int], options: PrepareOptions) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, evaluation rows), ascending row numbers, drawn by the seed.

    Whole groups go to one side. With a split there is at least one evaluation row, and at least one for training.
    """
    generator = np.random.Generator(np.random.PCG64(options.seed))
    rows = np.arange(len(groups))
    if options.sample_size is not None and options.sample_size < len(rows):
        rows = np.sort(generator.choice(rows, options.sample_size, replace=False))
    if not options.split_eval:
        return rows, rows[:0]
    group_of = np.array(groups)[rows]
    names, sizes = np.unique(group_of, return_counts=True)
    if len(names) < 2:
        raise DataError("split_eval: needs at least two rows (of different files, for code)")
    wanted = max(1, round(options.split_eval * len(rows)))
    order = generator.permutation(len(names))
    num_groups = min(int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1, len(names) - 1)
    held_out = np.isin(group_of, names[order[:num_groups]])
    return rows[~held_out], rows[held_out]


def _copy(spool: IO[bytes], starts: array[int], rows: np.ndarray, output: IO[bytes]) -> int:
    for row in rows:
        spool.seek(starts[int(row)])
        output.write(spool.read(starts[int(row) + 1] - starts[int(row)]))
    return len(rows)
