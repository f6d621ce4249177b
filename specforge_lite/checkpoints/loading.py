"""`load_draft`: a draft network from whatever a draft may be stored as.

an exported directory, SafeAILab's or SpecForge's, speculators', or the name of one on the hub
a training checkpoint `step_N`, or a run's output directory: its newest complete one
EAGLE's `state_N` (the directory or its pytorch_model.bin), or the directory that holds some: the newest
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specforge_lite.checkpoints.draft_files import (
    DraftFiles,
    canonical_weights,
    check_weights,
    draft_config_of,
    read_tensors,
    vocabulary_of,
)
from specforge_lite.checkpoints.training_run import (
    TRAINING_CONFIG,
    TRAINING_WEIGHTS,
    checkpoints,
    newest_complete,
    read_config,
    read_safetensors,
)
from specforge_lite.core.errors import CheckpointError
from specforge_lite.core.hub import local_directory
from specforge_lite.core.log import info
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.registry import build_draft

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.bin")
NUMBERED = re.compile(r"(?:state|epoch)_(\d+)(?:_step_(\d+))?")


def find_draft(path: str | Path) -> Path:
    """The directory that `path` means; see the top of this file. Raises CheckpointError or ConfigError."""
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        if not HUB_NAME.fullmatch(str(path)):
            raise CheckpointError(f"{folder}: no such directory")
        folder = local_directory(str(path), "draft_model_path", HUB_FILES)
    if (folder / TRAINING_CONFIG).exists() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return folder
    newest = newest_complete(folder) if checkpoints(folder) else None
    if newest is None:
        numbered = [(match, child) for child in folder.iterdir() if (match := NUMBERED.fullmatch(child.name))]
        numbered.sort(key=lambda item: tuple(int(number or 0) for number in item[0].groups()))
        newest = numbered[-1][1] if numbered else None
    if newest is None:
        return folder
    info(f"{folder}: the output of a training run; taking {newest.name}")
    return newest


def read_draft_files(path: str | Path, config_file: Path | None = None) -> DraftFiles:
    """Read config and all tensors of a draft; raises CheckpointError or ConfigError naming the file.

    config_file: config.json of a `state_N`; default: beside it or in its parent, else its shapes speak for themselves.
    """
    folder = find_draft(path)
    if (folder / TRAINING_CONFIG).exists():
        values = read_config(folder / TRAINING_CONFIG)
        return DraftFiles(folder, values, read_safetensors([folder / TRAINING_WEIGHTS]), TRAINING_WEIGHTS, False)
    if NUMBERED.fullmatch(folder.name) and (folder.name.startswith("state_") or not (folder / "config.json").exists()):
        from specforge_lite.checkpoints.compat.eagle_state import read_state_files

        return read_state_files(folder, config_file)
    raw = read_config(config_file or folder / "config.json")
    tensors, weight_file = read_tensors(folder)
    if "speculators_model_type" in raw:
        from specforge_lite.checkpoints.compat.speculators import flatten_config

        return DraftFiles(folder, flatten_config(raw), tensors, weight_file, True)
    return DraftFiles(folder, raw, tensors, weight_file, False)


def load_draft(
    path: str | Path,
    target: Any | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config_file: Path | None = None,
) -> Draft:
    """Build the draft that `path` means with its weights, frozen and in evaluation mode.

    target: the target's transformers config, for what the draft's config.json leaves open; dtype: None keeps what is
    stored; config_file: config.json of a `state_N`. Raises CheckpointError for a missing, unknown or misshapen tensor,
    ConfigError for config.json.
    """
    files = read_draft_files(path, config_file)
    config = draft_config_of(files, target)
    weights = canonical_weights(files, config)
    d2t, t2d = vocabulary_of(files, config)
    draft = _build(config, files, d2t, t2d, set(weights))
    _add_biases(draft, weights)
    check_weights(files, weights, dict(draft.named_parameters()), config.algorithm, "config.json makes it")
    draft.load_state_dict(weights, strict=False, assign=True)
    stored = next(weight.dtype for weight in weights.values())
    return draft.to(device=device, dtype=dtype or stored).eval().requires_grad_(False)


def _build(config: DraftConfig, files: DraftFiles, d2t: Tensor, t2d: Tensor, names: set[str]) -> Draft:
    if config.algorithm == "eagle3":
        from specforge_lite.checkpoints.compat.speculators import SpeculatorsEagle3, layer_changes_of

        changes = layer_changes_of(files.config, names)
        if changes.any():
            return SpeculatorsEagle3(config, d2t, t2d, changes)
    return build_draft(config, d2t, t2d)


def _add_biases(draft: Draft, weights: dict[str, Tensor]) -> None:
    """Linear layers get a bias where the checkpoint has one (SafeAILab's EAGLE-1 fc, Qwen2 attention)."""
    modules = dict(draft.named_modules())
    for name in weights:
        layer = modules.get(name.removesuffix(".bias"))
        if name.endswith(".bias") and isinstance(layer, nn.Linear) and layer.bias is None:
            layer.bias = nn.Parameter(torch.empty(layer.out_features))
