"""The values of a JSON array, or of JSON objects one after another, one at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from specforge_lite.core.errors import DataError
from specforge_lite.data.reading import CHUNK, MAX_ROW_BYTES, Row

_NOT_SPACE = re.compile(r"\S")


def json_values(path: Path, file: BinaryIO, in_array: bool) -> Iterator[Row]:
    """Rows of an open file, without holding it. Raises DataError with the line of a mistake."""
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

    def _more(self, size: int = CHUNK) -> bool:
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
        size = CHUNK
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
