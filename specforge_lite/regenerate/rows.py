"""The input as a stream of numbered rows with unique ids. Nothing is held but a hash of each id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.conversations import RowRejected, to_conversation
from specforge_lite.data.fim import FimRow, is_fim_row
from specforge_lite.data.reading import BadRow, RowFile
from specforge_lite.regenerate.fim import read_fim_row
from specforge_lite.types import Conversation

COUNT_UP_TO_BYTES = 64 << 20


@dataclass(frozen=True)
class InputRow:
    """Row `number` (0-based) of the input: a conversation, a hole in code, or the reason why it cannot be asked."""

    number: int
    id: str
    conversation: Conversation | None = None
    fim: FimRow | None = None
    reason: str = ""
    detail: str = ""


class RowSource:
    """Iterate for InputRows, once. `num_rows`: rows so far."""

    def __init__(self, file: RowFile, limit: int | None = None) -> None:
        self._file = file
        self._limit = limit
        self._seen: set[int] = set()
        self.num_rows = 0
        self._counted: int | None = count_rows(file.path) if file.num_bytes <= COUNT_UP_TO_BYTES else None

    @property
    def estimated_total(self) -> int | None:
        """Rows of the whole input: counted where it is small or at its end, else from the share of bytes read."""
        if self._counted is not None:
            return min(self._counted, self._limit) if self._limit else self._counted
        if self._file.is_parquet or not self._file.bytes_read:
            return self._limit
        total = round(self.num_rows * self._file.num_bytes / self._file.bytes_read)
        return min(total, self._limit) if self._limit else total

    def __iter__(self) -> Iterator[InputRow]:
        for value in self._file:
            if self.num_rows == self._limit:
                break
            row = self._read(value.line, value if isinstance(value, BadRow) else value.value)
            self.num_rows += 1
            yield row
        self._counted = self.num_rows

    def _read(self, line: int, value: Any) -> InputRow:
        if isinstance(value, BadRow):
            return InputRow(self.num_rows, self._unique(f"line-{line}"), reason=value.reason, detail=value.detail)
        try:
            if is_fim_row(value):
                fim = read_fim_row(value)
                return InputRow(self.num_rows, self._unique(fim.id), fim=fim)
            conversation = to_conversation(value)
        except RowRejected as error:
            own = value.get("id") if isinstance(value, dict) else None
            name = own if isinstance(own, str) and own.strip() and own.isprintable() else f"line-{line}"
            return InputRow(self.num_rows, self._unique(name), reason=error.reason, detail=f"line {line}: {error}")
        unique = self._unique(conversation.id)
        return InputRow(self.num_rows, unique, Conversation(unique, conversation.messages, conversation.tools))

    def _unique(self, name: str) -> str:
        """The id itself the first time, then `id~2`, `id~3`; the same in each pass over the same file."""
        candidate, count = name, 1
        while (key := _hash(candidate)) in self._seen:
            count += 1
            candidate = f"{name}~{count}"
        self._seen.add(key)
        return candidate


def count_rows(path: Path) -> int | None:
    """Rows of a file, or None where it cannot be read to its end (the real pass will say why)."""
    try:
        with RowFile(path) as file:
            return sum(1 for _ in file)
    except DataError:
        return None


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
