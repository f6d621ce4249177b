"""A data file -> the tokenized dataset of it, built once by as many processes as asked for.

The directory's name is a hash of the file's content, the tokenizer's content, the template, and the options: moving a
file changes nothing, changing one byte of it does. Two processes may ask at once; one builds, both open.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from specforge_lite.core import log
from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import atomic_directory, exclusive, key_digest, sha256_of, user_errors, write_json
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.data.conversations import RowRejected, is_fim_row, is_plain_row
from specforge_lite.data.reading import BadRow, Row, RowFile
from specforge_lite.data.store import CacheDamaged, StoreWriter, TokenizedDataset
from specforge_lite.data.tokenize import RowTokenizer, TokenRow, row_tokenizer

ROWS_PER_BATCH = 64
SMALL_FILE_BYTES = 1 << 20  # tokenized sooner than other processes would have started


def open_dataset(path: str | None, target: TargetSection, data: DataSection) -> TokenizedDataset:
    """Open or build the tokenized dataset of a file. Raises ConfigError without one."""
    if path is None:
        raise ConfigError("train_data_path: required (flag --train-data-path)")
    return open_or_build_dataset(path, load_tokenizer(target.target_model_path, target.trust_remote_code), data)


def open_or_build_dataset(data_path: str | Path, tokenizer: Any, section: DataSection) -> TokenizedDataset:
    """The tokenized dataset of a file, from the cache if it is there and whole.

    tokenizer: a transformers tokenizer with a fast form. Prints statistics and warnings on the main rank. Raises
    DataError with `file:line` for a row that cannot be read, and for a file without one trained token.
    """
    path = Path(data_path)
    data_format = section.data_format if section.data_format != "auto" else _recognise_format(path)
    rows = row_tokenizer(tokenizer, section, data_format)
    with user_errors(section.cache_dir):
        key = {**rows.key(), "file": _content_hash(path, section.cache_dir)}
        directory = section.cache_dir / f"dataset-{key_digest(key)[:20]}"
        dataset = _open_whole(directory, key)
        if dataset is None:
            with exclusive(directory, str(directory)):
                dataset = _open_whole(directory, key, announce=True)
                if dataset is None:
                    _build(directory, path, rows, section.build_num_proc, key)
                    dataset = TokenizedDataset.open(directory, key)
    log.info(f"{path}: {dataset.stats.summary()}")
    for warning in dataset.stats.warnings() if log.is_main_rank() else ():
        log.warn(f"{path}: {warning}")
    return dataset


def _content_hash(path: Path, cache_dir: Path) -> str:
    """sha256 of a data file; remembered beside the cache for as long as size and modification time are the same, so
    that a start does not read the file once per rank."""
    with user_errors(path):
        facts = path.stat()
        known = {"path": str(path.resolve()), "bytes": facts.st_size, "modified": facts.st_mtime_ns}
        memo = cache_dir / f".sha256-{key_digest({'path': known['path']})[:20]}.json"
        try:
            remembered = json.loads(memo.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            remembered = {}
        if {name: remembered.get(name) for name in known} == known and isinstance(remembered.get("sha256"), str):
            return str(remembered["sha256"])
        digest = sha256_of(path)
    write_json(memo, {**known, "sha256": digest}, sync=False)
    return digest


def _recognise_format(path: Path) -> str:
    """`fim` or `chat`, by the first row that is one."""
    with RowFile(path) as rows:
        first = next((row for row in rows if isinstance(row, Row)), None)
    return "fim" if first is not None and is_fim_row(first.value) else "chat"


def _open_whole(directory: Path, key: dict[str, Any], announce: bool = False) -> TokenizedDataset | None:
    """The finished cache; None if there is none or it is damaged."""
    if not directory.exists():
        return None
    try:
        return TokenizedDataset.open(directory, key)
    except CacheDamaged as error:
        if announce:
            log.warn(f"cache is damaged and built again: {error}")
        return None


def _build(directory: Path, path: Path, tokenizer: RowTokenizer, num_proc: int, key: dict[str, Any]) -> None:
    with atomic_directory(directory, held=True) as temporary, closing(StoreWriter(temporary)) as writer:
        with RowFile(path) as rows, log.progress(rows.num_bytes, f"tokenize {path.name}", "B") as bar:
            for batch, ignored in _tokenized_batches(rows, tokenizer, num_proc):
                for line, row in batch:
                    _store(line, row, writer)
                for name, count in ignored.items():
                    writer.stats.ignored[name] = writer.stats.ignored.get(name, 0) + count
                bar.update(rows.bytes_read - bar.n)
        if writer.stats.num_samples == 0:
            reasons = "; ".join(writer.stats.warnings()) or "it has no rows"
            raise DataError(f"{path}: nothing to train on: {reasons}")
        if sha256_of(path) != key["file"]:
            raise DataError(f"{path}: changed while it was read")
        writer.finish(key)


def _store(line: int, row: TokenRow, writer: StoreWriter) -> None:
    stats = writer.stats
    stats.num_rows += 1
    stats.num_truncated += row.num_cut > 0
    if row.lost_reasoning:
        stats.note("lost_reasoning", row.sample_id)
    if row.refused:
        stats.note("refused", f"{row.sample_id}: {row.refused}")
    elif row.loss_mask.any():
        writer.add(row.sample_id, line, row.input_ids, row.loss_mask)
    else:
        stats.note("span_cut_off" if row.span_cut_off else "without_span", row.sample_id)


# Rows of a file, each with its line; and fields without effect -> rows that have them.
Batch = tuple[list[tuple[int, TokenRow]], Counter[str]]


def _tokenized_batches(rows: RowFile, tokenizer: RowTokenizer, num_proc: int) -> Iterator[Batch]:
    """Batches in the order of the file. At most a few per process are under way, so memory stays bounded."""
    stream = iter(rows)
    batches = iter(lambda: list(itertools.islice(stream, ROWS_PER_BATCH)), [])
    if num_proc == 1 or rows.num_bytes < SMALL_FILE_BYTES:
        yield from (tokenize(batch, tokenizer, rows.path) for batch in batches)
        return
    from specforge_lite.data.pool import tokenized_by_processes

    yield from tokenized_by_processes(batches, tokenizer, rows.path, num_proc)


def tokenize(rows: list[Row | BadRow], tokenizer: RowTokenizer, path: Path) -> Batch:
    """Tokenize parsed rows. Raises DataError for the first that cannot be read."""
    result: list[tuple[int, TokenRow]] = []
    ignored: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(f"{path}:{row.line}: {row.detail}; expected one JSON object per line")
        try:
            result.append((row.line, tokenizer(row.value)))
        except RowRejected as error:
            remedy = "scripts/prepare_data.py leaves out such rows and counts them"
            raise DataError(f"{path}:{row.line}: {error} ({remedy})") from None
        if not is_plain_row(row.value):
            from specforge_lite.data.forms import ignored_fields

            ignored.update(ignored_fields(row.value))
    return result, ignored
