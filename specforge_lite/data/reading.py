"""Files of rows -> rows, one at a time: jsonl, JSON arrays, pretty-printed objects, any of them gzipped, and parquet.

Memory is that of one row. A line that is not a row comes out as a `BadRow` with its place; a file that cannot be read
to its end (truncated gzip, broken array) raises DataError, because what is missing cannot be counted.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from specforge_lite.core.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
CHUNK = 1 << 16
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass(frozen=True)
class Row:
    """A parsed JSON value and the line (1-based) it starts on."""

    line: int
    value: Any


@dataclass(frozen=True)
class BadRow:
    """A line that is no row: `reason` is a short name to count by, `detail` says what was found."""

    line: int
    reason: str
    detail: str


class RowFile:
    """An open data file; iterate for `Row | BadRow`. `bytes_read` of `num_bytes` says how far it is.

    Raises DataError with the path (and line) for a file that is missing, empty, of another kind, or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._raw = open(self.path, "rb")  # noqa: SIM115  (closed by __exit__)
            head = self._raw.peek(8)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None
        self.num_bytes = self.path.stat().st_size
        self._parquet_bytes = 0 if head.startswith(b"PAR1") else None
        self._file: Any = gzip.GzipFile(fileobj=self._raw) if head.startswith(b"\x1f\x8b") else self._raw
        if kind := next((kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic)), None):
            self._raw.close()
            raise DataError(f"{self.path}: {kind}; expected UTF-8 json or jsonl, plain or gzip, or parquet")

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of the file (compressed, where it is) consumed so far."""
        return self._raw.tell() if self._parquet_bytes is None else self._parquet_bytes

    def __iter__(self) -> Iterator[Row | BadRow]:
        if self._parquet_bytes is not None:
            from specforge_lite.data.parquet import parquet_rows

            for row, share in parquet_rows(self.path):
                self._parquet_bytes = int(self.num_bytes * share)
                yield row
            return
        try:
            line = b"\n"
            while line and not line.removeprefix(codecs.BOM_UTF8).strip():
                line = self._file.readline(MAX_ROW_BYTES + 1)
            if not line:
                raise DataError(f"{self.path}: empty; expected rows of json or jsonl")
            self._file.seek(0)
            start = line.removeprefix(codecs.BOM_UTF8).lstrip()
            # A pretty-printed object: the line is no JSON by itself, and ends where an object may go on.
            pretty = start[:1] == b"{" and start.rstrip()[-1:] in (b"{", b",", b"[", b":") and not _is_json(start)
            if start[:1] == b"[" or pretty:
                from specforge_lite.data.json_values import json_values

                yield from json_values(self.path, self._file, in_array=not pretty)
            else:
                yield from _lines(self._file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path}: damaged or truncated gzip file ({error})") from None
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(file: BinaryIO) -> Iterator[Row | BadRow]:
    """jsonl: one value per line, blank lines passed over."""
    number, line = 1, file.readline(MAX_ROW_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    while line:
        if len(line) > MAX_ROW_BYTES:
            yield BadRow(number, "row-too-large", f"longer than {MAX_ROW_BYTES >> 20} MiB")
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK)
        elif line.strip():
            yield parse_line(line, number)
        number, line = number + 1, file.readline(MAX_ROW_BYTES + 1)


def parse_line(line: bytes, number: int) -> Row | BadRow:
    """The JSON value of one line of a file."""
    try:
        return Row(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return BadRow(number, "not-utf8", f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(number, "not-json", f"column {error.colno}: {error.msg}")
    except RecursionError:
        return BadRow(number, "nested-too-deeply", "more levels of nesting than a row can have")
    except ValueError as error:  # an integer of more than 4,300 digits
        return BadRow(number, "not-json", str(error).split(";")[0])
