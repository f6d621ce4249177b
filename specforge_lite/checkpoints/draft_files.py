"""What lies in a draft directory: config.json and weights in any of the layouts in use, told in one set of names.

    ours, SafeAILab/EAGLE, SpecForge   config.json + `midlayer.*` or `layers.0.*`, safetensors or pytorch_model.bin
    speculators                        config.json with `transformer_layer_config`, `layers.0.*`
    a training checkpoint `step_N`     draft_config.json + draft.safetensors

Layer ids. Engines read two keys of config.json and mean different things by them: vLLM prefers the top-level
`eagle_aux_hidden_state_layer_ids` and captures the INPUT of layer i (vllm/v1/worker/gpu_model_runner.py,
`_get_eagle3_aux_layers_from_config`); SGLang reads `eagle_config.eagle_aux_hidden_state_layer_ids` only and captures
the OUTPUT of layer i (sglang/srt/models/llama.py, `set_eagle3_layers_to_capture` adds 1). Our export writes each key in
its reader's convention and `aux_layer_ids` in ours (outputs).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.capture.base import default_aux_layer_ids
from specforge_lite.core.errors import CheckpointError, first_line
from specforge_lite.model.draft import DraftConfig, check_kinds

AUX_IDS_KEY = "eagle_aux_hidden_state_layer_ids"
TRAINING_CONFIG, TRAINING_WEIGHTS = "draft_config.json", "draft.safetensors"


@dataclass(frozen=True)
class DraftFiles:
    """A draft directory as it lies on disk: config.json flattened (see `flatten_config`), raw tensor names."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weight_file: str
    is_speculators: bool


def read_draft_files(directory: str | Path) -> DraftFiles:
    """Read config.json and all tensors of a draft directory; raises CheckpointError or ConfigError naming the file."""
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    if (folder / TRAINING_CONFIG).exists():
        values = read_config(folder / TRAINING_CONFIG)
        return DraftFiles(folder, values, read_safetensors([folder / TRAINING_WEIGHTS]), TRAINING_WEIGHTS, False)
    raw = read_config(folder / "config.json")
    tensors, weight_file = read_tensors(folder)
    flat = flatten_config(raw)
    check_kinds(flat, str(folder / "config.json"))
    return DraftFiles(folder, flat, tensors, weight_file, "speculators_model_type" in raw)


def read_config(file: Path) -> dict[str, Any]:
    """A JSON file as a dict."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors by name, from every *.safetensors, else pytorch_model.bin (weights only, nothing is executed)."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return read_safetensors(files), ", ".join(file.name for file in files)
    tensors: dict[str, Tensor] = {}
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise CheckpointError(f"{folder}: no weights here; expected model.safetensors or pytorch_model.bin")
    for file in pickled:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{file}: not a file of plain tensors: {first_line(error)}") from None
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"{file}: expected a mapping of names to tensors")
        tensors.update(loaded)
    return tensors, ", ".join(file.name for file in pickled)


def read_safetensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    return tensors


def flatten_config(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with speculators' `transformer_layer_config` lifted to the top, as vLLM does it."""
    if "speculators_model_type" not in raw:
        return dict(raw)
    kind = raw["speculators_model_type"]
    if kind != "eagle3":
        raise CheckpointError(f"speculators_model_type '{kind}': only eagle3 is read")
    flat = dict(raw.get("transformer_layer_config") or {})
    for key in ("draft_vocab_size", "target_hidden_size", "norm_before_fc", "fc_norm", "norm_output", AUX_IDS_KEY):
        if raw.get(key) is not None:
            flat[key] = raw[key]
    flat["norm_before_residual"] = raw.get("norm_before_residual", True)  # the default vLLM applies
    flat["architectures"] = ["LlamaForCausalLMEagle3"]
    return flat


def algorithm_of(config: dict[str, Any], names: Sequence[str]) -> str:
    """`eagle1` or `eagle3`, from the architecture where it says so, else from the tensors."""
    if "algorithm" in config:
        return str(config["algorithm"])
    architecture = " ".join(config.get("architectures") or [])
    if "Eagle3" in architecture:
        return "eagle3"
    if "Eagle" in architecture:
        return "eagle1"
    return "eagle3" if any("hidden_norm" in name or "midlayer" in name for name in names) else "eagle1"


def draft_config_of(files: DraftFiles, num_target_layers: int | None = None) -> DraftConfig:
    """The shape of the draft in `files`. What the config leaves open is read off the tensors' shapes."""
    values = dict(files.config)
    names = list(files.tensors)
    values["algorithm"] = algorithm_of(values, names)
    if values.get("num_hidden_layers", 1) != 1:
        raise CheckpointError(f"{files.directory}: num_hidden_layers {values['num_hidden_layers']}: expected 1")
    fc = files.tensors.get("fc.weight")
    if values["algorithm"] == "eagle1":
        values["draft_vocab_size"] = values.get("vocab_size")
    elif fc is not None and values.get("target_hidden_size") is None:
        ids = listed_aux_ids(values)
        width = values.get("hidden_size")
        values["target_hidden_size"] = (
            width if fc.shape[1] % (width or 1) == 0 else fc.shape[1] // (len(ids or ()) or 3)
        )
    hidden = values.get("target_hidden_size") or values.get("hidden_size") or 1
    values["aux_layer_ids"] = None
    if values["algorithm"] == "eagle3":
        count = 3 if fc is None else fc.shape[1] // hidden
        values["num_aux_layers"] = count
        ids = aux_layer_ids_of(files.config, count, num_target_layers)
        if ids is not None and len(ids) != count:
            raise CheckpointError(
                f"{files.directory}: {len(ids)} aux layer ids, but fc is {count * hidden} = {count} x {hidden} wide"
            )
        values["aux_layer_ids"] = ids
    values.pop("eagle_config", None)
    return DraftConfig.from_dict(values, source=str(files.directory / "config.json"))


