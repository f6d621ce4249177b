"""Every checkpoint of a run evaluated on the same data: one curve, the best marked, what is done not done again.

    RUN_DIR/evaluation/checkpoints.json    settings, one entry per checkpoint, the best; written after each checkpoint
    RUN_DIR/evaluation/checkpoints.png     the same as curves

Our `step_N` and EAGLE's `state_N` (epochs) are both found. An entry is kept as long as the settings are the same and
the checkpoint's weights are those that were evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specforge_lite.checkpoints.compat.eagle_state import describe_state, epoch_of, state_directories
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.checkpoints.training_run import MANIFEST, STEP_NAME, checkpoints, verify_checkpoint
from specforge_lite.core.errors import CheckpointError, DataError
from specforge_lite.core.log import info, warn
from specforge_lite.core.sections import MeasureSection
from specforge_lite.evaluation.run import TargetFiles, save_results
from specforge_lite.model.draft import Draft

# metric -> +1 where more is better, -1 where less is
METRICS = {"tau_walk": 1, "tau_chain": 1, "tau_sampling": 1, "accuracy": 1, "loss": -1}
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

    def load(self, files: TargetFiles, draft_config: Path | None) -> Draft:
        """The draft in fp32 on the target's device."""
        config_file = draft_config if self.is_state else None
        return load_draft(self.path, files.config, torch.float32, files.device, config_file)


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


class CheckpointResults:
    """checkpoints.json: read at the start, written after each checkpoint."""

    def __init__(self, path: Path, settings: dict[str, Any], metric: str) -> None:
        self.path, self.settings, self.metric = path, settings, metric
        self.entries: list[dict[str, Any]] = []
        self._earlier = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            same = values["format"] == FORMAT and values["settings"] == self.settings
            entries = {entry["name"]: entry for entry in values["checkpoints"]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{self.path}: not a file of evaluate_checkpoints.py: {error}; delete it") from None
        if not same:
            info(f"{self.path}: of other settings or data; evaluating all checkpoints again")
        return entries if same else {}

    def take_earlier(self, checkpoint: Checkpoint) -> bool:
        """True if this checkpoint was evaluated before; its entry is kept."""
        entry = self._earlier.get(checkpoint.name)
        if entry is None or entry["identity"] != checkpoint.identity():
            return False
        self.entries.append(entry)
        return True

    def add(self, checkpoint: Checkpoint, result: dict[str, Any]) -> None:
        """Keep a new result and write the file."""
        key = "epoch" if checkpoint.is_state else "step"
        entry = {"name": checkpoint.name, key: checkpoint.number, "identity": checkpoint.identity(), **result}
        self.entries.append(entry)
        self.write()

    def write(self) -> None:
        """Write what is known so far, and entries not reached yet of the earlier file."""
        names = {entry["name"] for entry in self.entries}
        later = [entry for name, entry in self._earlier.items() if name not in names]
        best = best_entry(self.entries, self.metric)
        values = {
            "format": FORMAT,
            "metric": self.metric,
            "best": best["name"] if best else None,
            "settings": self.settings,
            "checkpoints": [*self.entries, *later],
        }
        save_results(self.path, values)

    def finish(self) -> None:
        """Forget entries of checkpoints that are gone, and write."""
        self._earlier = {}
        self.write()


def metric_of(entry: dict[str, Any], metric: str) -> float:
    """Value to compare by; of accuracy and loss, position 0."""
    value = entry[metric]
    return float(value[0] if isinstance(value, list) else value)


def best_entry(entries: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best entry; of equals the earliest."""
    sign = METRICS[metric]
    return max(entries, key=lambda entry: sign * metric_of(entry, metric), default=None)


def settings_of(measure: MeasureSection, target: str, data: str, fingerprint: str) -> dict[str, Any]:
    """What results depend on besides the checkpoint."""
    values = measure.model_dump(mode="json", exclude={"device"})
    keep = ("ttt_length", "chain_length", "batch_size", "eval_max_samples")
    return {**{name: values[name] for name in keep}, "target": target, "data": data, "data_fingerprint": fingerprint}
