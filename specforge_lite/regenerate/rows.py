"""The input as a stream of numbered rows with unique ids (nothing is held but a hash of each), and the prompts of its
fill-in-the-middle rows: the very token ids training will use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.data.conversations import RowRejected, to_conversation
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.fim import FimRow, FimTokenizer, is_fim_row, to_fim_row
from specforge_lite.data.reading import BadRow, RowFile
from specforge_lite.types import Conversation


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
        self._file, self._limit = file, limit
        self._seen: set[bytes] = set()
        self._ended = False
        self.num_rows = 0

    @property
    def estimated_total(self) -> int | None:
        """Rows of the whole input: from the share of bytes read, None where none was; exact once all are."""
        total = self.num_rows
        if not self._ended:
            total = round(total * self._file.num_bytes / max(self._file.bytes_read, 1))
        return min(total or self._limit, self._limit) if self._limit else total or None

    def __iter__(self) -> Iterator[InputRow]:
        for row in self._file:
            if self.num_rows == self._limit:
                break
            self.num_rows += 1
            if isinstance(row, BadRow):
                yield self._numbered(f"line-{row.line}", reason=row.reason, detail=row.detail)
            else:
                yield self._read(row.line, row.value)
        self._ended = True

    def _read(self, line: int, value: Any) -> InputRow:
        try:
            if is_fim_row(value):
                fim = read_fim_row(value)
                return self._numbered(fim.id, fim=fim)
            conversation = to_conversation(value)
        except RowRejected as error:
            own = value.get("id") if isinstance(value, dict) else None
            name = own if isinstance(own, str) and own.strip() and own.isprintable() else f"line-{line}"
            return self._numbered(name, reason=error.reason, detail=f"line {line}: {error}")
        row = self._numbered(conversation.id)
        return replace(row, conversation=replace(conversation, id=row.id))

    def _numbered(self, name: str, **what: Any) -> InputRow:
        """A row under the id itself the first time, then `id~2`, `id~3`; the same in each pass over the same file."""
        candidate, count = name, 1
        while (key := _hash(candidate)) in self._seen:
            count += 1
            candidate = f"{name}~{count}"
        self._seen.add(key)
        return InputRow(self.num_rows - 1, candidate, **what)


def read_fim_row(value: dict[str, Any]) -> FimRow:
    """A row to be filled; the recorded middle, which is replaced anyway, may be missing. Raises RowRejected."""
    missing = "prefix" in value and not value.get("middle")
    return to_fim_row({**value, "middle": "?"} if missing else value)


class FimPrompts:
    """Builds prompts of one tokenizer. max_length: tokens of prompt and answer together; the code around the hole is
    cut to fit, and an answer has at most half of them: `max_tokens`.

    Raises ConfigError for a tokenizer without fill-in-the-middle tokens.
    """

    def __init__(self, tokenizer: Any, order: str, max_length: int, max_tokens: int) -> None:
        self.max_tokens = min(max_tokens, max_length // 2)
        try:
            spec = TokenizerSpec.from_tokenizer(tokenizer)
            # An empty middle and its end token: the context has all of the rest but the end token.
            self._tokenizer = FimTokenizer(spec, order, max_length - self.max_tokens + 1)
        except DataError as error:
            raise ConfigError(str(error)) from None
        self.end_token_ids = self._tokenizer.end_token_ids

    def prompt_ids(self, row: FimRow) -> list[int]:
        """Token ids up to where the middle begins."""
        ids, mask, _ = self._tokenizer(replace(row, middle="", cut_off=False))
        prompt: list[int] = ids[~mask].tolist()
        return prompt


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
