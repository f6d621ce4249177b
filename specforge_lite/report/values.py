"""What a report can be given besides files: the result of decoding some prompts, as a value or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from specforge_lite.core.errors import DataError, suggest


@dataclass(frozen=True)
class Sample:
    """One generation. `token_texts` joined are the answer; `tokens_per_pass` tells how many of them each verification
    pass of the target gave (the last one of a pass is the target's own, the others were drafted)."""

    prompt: str
    token_texts: tuple[str, ...]
    tokens_per_pass: tuple[int, ...]
    category: str = ""


@dataclass(frozen=True)
class Decoding:
    """Decoding with a draft, and without it where that was done too.

    acceptance_length: tokens per verification pass. accepted_per_position[k]: share of passes whose drafted token k
    (0-based) was accepted. num_passes, num_passes_without: forward passes of the target for `num_tokens` tokens.
    tokens_per_second: with and without the draft. num_identical: prompts whose output is the same without the draft.
    settings: a few words, e.g. "greedy, chains of 5".
    """

    acceptance_length: float
    num_prompts: int
    num_tokens: int = 0
    settings: str = ""
    accepted_per_position: tuple[float, ...] = ()
    num_identical: int | None = None
    num_passes: int | None = None
    num_passes_without: int | None = None
    tokens_per_second: float | None = None
    tokens_per_second_without: float | None = None
    samples: tuple[Sample, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "decoding") -> Decoding:
        """Read what `to_dict` wrote. Raises DataError for a key or a value that cannot be, naming it."""
        _check_keys(cls, values, source)
        samples = tuple(_sample(item, f"{source}: samples[{i}]") for i, item in enumerate(values.get("samples") or ()))
        shares = tuple(_numbers(values.get("accepted_per_position") or (), f"{source}: accepted_per_position"))
        known = {key: value for key, value in values.items() if key not in ("samples", "accepted_per_position")}
        for key, value in known.items():
            if key != "settings" and value is not None and not _is_number(value):
                raise DataError(f"{source}: {key}: expected a number, found {value!r}")
        return cls(**known, accepted_per_position=shares, samples=samples)


def _sample(values: Any, source: str) -> Sample:
    if not isinstance(values, Mapping):
        raise DataError(f"{source}: expected an object, found {type(values).__name__}")
    _check_keys(Sample, values, source)
    texts, counts = values["token_texts"], values["tokens_per_pass"]
    if not _is_list(texts) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{source}: token_texts: expected a list of texts")
    numbers = [int(n) for n in _numbers(counts, f"{source}: tokens_per_pass")]
    if sum(numbers) < len(texts):
        raise DataError(f"{source}: {len(texts)} tokens, but tokens_per_pass adds up to {sum(numbers)}")
    return Sample(str(values["prompt"]), tuple(texts), tuple(numbers), str(values.get("category", "")))


def _check_keys(cls: type, values: Mapping[str, Any], source: str) -> None:
    names = [field.name for field in fields(cls)]
    for key in values:
        if key not in names:
            raise DataError(f"{source}: unknown key '{key}'{suggest(str(key), names)}")
    needed = ("acceptance_length", "num_prompts") if cls is Decoding else ("prompt", "token_texts", "tokens_per_pass")
    for key in needed:
        if values.get(key) is None:
            raise DataError(f"{source}: '{key}' is missing")


def _numbers(values: Any, source: str) -> list[float]:
    if not _is_list(values) or not all(_is_number(value) for value in values):
        raise DataError(f"{source}: expected a list of numbers")
    return list(values)


def _is_list(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
