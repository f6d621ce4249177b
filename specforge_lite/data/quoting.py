"""Conversations that quote control tokens: a copy of the tokenizer in which only the template's have their meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from specforge_lite.data.encoding import QUOTE_END, QUOTE_START, Rendering, any_of

NAME_START, NAME_END = "\ufdd0", "\ufdd1"  # around the number of a control token, written by a template


class RenamedTokenizer:
    """The tokenizer whose control tokens have other names; names: the control tokens, in the order of their numbers."""

    def __init__(self, tokenizer_json: str, names: Sequence[str]) -> None:
        self._names = names
        self._other = {name: f"{NAME_START}{number}{NAME_END}" for number, name in enumerate(names)}
        self._pattern = re.compile(f"{QUOTE_START}([0-9]+){QUOTE_END}|{any_of(names).pattern}")
        description = json.loads(tokenizer_json)
        for token in description["added_tokens"]:
            if token["content"] in self._other:
                token |= {"content": self._other[token["content"]], "normalized": False}
        self._tokenizer = Tokenizer.from_str(json.dumps(description))
        size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._original_ids = np.arange(size, dtype=np.int32)
        for token in description["added_tokens"]:
            self._original_ids[int(self._tokenizer.token_to_id(token["content"]) or 0)] = token["id"]

    def encode(self, rendering: Rendering) -> tuple[np.ndarray, list[tuple[int, int]], Rendering]:
        """(ids of the original tokenizer [L] int32, offsets, the text and spans that they are of)."""
        renamed = self._rewrite(rendering)
        encoding = self._tokenizer.encode(renamed.text, add_special_tokens=False)
        return self._original_ids[np.array(encoding.ids, dtype=np.int64)], encoding.offsets, renamed

    def _rewrite(self, rendering: Rendering) -> Rendering:
        """Give the template's control tokens their other names, and placeholders their quoted text."""

        def rename(start: int | None, end: int | None) -> str:
            return self._pattern.sub(
                lambda m: self._names[int(m[1])] if m[1] else self._other[m[0]], rendering.text[start:end]
            )

        text, spans, at = "", [], 0
        for start, end in rendering.spans:
            text += rename(at, start)
            inner = rename(start, end)
            spans.append((len(text), len(text) + len(inner)))
            text, at = text + inner, end
        return Rendering(text + rename(at, None), tuple(spans))
