"""Every checkpoint of a run evaluated on the same data: one curve, the best marked, what is done not done again.

    RUN_DIR/evaluation/checkpoints.json    settings, one entry per checkpoint, the best; written after each checkpoint
    RUN_DIR/evaluation/checkpoints.png     the same as curves

Our `step_N` and EAGLE's `state_N` (epochs) are both found. An entry is kept as long as the settings are the same and
the checkpoint's weights are those that were evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_lite.checkpoints.compat.eagle_state import describe_state, epoch_of, state_directories
from specforge_lite.checkpoints.training_run import MANIFEST, STEP_NAME, checkpoints, verify_checkpoint
from specforge_lite.core.errors import CheckpointError, DataError
from specforge_lite.core.log import info, warn
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.evaluation.run import (
    engine_for,
    evaluate_draft,
    open_eval_data,
    open_target_files,
    position_rows,
    save_results,
)
from specforge_lite.evaluation.settings import MeasureSection

# metric -> +1 where more is better, -1 where less is
METRICS = {"tau_walk": 1, "tau_chain": 1, "tau_sampling": 1, "accuracy": 1, "loss": -1, "served": 1}
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run. `number`: optimizer steps of `step_N`, epoch of `state_N`."""

    path: Path
    number: int
    is_state: bool

    @property
    def name(self) -> str:
        return self.path.name

    def identity(self) -> str:
        """Changes when the weights do."""
        if self.is_state:
            return describe_state(self.path)
        manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["files"]["draft.safetensors"]["sha256"])


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All checkpoints, oldest first, EAGLE's before ours; damaged ones are named in a warning and left out.

    Raises CheckpointError where there is nothing to evaluate.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such directory; expected the output directory of a training run")
    if STEP_NAME.fullmatch(run_dir.name) and (run_dir / MANIFEST).exists():
        raise CheckpointError(f"{run_dir}: is one checkpoint; give the run's directory, {run_dir.parent}")
    found = [Checkpoint(path, epoch_of(path), True) for path in reversed(state_directories(run_dir))]
    damaged = 0
    for path in reversed(checkpoints(run_dir)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged += 1
            warn(f"left out: {error}")
        else:
            found.append(Checkpoint(path, int(path.name.removeprefix("step_")), False))
    if not found:
        reason = f"{damaged} checkpoint(s), all damaged" if damaged else "no step_N and no state_N here"
        raise CheckpointError(f"{run_dir}: {reason}; expected the output directory of a training run")
    return found


def run_settings(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Target and data sections of our newest readable checkpoint's config.json; empty for a run of EAGLE."""
    for path in checkpoints(run_dir):
        try:
            values = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return {name: dict(values[name]) for name in ("target", "data")}
        except (OSError, ValueError, LookupError, TypeError):  # a damaged checkpoint; find_checkpoints names it
            continue
    return {}


def evaluate_checkpoints(
    found: Sequence[Checkpoint],
    path: Path,
    target: TargetSection,
    data: DataSection,
    measure: MeasureSection,
    metric: str,
    draft_config: Path | None = None,
    served: Mapping[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Entries of `found`, in their order: those of the file at `path` that still hold, and new ones, each written to it
    when it is known. draft_config: config.json of the drafts in state_N. served: by name, figures of serving, which
    every entry of `found` gets; `served`, the acceptance length, is one. Raises DataError for another file."""
    dataset = open_eval_data(target, data)
    settings = measure.model_dump(include={"ttt_length", "chain_length", "batch_size", "eval_max_samples"})
    settings |= {"target": target.target_model_path, "data": str(data.eval_data_path)}
    results = CheckpointResults(path, metric, {**settings, "data_fingerprint": dataset.fingerprint}, served)
    todo = [checkpoint for checkpoint in found if not results.holds(checkpoint)]
    info(f"{found[0].path.parent}: {len(found)} checkpoints, {len(found) - len(todo)} evaluated before")
    if todo:
        files = open_target_files(target, measure.device)
        drafts = (files.load_draft(c.path, draft_config if c.is_state else None) for c in todo)
        draft = next(drafts)
        with engine_for(draft, target, data, files.device) as engine:
            for place, checkpoint in enumerate(todo):
                draft = next(drafts) if place else draft
                title = f"{checkpoint.name} ({place + 1}/{len(todo)})"
                result = evaluate_draft(draft, files, dataset, engine, measure, title=title)
                results.add(checkpoint, {"positions": position_rows(result), **result.to_dict()})
    results.entries = {checkpoint.name: results.entries[checkpoint.name] for checkpoint in found}
    results.write()  # without entries of checkpoints that are gone
    return list(results.entries.values())


class CheckpointResults:
    """checkpoints.json: read at the start, written after each checkpoint. entries: by name."""

    def __init__(
        self,
        path: Path,
        metric: str,
        settings: dict[str, Any],
        served: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.path, self.metric, self.settings, self.served = path, metric, settings, served or {}
        self.entries: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            same = values["format"] == FORMAT and values["settings"] == settings
            self.entries = {entry["name"]: entry for entry in values["checkpoints"] if same}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}: not a file of evaluate_checkpoints.py: {error}; delete it") from None
        if not same:
            info(f"{path}: of other settings or data; evaluating all checkpoints again")

    def holds(self, checkpoint: Checkpoint) -> bool:
        """True if this checkpoint, with these weights, was evaluated before."""
        return self.entries.get(checkpoint.name, {}).get("identity") == checkpoint.identity()

    def add(self, checkpoint: Checkpoint, result: dict[str, Any]) -> None:
        """Keep a new result and write the file."""
        key = "epoch" if checkpoint.is_state else "step"
        entry = {"name": checkpoint.name, key: checkpoint.number, "identity": checkpoint.identity(), **result}
        self.entries[checkpoint.name] = entry
        self.write()

    def write(self) -> None:
        self.entries = {name: {**entry, **self.served.get(name, {})} for name, entry in self.entries.items()}
        entries = list(self.entries.values())
        best = best_entry([entry for entry in entries if self.metric in entry], self.metric)
        values = {"format": FORMAT, "metric": self.metric, "best": best["name"] if best else None}
        save_results(self.path, {**values, "settings": self.settings, "checkpoints": entries})


def metric_of(entry: dict[str, Any], metric: str) -> float:
    """Value to compare by; of accuracy and loss, position 0."""
    value = entry[metric]
    return float(value[0] if isinstance(value, list) else value)


def best_entry(entries: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best entry; of equals the earliest."""
    sign = METRICS[metric]
    return max(entries, key=lambda entry: sign * metric_of(entry, metric), default=None)
