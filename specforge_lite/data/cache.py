"""A data file -> the tokenized dataset of it, built once by as many processes as asked for.

The directory's name is a hash of the file's content, the tokenizer's content, what the template draws, and the options:
moving a file changes nothing, changing one byte of it does. Two processes may ask at once; one builds, both open.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specforge_lite import log
from specforge_lite.config import DataSection
from specforge_lite.data.atomic import atomic_directory, exclusive, user_errors
from specforge_lite.data.conversations import RowRejected, to_conversation
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.reading import BadRow, Row, RowFile
from specforge_lite.data.store import CacheDamaged, StoreWriter, TokenizedDataset, key_digest
from specforge_lite.data.templates.auto import difference_from_own
from specforge_lite.data.tokenize import (
    TOKENIZATION_VERSION,
    ConversationTokenizer,
    TokenizeOptions,
    TokenRow,
    template_fingerprint,
)
from specforge_lite.errors import DataError

ROWS_PER_BATCH = 64


def open_or_build_dataset(data_path: str | Path, tokenizer: Any, section: DataSection) -> TokenizedDataset:
    """The tokenized dataset of a file, from the cache if it is there and whole.

    tokenizer: a transformers tokenizer with a fast form. Prints statistics and warnings on the main rank. Raises
    DataError with `file:line` for a row that cannot be read, and for a file without one trained token.
    """
    path = Path(data_path)
    spec = TokenizerSpec.from_tokenizer(tokenizer)
    options = TokenizeOptions.from_section(section)
    key = dataset_key(path, spec, options)
    directory = section.cache_dir / f"dataset-{key_digest(key)[:20]}"
    with user_errors(section.cache_dir):
        dataset = _open_whole(directory, key)
        if dataset is None:
            with exclusive(directory, str(directory)):
                dataset = _open_whole(directory, key, announce=True)
                if dataset is None:
                    _build(directory, path, spec, options, key, section.build_num_proc)
                    dataset = TokenizedDataset.open(directory, key)
    log.info(f"{path}: {dataset.stats.summary()}")
    if log.is_main_rank():
        for warning in dataset.stats.warnings():
            log.warn(f"{path}: {warning}")
    return dataset


def dataset_key(path: Path, spec: TokenizerSpec, options: TokenizeOptions) -> dict[str, Any]:
    """Everything that decides ids and masks, as a JSON object."""
    template = ConversationTokenizer(spec, options).template
    difference = difference_from_own(template, spec.chat_template, dict(spec.special_tokens))
    if difference is not None and log.is_main_rank():
        log.warn(f"chat template '{template.name}' draws other text than the tokenizer's: {difference}")
    return {
        "version": TOKENIZATION_VERSION,
        "file": file_digest(path),
        "tokenizer": spec.fingerprint,
        "template": template.name,
        "template_content": template_fingerprint(template),
        **{name: value for name, value in dataclasses.asdict(options).items() if name != "chat_template"},
    }


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()


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


def _build(
    directory: Path, path: Path, spec: TokenizerSpec, options: TokenizeOptions, key: dict[str, Any], num_proc: int
) -> None:
    with atomic_directory(directory) as temporary:
        writer = StoreWriter(temporary)
        try:
            with RowFile(path) as rows, log.progress(rows.num_bytes, f"tokenize {path.name}", unit="B") as bar:
                for batch in _tokenized_batches(rows, spec, options, num_proc):
                    _store(batch, writer, path)
                    bar.update(rows.bytes_read - bar.n)
            _check_result(path, writer)
            if file_digest(path) != key["file"]:
                raise DataError(f"{path}: changed while it was read")
            writer.finish(key)
        finally:
            writer.close()


@dataclass
class TokenBatch:
    """What a worker made of some rows: (line, tokens) in order, refused (line, id) pairs, or the first error."""

    rows: list[tuple[int, TokenRow]] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    error: tuple[int, str] | None = None


def _store(batch: TokenBatch, writer: StoreWriter, path: Path) -> None:
    stats = writer.stats
    stats.num_rows += len(batch.rows) + len(batch.refused)
    for _, sample_id in batch.refused:
        stats.note("refused", sample_id)
    for line, row in batch.rows:
        stats.num_truncated += row.num_cut > 0
        if row.loss_mask.any():
            writer.add(row.sample_id, line, row.input_ids, row.loss_mask)
        else:
            stats.note("span_cut_off" if row.span_cut_off else "without_span", row.sample_id)
    if batch.error is not None:
        raise DataError(f"{path}:{batch.error[0]}: {batch.error[1]}")


def _check_result(path: Path, writer: StoreWriter) -> None:
    if writer.stats.num_samples == 0:
        reasons = "; ".join(writer.stats.warnings()) or "it has no rows"
        raise DataError(f"{path}: nothing to train on: {reasons}")


def _tokenized_batches(
    rows: RowFile, spec: TokenizerSpec, options: TokenizeOptions, num_proc: int
) -> Iterator[TokenBatch]:
    """Batches in the order of the file. At most a few per process are under way, so memory stays bounded."""
    batches = _batched(iter(rows))
    if num_proc == 1:
        tokenizer = ConversationTokenizer(spec, options)
        yield from (tokenize_rows(batch, tokenizer) for batch in batches)
        return
    # spawn: a fork of a process with torch and CUDA threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, context, initializer=_start_worker, initargs=(spec, options)) as pool:
        waiting: deque[Future[TokenBatch]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                if len(waiting) >= 4 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"{rows.path}: a tokenizing process died (out of memory?); try a smaller --num-proc"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batched(rows: Iterator[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        yield batch


_worker: ConversationTokenizer | None = None


def _start_worker(spec: TokenizerSpec, options: TokenizeOptions) -> None:
    global _worker
    _worker = ConversationTokenizer(spec, options)


def _work(rows: list[Row | BadRow]) -> TokenBatch:
    assert _worker is not None
    return tokenize_rows(rows, _worker)


def tokenize_rows(rows: list[Row | BadRow], tokenizer: ConversationTokenizer) -> TokenBatch:
    """Tokenize parsed rows; stops at the first that is no conversation."""
    batch = TokenBatch()
    for row in rows:
        if isinstance(row, BadRow):
            batch.error = (row.line, f"{row.detail}; expected one JSON object per line")
            break
        try:
            conversation = to_conversation(row.value)
        except RowRejected as error:
            batch.error = (row.line, f"{error} (scripts/prepare_data.py leaves out such rows and counts them)")
            break
        try:
            batch.rows.append((row.line, tokenizer(conversation)))
        except DataError:
            batch.refused.append((row.line, conversation.id))
    return batch
