"""Reading and checking the files a report is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError, suggest
from specforge_lite.evaluation.compare_generation import Decoding, Sample

METRICS_FILE, PROVENANCE_FILE = "metrics.jsonl", "provenance.json"


@dataclass(frozen=True)
class RunFiles:
    """What a training run left; None for what is not there."""

    metrics: Path | None
    provenance: Path | None


def find_run_files(directory: Path) -> RunFiles:
    """The metrics of a run and the provenance of its newest checkpoint. Raises DataError if there is neither."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    metrics = directory / METRICS_FILE
    numbered = [path for path in directory.glob(f"step_*/{PROVENANCE_FILE}") if path.parent.name[5:].isdigit()]
    provenance = max(numbered, key=lambda path: int(path.parent.name[5:]), default=None)
    if not metrics.exists() and provenance is None:
        raise DataError(f"{directory}: neither {METRICS_FILE} nor step_N/{PROVENANCE_FILE}; is it a training run's?")
    return RunFiles(metrics if metrics.exists() else None, provenance)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises DataError naming the place of a mistake."""
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path: Path, last_may_be_cut: bool = False) -> list[dict[str, Any]]:
    """One JSON object per line; `last_may_be_cut`: leave out a half-written last line."""
    lines = _read(path).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if last_may_be_cut and number == len(lines):
                break
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows with a step; the last line may be half written (the run was killed, or is still running)."""
    rows = read_jsonl(path, last_may_be_cut=True)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), (int, float)):
            raise DataError(f"{path}:{number}: expected an object with a number 'step'")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


# ------------------------------------------------------------------------------------------------------------ decoding


def read_decoding(values: Mapping[str, Any], source: str = "decoding") -> Decoding:
    """Read what `Decoding.to_dict` gave. Raises DataError for a key or a value that cannot be, naming it."""
    _check_keys(Decoding, values, source)
    samples = tuple(_sample(item, f"{source}: samples[{i}]") for i, item in enumerate(values.get("samples") or ()))
    shares = tuple(_numbers(values.get("accepted_per_position") or (), f"{source}: accepted_per_position"))
    known = {key: value for key, value in values.items() if key not in ("samples", "accepted_per_position")}
    for key, value in known.items():
        if key != "settings" and value is not None and not is_number(value):
            raise DataError(f"{source}: {key}: expected a number, found {value!r}")
    return Decoding(**known, accepted_per_position=shares, samples=samples)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    if not _is_list(values) or not all(is_number(value) for value in values):
        raise DataError(f"{source}: expected a list of numbers")
    return list(values)


def _is_list(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)
