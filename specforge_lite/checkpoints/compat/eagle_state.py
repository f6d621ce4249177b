"""EAGLE's own training checkpoints, `state_N`, written at the end of epoch N (0-based).

    accelerate (EAGLE-1)   pytorch_model.bin or model.safetensors, optimizer.bin, scheduler.bin, random_states_R.pkl
    DeepSpeed (EAGLE-3)    pytorch_model.bin of `save_16bit_model`; beside it, now and then, sharded states

There is no config.json in them: it is taken from the run's directory or a given file, else the shape is read off the
tensors and the target. Only plain tensors are loaded (`weights_only`); the pickled random states are not.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.checkpoints.draft_files import (
    DraftFiles,
    canonical_name,
    flatten_config,
    read_config,
    read_tensors,
)
from specforge_lite.checkpoints.loading import draft_of_files
from specforge_lite.core.errors import CheckpointError
from specforge_lite.model.draft import Draft, DraftConfig

STATE_NAME = re.compile(r"state_(\d+)")
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError)
NOT_THE_DRAFTS = ("target_model.", "base_model.")


def state_directories(run_dir: Path) -> list[Path]:
    """All `state_N` of a directory, newest first."""
    if not run_dir.is_dir():
        return []
    found = [(int(m.group(1)), path) for path in run_dir.iterdir() if (m := STATE_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def epoch_of(state: Path) -> int:
    """N of `state_N`."""
    match = STATE_NAME.fullmatch(state.name)
    if match is None:
        raise CheckpointError(f"{state}: expected a directory named state_N, as EAGLE writes them")
    return int(match.group(1))


def read_state_files(state: Path, target_config: Any, config_file: Path | None = None) -> DraftFiles:
    """A `state_N` as the files of a draft. Raises CheckpointError naming the file.

    target_config: the target's transformers config; used where no config.json is found. Tensors keep their order in
    the file, which is that of the model's parameters.
    """
    if not any(state.glob("*.safetensors")) and not any(state.glob("pytorch_model*.bin")):
        sharded = (state / "zero_to_fp32.py").exists() or any(state.glob("**/*_states.pt"))
        hint = "; it holds DeepSpeed shards: run its zero_to_fp32.py, which makes pytorch_model.bin" if sharded else ""
        raise CheckpointError(f"{state}: no weights here; expected pytorch_model.bin or model.safetensors{hint}")
    raw, weight_file = read_tensors(state)
    tensors = {name.removeprefix("module."): tensor for name, tensor in raw.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_THE_DRAFTS)}
    candidates = [config_file] if config_file is not None else [state, state.parent]
    for place in candidates:
        file = place / "config.json" if place.is_dir() else place
        if file.exists() and _is_draft_config(file, required=config_file is not None):
            return DraftFiles(state, flatten_config(read_config(file)), tensors, weight_file, False)
    return DraftFiles(state, config_from_tensors(state, tensors, target_config), tensors, weight_file, False)


def _is_draft_config(file: Path, required: bool) -> bool:
    """Our own runs' config.json (sections of settings) may lie in the same place."""
    return required or "hidden_size" in read_config(file)


def config_from_tensors(state: Path, tensors: dict[str, Tensor], target_config: Any) -> dict[str, Any]:
    """The draft's config as the tensors' shapes and the target tell it."""
    algorithm = "eagle3" if any("hidden_norm" in name for name in tensors) else "eagle1"
    named = {canonical_name(name, algorithm): tensor for name, tensor in tensors.items()}
    layer = "midlayer." if algorithm == "eagle3" else "layers.0."
    try:
        gate, key, query = (named[f"{layer}{part}_proj.weight"] for part in ("mlp.gate", "self_attn.k", "self_attn.q"))
        draft_vocab_size = len(named["lm_head.weight"]) if algorithm == "eagle3" else None
    except KeyError as error:
        raise CheckpointError(f"{state}: {error.args[0]} is missing: not the state of an EAGLE draft") from None
    config = DraftConfig.from_target(target_config, draft_vocab_size, algorithm)
    head_dim = len(query) // config.num_attention_heads
    changed = config.replace(
        intermediate_size=len(gate), head_dim=head_dim, num_key_value_heads=len(key) // head_dim
    ).to_dict()
    changed.pop("target_hidden_size")  # read off fc
    return changed


def load_state_draft(
    state: Path,
    target_config: Any,
    config_file: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Draft:
    """The draft of a `state_N`, frozen, in evaluation mode."""
    num_layers = int(target_config.get_text_config().num_hidden_layers)
    return draft_of_files(read_state_files(state, target_config, config_file), num_layers, dtype, device)


def optimizer_moments(state: Path, files: DraftFiles, algorithm: str) -> tuple[dict[str, dict[str, Tensor]], str]:
    """(name -> exp_avg, exp_avg_sq, step; why there are none) from accelerate's optimizer.bin.

    AdamW's state is numbered in the order of the model's parameters, which is that of pytorch_model.bin; safetensors
    files are sorted otherwise, so with them nothing can be told.
    """
    file = state / "optimizer.bin"
    if not file.exists():
        return {}, "no optimizer.bin"
    if files.weight_file.endswith(".safetensors"):
        return {}, "model.safetensors has lost the order that optimizer.bin counts by"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        moments = saved["state"]
    except UNREADABLE as error:  # whatever a foreign file holds: the draft's weights are good without it
        return {}, f"optimizer.bin: {type(error).__name__}: {str(error).splitlines()[0]}"
    names = [name for name in files.tensors if name not in ("d2t", "t2d") and "rotary_emb" not in name]
    if len(names) != len(numbers):  # a frozen embedding table may not have been given to the optimizer
        names = [name for name in names if name != "embed_tokens.weight"]
    if len(names) != len(numbers):
        return {}, f"optimizer.bin counts {len(numbers)} parameters, pytorch_model.bin {len(names)}"
    found = {canonical_name(name, algorithm): moments.get(number) for name, number in zip(names, numbers)}
    kept = {name: values for name, values in found.items() if values}
    for name, values in kept.items():
        shape = next(t.shape for raw, t in files.tensors.items() if canonical_name(raw, algorithm) == name)
        if any(kind not in values or values[kind].shape != shape for kind in ("exp_avg", "exp_avg_sq")):
            return {}, f"optimizer.bin: the state of {name} is not AdamW's, or of another shape"
    return kept, ""


def describe_state(state: Path) -> str:
    """Weight file and size as an identity, for results that outlive the files."""
    files = sorted([*state.glob("*.safetensors"), *state.glob("pytorch_model*.bin")])
    return json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
