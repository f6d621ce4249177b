"""Rows of a parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from specforge_lite.core.errors import DataError
from specforge_lite.data.reading import Row


def parquet_rows(path: Path) -> Iterator[tuple[Row, float]]:
    """(row, share of the file up to it), a batch at a time; `line` is the row number."""
    numbers = count(1)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value, number in zip(batch.to_pylist(), numbers):
                    yield Row(number, value), number / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
