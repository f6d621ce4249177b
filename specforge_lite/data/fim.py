"""Fill-in-the-middle rows `{prefix, middle, suffix}`, and the tokens each family of code models puts around them.

Orders (Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", section 3):

    PSM   <prefix> P <suffix> S <middle> M <end>      every family; the default
    SPM   <prefix> <suffix> S <middle> P M <end>      families that were trained on it

The loss is on M and its end token only. P, S and M are tokenized apart, as they are when a server is asked for M; a
control token inside code stays ordinary text. When a row is too long its context is cut, never its middle.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specforge_lite.core.errors import DataError
from specforge_lite.data.conversations import CUT_OFF, ID_KEYS, RowRejected, clean_text, is_fim_row
from specforge_lite.data.encoding import Rendering, TextEncoder, TokenizerSpec
from specforge_lite.data.tokenize import ONE_FORMAT, TOKENIZATION_VERSION, RowTokenizer, TokenizeOptions, TokenRow


@dataclass(frozen=True)
class FimRow:
    """One hole in one file. source: the file's name; rows of one file never come into both halves of a split. cut_off:
    a token limit ended the middle (`finish_reason` "length"), so no end token follows it."""

    id: str
    prefix: str
    middle: str
    suffix: str
    source: str = ""
    cut_off: bool = False

    def to_row(self) -> dict[str, Any]:
        """The normal form, ready for `json.dumps`."""
        row = {"id": self.id, "prefix": self.prefix, "middle": self.middle, "suffix": self.suffix}
        row |= {"source": self.source} if self.source else {}
        return row | ({"finish_reason": "length"} if self.cut_off else {})

    @property
    def content_digest(self) -> str:
        """Hash of the code (not of the id)."""
        return hashlib.sha256(json.dumps([self.prefix, self.middle, self.suffix]).encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class FimFamily:
    """Tokens of a family. end: the first of these in the vocabulary. bos: token in front, where the models expect
    one. orders: what the family was trained on."""

    name: str
    prefix: str
    suffix: str
    middle: str
    end: tuple[str, ...]
    bos: str | None = None
    orders: tuple[str, ...] = ("psm",)


# Sources: README of Qwen2.5-Coder, bigcode/starcoder2, DeepSeek-Coder ("Code Insertion"); codellama `generation.py`,
# `infilling_prompt_tokens`, which also tokenizes prefix and suffix without a space in front.
_BOTH = ("psm", "spm")
FAMILIES: dict[str, FimFamily] = {
    family.name: family
    for family in (
        FimFamily("qwen2.5-coder", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ("<|endoftext|>",)),
        FimFamily("starcoder2", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>",), orders=_BOTH),
        FimFamily(
            "deepseek-coder", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>",
            ("<｜end▁of▁sentence｜>", "<|EOT|>"), bos="<｜begin▁of▁sentence｜>",
        ),
        FimFamily("codellama", "▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",), bos="<s>", orders=_BOTH),
    )
}  # fmt: skip


def recognise_family(vocabulary: Mapping[str, int]) -> FimFamily:
    """The family whose three tokens and end token are in the vocabulary; DataError if there is none."""
    for family in FAMILIES.values():
        needed = (family.prefix, family.suffix, family.middle)
        if all(token in vocabulary for token in needed) and any(token in vocabulary for token in family.end):
            return family
    raise DataError(f"the tokenizer has no fill-in-the-middle tokens; known families: {', '.join(FAMILIES)}")


def to_fim_row(row: Any) -> FimRow:
    """Recognise one row. Raises RowRejected."""
    if not is_fim_row(row):
        raise RowRejected("unknown-form", "expected an object with prefix, middle and suffix")
    names = ("prefix", "middle", "suffix") if "prefix" in row else ("prompt", "canonical_solution", "suffix")
    for name in names:
        if not isinstance(row.get(name), str):
            raise RowRejected("content-not-text", f"'{name}': expected text, found {type(row.get(name)).__name__}")
    prefix, middle, suffix = (clean_text(row[name]) for name in names)
    if not middle.strip():
        raise RowRejected("empty-middle", "the middle is empty")
    given = next((str(row[key]) for key in ID_KEYS if isinstance(row.get(key), (str, int))), "")
    source = row["source"] if isinstance(row.get("source"), str) else ""
    cut_off = row.get("finish_reason") in CUT_OFF
    hole = FimRow(clean_text(given), prefix, middle, suffix, clean_text(source), cut_off)
    return hole if hole.id else replace(hole, id=hole.content_digest[:16])


class FimTokenizer:
    """Tokenizes FIM rows of one tokenizer in one order: psm, spm, or a literal text with {prefix} and {suffix} (and
    {middle}, if anything, where it ends), for models that were trained on another form.

    layout: ids that stand in the context, and the names of the texts between them. end_token_ids: what may end a
    middle; the first is trained. Raises DataError if the tokenizer has no family, or not that order.
    """

    def __init__(self, spec: TokenizerSpec, order: str, max_length: int) -> None:
        ids, is_literal = spec.vocabulary, order not in ("psm", "spm")
        pieces = _literal_pieces(order) if is_literal else []
        try:
            family: FimFamily | None = recognise_family(ids)
        except DataError:
            if not is_literal:
                raise
            family = None
        controls = (family.prefix, family.suffix, family.middle) if family else ()
        written = [token for token in spec.added_tokens if token in order]
        self._encoder = TextEncoder(without_prefix_space(spec), (*controls, *written))
        ends = [*(family.end if family else ()), dict(spec.special_tokens).get("eos_token", "")]
        self.end_token_ids = list(dict.fromkeys(ids[token] for token in ends if token in ids))
        if not self.end_token_ids:
            raise DataError(f"fim_order {order}: the tokenizer has no end-of-text token to end a middle with")
        self._max_length = max_length
        if family is None or is_literal:
            self.layout: list[list[int] | str] = [
                piece[1:-1] if piece in _TEXTS else self._encoder.encode(Rendering(piece, ()))[0].tolist()
                for piece in pieces
            ]
            self.name = f"fim-literal-{order}"
            return
        if order not in family.orders:
            known = " and ".join(family.orders)
            raise DataError(f"fim_order {order}: {family.name} models know {known} only, or give a literal text")
        begin, hole, end = (ids[token] for token in controls)
        bos = [ids[family.bos]] if family.bos is not None and family.bos in ids else []
        psm: list[list[int] | str] = [[*bos, begin], "prefix", [hole], "suffix", [end]]
        self.layout = psm if order == "psm" else [[*bos, begin, hole], "suffix", [end], "prefix"]
        self.name = f"fim-{family.name}-{order}"

    def __call__(self, row: FimRow) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids [L] int32, loss mask [L] bool, and how many tokens of context (or of a huge middle) were cut."""
        prefix, suffix, middle = (self._ids(text).tolist() for text in (row.prefix, row.suffix, row.middle))
        answer = middle if row.cut_off else [*middle, self.end_token_ids[0]]
        room = self._max_length - sum(len(part) for part in self.layout if isinstance(part, list)) - len(answer)
        num_cut = max(0, len(prefix) + len(suffix) - max(room, 0)) + max(0, -room)
        if room < 0:
            answer = answer[:room]
        keep_suffix = min(len(suffix), max(room - len(prefix), room // 2, 0))
        keep_prefix = min(len(prefix), max(room - keep_suffix, 0))
        texts = {"prefix": prefix[len(prefix) - keep_prefix :], "suffix": suffix[:keep_suffix]}
        context = [token for part in self.layout for token in (texts[part] if isinstance(part, str) else part)]
        ids = np.array(context + answer, dtype=np.int32)
        return ids, np.arange(len(ids)) >= len(context), num_cut

    def _ids(self, text: str) -> np.ndarray:
        """Ids [L] int32 of a text by itself; control tokens in it stay ordinary text."""
        quoted = self._encoder.quote(text)
        encode = self._encoder.encode if quoted == text else self._encoder.encode_quoted
        return encode(Rendering(quoted, ()))[0]


_TEXTS = ("{prefix}", "{suffix}")


def _literal_pieces(order: str) -> list[str]:
    """A literal text cut at {prefix} and {suffix}, each of which it has once."""
    pieces = [piece for piece in re.split(r"(\{prefix\}|\{suffix\})", order.removesuffix("{middle}")) if piece]
    if sorted(piece for piece in pieces if piece in _TEXTS) != [*_TEXTS] or "{middle}" in "".join(pieces):
        raise DataError(f"fim_order {order}: expected psm, spm, or a text with {{prefix}} and {{suffix}}, once each")
    return pieces


def without_prefix_space(spec: TokenizerSpec) -> TokenizerSpec:
    """The same tokenizer, but one that puts no space before a text (a piece of code is not a new sentence)."""
    description = json.loads(spec.tokenizer_json)
    for part in ("normalizer", "pre_tokenizer"):
        description[part] = _without_prepend(description.get(part))
    return replace(spec, tokenizer_json=json.dumps(description))


def _without_prepend(part: Any) -> Any:
    """A normalizer or pre-tokenizer of a tokenizer.json that does not prepend anything."""
    if isinstance(part, list):
        return [inner for inner in map(_without_prepend, part) if inner is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: never[key] if key in never else _without_prepend(value) for key, value in part.items()}


class FimRowTokenizer(RowTokenizer):
    """Parsed FIM row -> TokenRow."""

    def __init__(self, spec: TokenizerSpec, options: TokenizeOptions) -> None:
        self._arguments = (spec, options)
        self._fim = FimTokenizer(spec, options.fim_order, options.max_length)

    def key(self) -> dict[str, Any]:
        spec, options = self._arguments
        key = {"version": TOKENIZATION_VERSION, "format": "fim", "tokenizer": spec.fingerprint}
        content = {"template": self._fim.name, "template_content": self._fim.layout}
        return {**key, **content, "max_length": options.max_length}

    def __call__(self, value: Any) -> TokenRow:
        if not is_fim_row(value):
            raise RowRejected("mixed-formats", f"a chat row in a file of FIM rows; {ONE_FORMAT}")
        row = to_fim_row(value)
        return TokenRow(row.id, *self._fim(row))
