"""Reading the files a report is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError

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
    numbered = [path for path in directory.glob(f"step_*/{PROVENANCE_FILE}") if _step(path) is not None]
    provenance = max(numbered, key=lambda path: _step(path) or 0, default=None)
    if not metrics.exists() and provenance is None:
        raise DataError(f"{directory}: neither {METRICS_FILE} nor step_N/{PROVENANCE_FILE}; is it a training run's?")
    return RunFiles(metrics if metrics.exists() else None, provenance)


def _step(path: Path) -> int | None:
    number = path.parent.name.removeprefix("step_")
    return int(number) if number.isdigit() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises DataError naming the place of a mistake."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path: Path, last_may_be_cut: bool = False) -> list[dict[str, Any]]:
    """One JSON object per line; `last_may_be_cut`: leave out a half-written last line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
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
