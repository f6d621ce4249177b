"""Reading and checking the files a report is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from specforge_lite.core.errors import DataError, suggest
from specforge_lite.core.jsonl import read_jsonl
from specforge_lite.evaluation.compare_generation import Decoding, Sample

# pydantic's kind of mistake -> what was expected
EXPECTED = {"float_type": "number", "int_type": "number", "string_type": "text", "dataclass_type": "object"}
METRICS_FILE, PROVENANCE_FILE = "metrics.jsonl", "provenance.json"


class RunFiles(NamedTuple):
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows with a step; the last line may be half written (the run was killed, or is still running)."""
    rows = read_jsonl(path, last_may_be_cut=True)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), (int, float)):
            raise DataError(f"{path}:{number}: expected an object with a number 'step'")
    return rows


def read_decoding(values: Mapping[str, Any], source: str = "decoding") -> Decoding:
    """Read what `Decoding.to_dict` gave. Raises DataError for a key or a value that cannot be, naming it."""
    try:
        return TypeAdapter(Decoding).validate_python({key: v for key, v in values.items() if v is not None})
    except ValidationError as error:  # an unknown key says more than the missing one it was meant for
        mistake = min(error.errors(), key=lambda item: item["type"] != "unexpected_keyword_argument")
    kind, found, *path, last = mistake["type"], mistake["input"], *mistake["loc"]
    if kind == "missing":
        text = f"'{last}' is missing"
    elif kind == "unexpected_keyword_argument":
        known = [field.name for field in fields(Sample if path else Decoding)]
        text = f"unknown key '{last}'{suggest(str(last), known)}"
    elif kind == "value_error":
        path, text = [*path, last], mistake["msg"].removeprefix("Value error, ")
    else:
        word = EXPECTED.get(kind, "list")
        if isinstance(last, int) and word != "object":  # an item of a list
            last, word = path.pop(), f"list of {word}s"
        text = f"{last}: expected a {word}, found {found!r}"
    place = "".join(f"[{part}]" if isinstance(part, int) else f": {part}" for part in path)
    raise DataError(f"{source}{place}: {text}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
