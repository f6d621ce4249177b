"""`--num-proc`: rows tokenized by several processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from specforge_lite.core.errors import DataError
from specforge_lite.data.cache import Batch, tokenize
from specforge_lite.data.reading import BadRow, Row
from specforge_lite.data.tokenize import RowTokenizer


def tokenized_by_processes(
    batches: Iterator[list[Row | BadRow]], tokenizer: RowTokenizer, path: Path, num_proc: int
) -> Iterator[Batch]:
    """Batches in their order, at most a few per process under way. Raises DataError where a process dies."""
    # spawn: a fork of a process with torch and CUDA threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, context, initializer=_start_worker, initargs=(tokenizer, path)) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                if len(waiting) >= 4 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(f"{path}: a tokenizing process died (out of memory?); try fewer --num-proc") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[RowTokenizer, Path] | None = None


def _start_worker(tokenizer: RowTokenizer, path: Path) -> None:
    global _worker
    _worker = (tokenizer, path)


def _work(rows: list[Row | BadRow]) -> Batch:
    assert _worker is not None
    return tokenize(rows, *_worker)
