"""Reading the JSON of `compare_generation.py --output`, the result of decoding some prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from specforge_lite.core.errors import DataError, suggest
from specforge_lite.evaluation.compare_generation import Decoding, Sample


def read_decoding(values: Mapping[str, Any], source: str = "decoding") -> Decoding:
    """Read what `Decoding.to_dict` gave. Raises DataError for a key or a value that cannot be, naming it."""
    _check_keys(Decoding, values, source)
    samples = tuple(_sample(item, f"{source}: samples[{i}]") for i, item in enumerate(values.get("samples") or ()))
    shares = tuple(_numbers(values.get("accepted_per_position") or (), f"{source}: accepted_per_position"))
    known = {key: value for key, value in values.items() if key not in ("samples", "accepted_per_position")}
    for key, value in known.items():
        if key != "settings" and value is not None and not _is_number(value):
            raise DataError(f"{source}: {key}: expected a number, found {value!r}")
    return Decoding(**known, accepted_per_position=shares, samples=samples)


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
