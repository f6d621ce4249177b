"""Text and trained spans -> token ids and loss mask, in one tokenization.

- A token is trained if at least one of its characters is: a BPE token may straddle the border of a span.
- An added token that swallows the spaces beside it (`rstrip`, `lstrip`: Phi-3's headers) counts where it stands.
- Offsets come from a copy of the tokenizer without its post-processor: `ByteLevel(trim_offsets=True)` would move the
  offsets of a line end before an answer into the answer.
- A control token inside a message (`<|im_end|>` typed by a user) stays ordinary text. Only a conversation that holds
  one is tokenized by a second copy, in which the control tokens have other names (noncharacters) that only the template
  writes. A vocabulary that can spell the name as a plain token defeats this; byte-level and SentencePiece BPE cannot.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from specforge_lite.core.errors import DataError

if TYPE_CHECKING:
    from specforge_lite.data.quoting import RenamedTokenizer

RESERVED = re.compile("[\ufdd0-\ufdd6]")
# Tokens that models put into an answer themselves; in data they mean what they say.
CONTENT_TOKENS = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
QUOTE_START, QUOTE_END = "\ufdd5", "\ufdd6"  # around the number of a control token, quoted in a message


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation: `text`, and the ascending, disjoint character spans [start, end) that are trained.

    lost_reasoning: the last answer has reasoning that its template has no place for.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    lost_reasoning: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """What tokenization needs of a tokenizer, as strings: can be sent to a process and hashed by content.

    tool_template: the template for conversations with tools, where that is another one.
    """

    tokenizer_json: str
    chat_template: str | None
    special_tokens: tuple[tuple[str, str], ...]
    tool_template: str | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenizerSpec:
        """From a transformers tokenizer with a fast (Rust) form, else DataError. The tokenizer is left as it is."""
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(
                f"tokenizer {getattr(tokenizer, 'name_or_path', '')} ({type(tokenizer).__name__}) has no fast form,"
                " which token offsets need; expected a directory with a tokenizer.json"
            )
        plain = Tokenizer.from_str(backend.to_str())
        plain.post_processor = None  # type: ignore[assignment]  # the setter takes None, its annotation does not say so
        plain.no_truncation()
        plain.no_padding()
        own = getattr(tokenizer, "chat_template", None)
        named = own if isinstance(own, dict) else {"default": own}
        special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        return cls(plain.to_str(), named.get("default"), tuple(sorted(special.items())), named.get("tool_use"))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over vocabulary, merges, pre-tokenizer and added tokens; not over paths or names."""
        return hashlib.sha256(self.tokenizer_json.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token text -> id, added tokens included."""
        from tokenizers import Tokenizer

        return dict(Tokenizer.from_str(self.tokenizer_json).get_vocab(with_added_tokens=True))

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens that are never split, special or not, sorted."""
        return tuple(sorted(token["content"] for token in json.loads(self.tokenizer_json)["added_tokens"]))


class TextEncoder:
    """Tokenizes renderings of one tokenizer and one template family."""

    def __init__(self, spec: TokenizerSpec, control_tokens: Iterable[str]) -> None:
        from tokenizers import Tokenizer

        self._spec = spec
        self._plain = Tokenizer.from_str(spec.tokenizer_json)
        decoder = self._plain.get_added_tokens_decoder()
        self._rstrip = [i for i, token in decoder.items() if token.rstrip]
        self._lstrip = [i for i, token in decoder.items() if token.lstrip and not token.rstrip]
        special = {token.content for token in decoder.values() if token.special} - CONTENT_TOKENS
        control = {token.content for token in decoder.values()} & (special | {*control_tokens})
        self._names = sorted(control, key=lambda name: (-len(name), name))  # longest first: no prefix wins
        self._numbers = {name: i for i, name in enumerate(self._names)}
        self._pattern = any_of(self._names)
        self._renamed: RenamedTokenizer | None = None

    def quote(self, values: Any) -> Any:
        """A copy of `values` (strings, lists, dicts) in which quoted control tokens are placeholders; `encode_quoted`
        puts them back. Equal to `values` where they quote none."""
        return map_strings(
            values,
            lambda text: self._pattern.sub(lambda m: f"{QUOTE_START}{self._numbers[m[0]]}{QUOTE_END}", text),
        )

    def encode(self, rendering: Rendering) -> tuple[np.ndarray, np.ndarray]:
        """Ids [L] int32 and loss mask [L] bool; every control token in the text counts as one."""
        encoding = self._plain.encode(rendering.text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        return ids, self._mask(ids, encoding.offsets, rendering)

    def encode_quoted(self, rendering: Rendering) -> tuple[np.ndarray, np.ndarray]:
        """Like `encode`, of a conversation that went through `quote`: placeholders become ordinary text."""
        if self._renamed is None:
            from specforge_lite.data.quoting import RenamedTokenizer

            self._renamed = RenamedTokenizer(self._spec.tokenizer_json, self._names)
        ids, offsets, renamed = self._renamed.encode(rendering)
        return ids, self._mask(ids, offsets, renamed)

    def _mask(self, ids: np.ndarray, offsets: list[tuple[int, int]], rendering: Rendering) -> np.ndarray:
        bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        swallows = np.isin(ids, self._rstrip)
        bounds[swallows, 1] = bounds[swallows, 0] + 1
        swallows = np.isin(ids, self._lstrip)
        bounds[swallows, 0] = bounds[swallows, 1] - 1
        return token_mask(bounds, rendering)


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches the first of these texts, nothing where there are none."""
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """`function` of every string in nested lists and dicts, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {map_strings(key, function): map_strings(item, function) for key, item in value.items()}
    return [map_strings(item, function) for item in value] if isinstance(value, list) else value


def token_mask(bounds: np.ndarray, rendering: Rendering) -> np.ndarray:
    """Loss mask [L] bool from character bounds [L, 2] of tokens: which overlap a trained span. A token of no width
    (a prepended space) belongs to the character it stands before."""
    edges = np.zeros(len(rendering.text) + 2, dtype=np.int32)
    for start, end in rendering.spans:
        edges[start] += 1
        edges[end] -= 1
    trained = np.cumsum(edges)
    before = np.concatenate([[0], np.cumsum(trained)])  # before[i]: trained characters among the first i
    first, last = bounds[:, 0], np.maximum(bounds[:, 1], bounds[:, 0] + 1)
    mask: np.ndarray = before[last] - before[first] > 0
    return mask


def clean(text: str) -> str:
    """Replace the few noncharacters this module reserves (U+FDD0..6) by U+FFFD, as Unicode advises."""
    return RESERVED.sub("\ufffd", text) if RESERVED.search(text) else text
