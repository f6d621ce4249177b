"""Curves of a run, from its metrics.jsonl or a wandb export; training_curves.png shows all of them.

wandb's history is read as CSV (`run.history().to_csv`, or the "CSV export" of a chart, whose columns are called
`RUN - METRIC`) and as JSON (a list of rows, one row per line, or columns as pandas writes them). Known are the names of
our trackers, of EAGLE (`train/ploss_0`, `train/epochacc_0`, `train/lr`) and of SpecForge.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.core.jsonl import read_jsonl
from specforge_lite.report.figures import Curve, plot_panels
from specforge_lite.training.reporting import METRICS_FILE

PANELS = {
    "step_loss": "loss by position",
    "accuracy": "accuracy by position",
    "loss": "loss",
    "acceptance": "estimated acceptance length",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}
STEP_NAMES = ("step", "_step", "global_step", "trainer/global_step", "train/global_step")
_HELD_OUT = ("eval", "test", "val", "valid", "validation")
# (pattern of the name behind `train/` or `eval/`, panel); a number in it is the position
_NAMES = (
    (re.compile(r"(?:epoch)?(?:p?loss|step_loss(?:es)?)[_/](\d+)"), "step_loss"),
    (re.compile(r"(?:epoch)?(?:acc|accuracy|accuracies)[_/](\d+)"), "accuracy"),
    (re.compile(r"(?:epoch)?(?:acc|top_1_acc|accuracy)"), "accuracy"),
    (re.compile(r"(?:epoch)?[pv]?loss"), "loss"),
    (re.compile(r"tau(?:_\w+)?|acc_len|acceptance_length"), "acceptance"),
    (re.compile(r"lr|learning_rate"), "learning_rate"),
    (re.compile(r"grad_norm"), "grad_norm"),
)

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Rows of a run's directory, a metrics.jsonl, or a wandb export (.csv, .json, .jsonl). Raises DataError."""
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.exists():
        raise DataError(f"{path}: no such file; expected a run's directory, metrics.jsonl or a wandb export")
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.suffix.lower() != ".json":
        return read_jsonl(path, last_may_be_cut=True)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from None
    except ValueError:
        return read_jsonl(path)  # names the line
    return _rows_of_json(path, value)


def _read_csv(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [dict(row) for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file: {error}") from None
    for number, row in enumerate(rows, 2):
        if None in row:
            raise DataError(f"{path}:{number}: more values than the header has names")
    return rows


def _rows_of_json(path: Path, value: Any) -> list[Row]:
    """A list of rows; {"column": {"0": value}} and {"column": [values]} as pandas writes a frame."""
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return value
    if isinstance(value, dict) and value and all(isinstance(column, (dict, list)) for column in value.values()):
        columns = {
            name: column if isinstance(column, dict) else dict(enumerate(column)) for name, column in value.items()
        }
        keys = list(dict.fromkeys(key for column in columns.values() for key in column))
        return [{name: column.get(key) for name, column in columns.items()} for key in keys]
    raise DataError(f"{path}: expected a list of rows or columns of values, found {type(value).__name__}")


def curves_of(rows: Iterable[Row], source: str) -> list[Curve]:
    """All known metrics of the rows as curves. Raises DataError naming the columns when none is known."""
    curves: dict[str, Curve] = {}
    unknown: set[str] = set()
    for index, row in enumerate(rows):
        flat = _flatten(row)
        step = next((flat[name] for name in flat if name.lower() in STEP_NAMES), float(index))
        for name, value in flat.items():
            if name.lower() in STEP_NAMES:
                continue
            if name not in curves:
                curve = recognise(name)
                if curve is None:
                    unknown.add(name)
                    continue
                curves[name] = curve
            curves[name].x.append(step)
            curves[name].y.append(value)
    if not curves:
        names = ", ".join(sorted(unknown)[:10]) or "none"
        raise DataError(f"{source}: no loss, accuracy or learning rate found; numbers found: {names}")
    return sorted(curves.values(), key=lambda curve: (list(PANELS).index(curve.panel), curve.position or 0))


def _flatten(row: Row) -> dict[str, float]:
    """Finite numbers by name; lists become `name/0`, `name/1`, ... as our trackers send them."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        items = {f"{name}/{k}": item for k, item in enumerate(value)} if isinstance(value, list) else {name: value}
        for key, item in items.items():
            number = _number(item)
            if number is not None and key is not None:
                flat[key] = number
    return flat


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def recognise(column: str) -> Curve | None:
    """The curve that a column belongs to; None for other columns, and for the borders (`__MIN`) of a chart's export.

    >>> recognise("my run - train/ploss_3").position
    3
    """
    if column.endswith(("__MIN", "__MAX")):
        return None
    run, dash, metric = column.rpartition(" - ")
    group, slash, name = metric.partition("/")
    held_out = slash == "/" and group.lower() in _HELD_OUT
    if not held_out and not (slash == "/" and group.lower() in ("train", "training")):
        name = metric
    for pattern, panel in _NAMES:
        if match := pattern.fullmatch(name.lower()):
            number = next((int(text) for text in match.groups() if text), None)
            label = f"position {number}" if number is not None else name
            if "epoch" in name:
                label += " (epoch)"
            label = f"{group} {label}" if held_out else label
            return Curve(f"{run}: {label}" if dash else label, panel, number, held_out or "epoch" in name)
    return None


def plot_curves(curves: list[Curve], path: Path, title: str) -> None:
    """One panel per kind of metric that is there; training as lines, held-out and per epoch as dots on dashes."""
    panels = [(name, [curve for curve in curves if curve.panel == panel]) for panel, name in PANELS.items()]
    plot_panels(path, title, [panel for panel in panels if panel[1]], "step")
