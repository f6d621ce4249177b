"""Files of rows -> rows, one at a time: jsonl, JSON arrays, pretty-printed objects, any of them gzipped, and parquet.

Memory is that of one row. A line that is not a row comes out as a `BadRow` with its place; a file that cannot be read
to its end (truncated gzip, broken array) raises DataError, because what is missing cannot be counted.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from specforge_lite.core.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
_CHUNK = 1 << 16
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
            self._raw: BinaryIO = open(self.path, "rb")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None
        self.num_bytes = self.path.stat().st_size
        head = self._raw.read(8)
        self._raw.seek(0)
        self.is_parquet = head[:4] == b"PAR1"
        self._file: BinaryIO = self._raw
        if head[:2] == b"\x1f\x8b":
            self._file = gzip.GzipFile(fileobj=self._raw, mode="rb")  # type: ignore[assignment]
        for magic, kind in _OTHER_KINDS.items():
            if head.startswith(magic):
                self._raw.close()
                raise DataError(f"{self.path}: {kind}; expected UTF-8 json or jsonl, plain or gzip, or parquet")

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of the file (compressed, where it is) consumed so far."""
        return self._raw.tell()

    def __iter__(self) -> Iterator[Row | BadRow]:
        if self.is_parquet:
            yield from _parquet_rows(self.path)
            return
        try:
            yield from self._text_rows()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path}: damaged or truncated gzip file ({error})") from None
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None

    def _text_rows(self) -> Iterator[Row | BadRow]:
        # Kept on self: a collected BufferedReader closes the file below it.
        self._buffered = buffered = io.BufferedReader(cast(Any, self._file), _CHUNK)
        first_line, skipped = _first_line(buffered)
        if not first_line.strip():
            raise DataError(f"{self.path}: empty; expected rows of json or jsonl")
        start = first_line.lstrip()
        if start.startswith(b"["):
            yield from _stream_values(self.path, first_line, buffered, skipped + 1, in_array=True)
        elif start.startswith(b"{") and not _is_json(first_line) and _opens_object(first_line):
            yield from _stream_values(self.path, first_line, buffered, skipped + 1, in_array=False)
        else:
            yield from _lines(first_line, buffered, skipped + 1)


def _first_line(file: BinaryIO) -> tuple[bytes, int]:
    """The first line that is not blank, without a byte order mark, and the number of lines before it."""
    line, skipped = file.readline(MAX_ROW_BYTES + 1).removeprefix(b"\xef\xbb\xbf"), 0
    while line and not line.strip():
        line, skipped = file.readline(MAX_ROW_BYTES + 1), skipped + 1
    return line, skipped


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _opens_object(line: bytes) -> bool:
    """True if a line that is not JSON by itself ends where a pretty-printed object may go on."""
    return line.rstrip()[-1:] in (b"{", b",", b"[", b":")


def _lines(line: bytes, file: BinaryIO, number: int) -> Iterator[Row | BadRow]:
    while line:
        if len(line) > MAX_ROW_BYTES:
            yield BadRow(number, "row-too-large", f"longer than {MAX_ROW_BYTES >> 20} MiB")
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
        elif line.strip():
            yield _parse_line(line, number)
        line, number = file.readline(MAX_ROW_BYTES + 1), number + 1


def _parse_line(line: bytes, number: int) -> Row | BadRow:
    """One line of a jsonl file."""
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


def _stream_values(path: Path, head: bytes, file: BinaryIO, number: int, in_array: bool) -> Iterator[Row | BadRow]:
    """The values of a JSON array, or of JSON objects one after another, without holding the file.

    A value that does not parse is retried with twice as much text, so the cost stays linear.
    """
    source = _Text(path, head, file, number)
    if in_array:
        source.expect("[")
    while source.skip(",") if in_array else source.skip(""):
        if in_array and source.peek() == "]":
            source.expect("]")
            if source.skip(""):
                raise DataError(f"{path}:{source.line}: expected the end of the file after ']'")
            return
        yield Row(source.line, source.value())
    if in_array:
        raise DataError(f"{path}:{source.line}: the file ends inside its array; expected ']'")


class _Text:
    """A window of decoded text that moves over a file, and the line it is at."""

    def __init__(self, path: Path, head: bytes, file: BinaryIO, line: int) -> None:
        self._path, self._file, self.line = path, file, line
        self._decoder = json.JSONDecoder()
        self._pending, self._text, self._at, self._ended = head, "", 0, False

    def _more(self, size: int = _CHUNK) -> bool:
        data = self._pending + (b"" if self._ended else self._file.read(size))
        self._ended = self._ended or len(data) == len(self._pending)
        try:
            text = data.decode("utf-8")
            self._pending = b""
        except UnicodeDecodeError as error:
            if self._ended or len(data) - error.start > 3:
                line = self.line + self._text.count("\n", self._at) + data.count(b"\n", 0, error.start)
                raise DataError(
                    f"{self._path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; expected UTF-8 text"
                ) from None
            text, self._pending = data[: error.start].decode("utf-8"), data[error.start :]
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(text) or not self._ended

    def peek(self) -> str:
        """The next character that is not a space; '' at the end of the file."""
        while True:
            while self._at < len(self._text):
                character = self._text[self._at]
                if not character.isspace():
                    return character
                self.line += character == "\n"
                self._at += 1
            if not self._more():
                return ""

    def skip(self, separator: str) -> bool:
        """Pass spaces and separators; False at the end of the file."""
        while separator and self.peek() == separator:
            self._at += 1
        return self.peek() != ""

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise DataError(f"{self._path}:{self.line}: expected '{character}', found '{self.peek()}'")
        self._at += 1

    def value(self) -> Any:
        """The JSON value that starts here."""
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError:
                raise DataError(f"{self._path}:{self.line}: more levels of nesting than a row can have") from None
            except ValueError as error:
                size *= 2
                if len(self._text) - self._at > MAX_ROW_BYTES or not self._more(size):
                    place = self.line + self._text.count("\n", self._at, getattr(error, "pos", self._at))
                    message = getattr(error, "msg", str(error).split(";")[0])
                    raise DataError(f"{self._path}:{place}: not valid JSON: {message}") from None
                continue
            if end - self._at > MAX_ROW_BYTES:
                raise DataError(f"{self._path}:{self.line}: a row longer than {MAX_ROW_BYTES >> 20} MiB")
            self.line += self._text.count("\n", self._at, end)
            self._at = end
            return value


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a parquet file, a batch at a time; `line` is the row number."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
