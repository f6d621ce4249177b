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
    algorithm_of,
    canonical_name,
    canonical_weights,
    check_weights,
    read_tensors,
    vocabulary_of,
)
from specforge_lite.checkpoints.training_run import read_config
from specforge_lite.core.errors import CheckpointError
from specforge_lite.core.log import info
from specforge_lite.model.draft import Draft

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


def read_state_files(state: Path, config_file: Path | None = None) -> DraftFiles:
    """A `state_N` as the files of a draft. Raises CheckpointError naming the file.

    Without a config.json the config holds algorithm and width only: other sizes are read off the tensors, the rest is
    the target's (`draft_config_of`). Tensors keep their order in the file, which is that of the model's parameters.
    """
    if not any(state.glob("*.safetensors")) and not any(state.glob("pytorch_model*.bin")):
        sharded = (state / "zero_to_fp32.py").exists() or any(state.glob("**/*_states.pt"))
        hint = "; it holds DeepSpeed shards: run its zero_to_fp32.py, which makes pytorch_model.bin" if sharded else ""
        raise CheckpointError(f"{state}: no weights here; expected pytorch_model.bin or model.safetensors{hint}")
    raw, weight_file = read_tensors(state)
    tensors = {name.removeprefix("module."): tensor for name, tensor in raw.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_THE_DRAFTS)}
    algorithm = algorithm_of({}, list(tensors))
    output = next((tensor for name, tensor in tensors.items() if name.endswith("self_attn.o_proj.weight")), None)
    if output is None:
        raise CheckpointError(f"{state}: self_attn.o_proj.weight is missing: not the state of an EAGLE draft")
    config: dict[str, Any] = {"algorithm": algorithm, "hidden_size": len(output)}
    for file in [config_file] if config_file is not None else [state / "config.json", state.parent / "config.json"]:
        file = file / "config.json" if file.is_dir() else file
        # Our own runs' config.json (sections of settings) may lie in the same place.
        if file.exists() and (config_file is not None or "hidden_size" in read_config(file)):
            config = read_config(file)
            break
    return DraftFiles(state, config, tensors, weight_file, False)


def read_start(state: Path, config_file: Path | None, draft: Draft) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(tensors for the draft, AdamW's steps by parameter) of one `state_N`: trained weights, d2t, t2d, and, unless the
    optimizer starts fresh, exp_avg.NAME and exp_avg_sq.NAME. Raises CheckpointError naming the tensor that does not
    fit."""
    files = read_state_files(state, config_file)
    weights = {name: tensor.float() for name, tensor in canonical_weights(files, draft.config).items()}
    if weights.pop("fc.bias", None) is not None:
        info(f"{state}: fc.bias is left out: vLLM's EAGLE-1 has none, so a draft of ours must learn without it")
    trained: dict[str, Tensor] = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    hint, head = "; give EAGLE's config.json as --draft-model-config", weights.get("lm_head.weight")
    if head is not None and len(head) != draft.config.draft_vocab_size:
        hint += f", or --draft-vocab-size {len(head)}"
    check_weights(files, weights, trained, draft.config.algorithm, "this run's draft", hint)
    moments, reason = optimizer_moments(state, files, draft.config.algorithm)
    if not trained.keys() <= moments.keys():
        info(f"{state}: the optimizer starts fresh: {reason or 'optimizer.bin lacks some parameters'}")
        moments = {}
    moments = {name: values for name, values in moments.items() if name in trained}
    d2t, t2d = vocabulary_of(files, draft.config)
    tensors = {**weights, "d2t": d2t, "t2d": t2d}
    tensors |= {f"{kind}.{name}": v[kind] for name, v in moments.items() for kind in ("exp_avg", "exp_avg_sq")}
    return tensors, {name: float(values["step"]) for name, values in moments.items()}


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
