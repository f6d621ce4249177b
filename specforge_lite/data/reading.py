"""Files of rows -> rows, one at a time: jsonl, JSON arrays, pretty-printed objects, any of them gzipped, and parquet.

Memory is that of one row. A line that is not a row comes out as a `BadRow` with its place; a file that cannot be read
to its end (truncated gzip, broken array) raises DataError, because what is missing cannot be counted.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from specforge_lite.core.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
_CHUNK = 1 << 16
_NOT_SPACE = re.compile(r"\S")
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
            yield from self._parquet_rows()
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
                yield from _values(self.path, self._file, in_array=not pretty)
            else:
                yield from _lines(self._file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path}: damaged or truncated gzip file ({error})") from None
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None

    def _parquet_rows(self) -> Iterator[Row]:
        """A batch at a time; `line` is the row number."""
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        numbers = count(1)
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=256):
                    for value, number in zip(batch.to_pylist(), numbers):
                        self._parquet_bytes = self.num_bytes * number // file.metadata.num_rows
                        yield Row(number, value)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


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
                line = file.readline(_CHUNK)
        elif line.strip():
            yield _parse_line(line, number)
        number, line = number + 1, file.readline(MAX_ROW_BYTES + 1)


def _parse_line(line: bytes, number: int) -> Row | BadRow:
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


def _values(path: Path, file: BinaryIO, in_array: bool) -> Iterator[Row]:
    """The values of a JSON array, or of JSON objects one after another, without holding the file."""
    text = _Text(path, file)
    if in_array:
        text.peek()
        text.at += 1
    while character := text.peek():
        if in_array and character == ",":
            text.at += 1
        elif in_array and character == "]":
            text.at += 1
            if text.peek():
                raise DataError(f"{path}:{text.line}: expected the end of the file after ']'")
            return
        else:
            yield Row(text.line, text.value())
    if in_array:
        raise DataError(f"{path}:{text.line}: the file ends inside its array; expected ']'")


class _Text:
    """A window of decoded text that moves over a file: `line` is that of place `at` in it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.line, self.at = 1, 0
        self._path, self._file, self._text = path, file, ""
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode

    def _more(self, size: int = _CHUNK) -> bool:
        data = self._file.read(size)
        try:
            self._text, self.at = self._text[self.at :] + self._decode(data, not data), 0
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            found = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
            raise DataError(f"{self._path}:{line}: {found}; expected UTF-8 text") from None
        return bool(data)

    def peek(self) -> str:
        """The next character that is not a space; '' at the end of the file."""
        while True:
            found = _NOT_SPACE.search(self._text, self.at)
            end = found.start() if found else len(self._text)
            self.line += self._text.count("\n", self.at, end)
            self.at = end
            if found:
                return found[0]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The JSON value that starts here. One that does not parse is retried with twice as much text, so the cost
        stays linear."""
        size = _CHUNK
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self.at)
                break
            except RecursionError:
                raise DataError(f"{self._path}:{self.line}: more levels of nesting than a row can have") from None
            except ValueError as error:
                size *= 2
                if len(self._text) - self.at > MAX_ROW_BYTES or not self._more(size):
                    place = self.line + self._text.count("\n", self.at, getattr(error, "pos", self.at))
                    message = getattr(error, "msg", str(error).split(";")[0])
                    raise DataError(f"{self._path}:{place}: not valid JSON: {message}") from None
        if end - self.at > MAX_ROW_BYTES:
            raise DataError(f"{self._path}:{self.line}: a row longer than {MAX_ROW_BYTES >> 20} MiB")
        self.line += self._text.count("\n", self.at, end)
        self.at = end
        return value