def listed_aux_ids(config: dict[str, Any]) -> Sequence[int] | None:
    """Whichever list of aux layer ids the config has; for its length only."""
    eagle = config.get("eagle_config") or {}
    return config.get("aux_layer_ids") or config.get(AUX_IDS_KEY) or eagle.get(AUX_IDS_KEY)


def aux_layer_ids_of(config: dict[str, Any], count: int, num_target_layers: int | None) -> tuple[int, ...] | None:
    """Ids of the layers whose OUTPUT feeds the draft, or None where config.json leaves them to the engine's default.

    `eagle_config` alone is ambiguous (see the top of this file): ids that are the default of the target's depth in
    one convention are read in that one, others as vLLM reads them.
    """
    if config.get("aux_layer_ids"):
        return tuple(config["aux_layer_ids"])
    if config.get(AUX_IDS_KEY):
        return tuple(i - 1 for i in config[AUX_IDS_KEY][:count])  # some speculators list the last layer as well
    ids = (config.get("eagle_config") or {}).get(AUX_IDS_KEY)
    if not ids:
        return None
    if num_target_layers is not None and tuple(ids) == default_aux_layer_ids(num_target_layers)[0]:
        return tuple(ids)
    return tuple(i - 1 for i in ids)


def canonical_name(name: str, algorithm: str) -> str:
    """A tensor name as our modules have it: `midlayer.` for EAGLE-3, `layers.0.` for EAGLE-1."""
    if algorithm == "eagle3" and name.startswith("layers.0."):
        return "midlayer." + name.removeprefix("layers.0.")
    if algorithm == "eagle1" and name.startswith("midlayer."):
        return "layers.0." + name.removeprefix("midlayer.")
    return name


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that an exported draft of this config must hold (d2t and t2d apart)."""
    width, inner, target = config.hidden_size, config.intermediate_size, config.target_hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    eagle3 = config.algorithm == "eagle3"
    layer = "midlayer" if eagle3 else "layers.0"
    in_width = 2 * width if eagle3 else width
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, config.num_aux_layers * target if eagle3 else width + target),
        f"{layer}.self_attn.q_proj.weight": (queries, in_width),
        f"{layer}.self_attn.k_proj.weight": (keys, in_width),
        f"{layer}.self_attn.v_proj.weight": (keys, in_width),
        f"{layer}.self_attn.o_proj.weight": (width, queries),
        f"{layer}.mlp.gate_proj.weight": (inner, width),
        f"{layer}.mlp.up_proj.weight": (inner, width),
        f"{layer}.mlp.down_proj.weight": (width, inner),
        f"{layer}.post_attention_layernorm.weight": (width,),
    }
    if not eagle3:
        return {**shapes, "fc.bias": (width,)}
    shapes["midlayer.hidden_norm.weight"] = shapes["midlayer.input_layernorm.weight"] = (width,)
    shapes["norm.weight"] = (width,)
    shapes["lm_head.weight"] = (config.draft_vocab_size, width)
    if config.fc_norm:
        shapes.update({f"fc_norm.{i}.weight": (target,) for i in range(config.num_aux_layers)})
    if width != target:
        shapes["embed_tokens.weight"] = (config.vocab_size, width)
    return shapes


def vocabulary_of(files: DraftFiles, config: DraftConfig) -> tuple[Tensor, Tensor]:
    """(d2t [Vd] int64 offsets, t2d [V] bool); the identity where the draft has the whole vocabulary and no map."""
    d2t = files.tensors.get("d2t")
    if d2t is None:
        if config.draft_vocab_size != config.vocab_size:
            raise CheckpointError(
                f"{files.directory}: d2t is missing, and the draft vocabulary {config.draft_vocab_size} is not the"
                f" target's {config.vocab_size}: no draft token can be named"
            )
        return torch.zeros(config.vocab_size, dtype=torch.int64), torch.ones(config.vocab_size, dtype=torch.bool)
    target_ids = torch.arange(len(d2t)) + d2t.to(torch.int64)
    if len(d2t) != config.draft_vocab_size or int(target_ids.min()) < 0 or int(target_ids.max()) >= config.vocab_size:
        raise CheckpointError(
            f"{files.directory}: d2t names target ids {int(target_ids.min())}..{int(target_ids.max())} with"
            f" {len(d2t)} entries; expected offsets that stay in 0..{config.vocab_size - 1} with"
            f" {config.draft_vocab_size} entries (absolute ids instead of offsets do this)"
        )
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    return d2t.to(torch.int64), t2d
