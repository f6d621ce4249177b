"""Fill-in-the-middle rows: the target fills the hole again, asked with the very token ids training will use."""

from __future__ import annotations

from typing import Any

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.fim import FimRow, FimTokenizer, to_fim_row

_NO_MIDDLE = "?"  # a row to be filled may come without a middle; the recorded one is replaced anyway


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
        ids, mask, _ = self._tokenizer(FimRow(row.id, row.prefix, "", row.suffix))
        prompt: list[int] = ids[~mask].tolist()
        return prompt


def read_fim_row(value: dict[str, Any]) -> FimRow:
    """A row to be filled. Raises RowRejected."""
    if "prefix" in value and not value.get("middle"):
        value = {**value, "middle": _NO_MIDDLE}
    return to_fim_row(value)
