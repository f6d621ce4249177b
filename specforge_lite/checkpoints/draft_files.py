"""What lies in a draft directory: config.json and weights in any of the layouts in use, in one set of names.

    ours, SafeAILab/EAGLE, SpecForge   config.json + `midlayer.*` or `layers.0.*`, safetensors or pytorch_model.bin
    a training checkpoint `step_N`     draft_config.json + draft.safetensors
    speculators, EAGLE's `state_N`     see `compat`

`loading.read_draft_files` reads a directory; here is what its files mean.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.capture.base import default_aux_layer_ids, eagle_aux_layer_ids
from specforge_lite.checkpoints.training_run import read_config, read_safetensors
from specforge_lite.core.errors import CheckpointError, ConfigError, first_line
from specforge_lite.core.weight_files import files_that_count, safetensors_files, weight_files
from specforge_lite.model.config_json import (
    BLOCK_KINDS,
    aux_layer_ids_of,
    block_kind_of,
    check_kinds,
    config_from_values,
)
from specforge_lite.model.draft import ARCHITECTURES, AUX_IDS_KEY, DraftConfig
from specforge_lite.model.registry import build_draft

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class DraftFiles:
    """A draft directory as it lies on disk: keys of config.json at the top level, raw tensor names."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weight_file: str
    is_speculators: bool


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    """(all tensors by name, names of the files they came from): safetensors, else pytorch_model.bin (weights only,
    nothing is executed). Which files count: `core.weight_files`."""
    if safetensors_files(folder):
        files = weight_files(folder)
        tensors = read_safetensors(list(dict.fromkeys(files.values())))
        return {name: tensors[name] for name in files}, ", ".join(sorted({file.name for file in files.values()}))
    tensors = {}
    pickled = pickled_files(folder)
    if not pickled:
        raise CheckpointError(f"{folder}: no weights here; expected model.safetensors or pytorch_model.bin")
    for file in pickled:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{file}: not a file of plain tensors: {first_line(error)}") from None
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"{file}: expected a mapping of names to tensors")
        if twice := tensors.keys() & loaded.keys():
            raise CheckpointError(f"{file}: {min(twice)} is in another pytorch_model*.bin as well; which one counts?")
        tensors.update(loaded)
    return tensors, ", ".join(file.name for file in pickled)


def algorithm_of(config: dict[str, Any], names: Sequence[str]) -> str:
    """The kind of draft, from the architecture where it says so, else `eagle1` or `eagle3` from the tensors."""
    if "algorithm" in config:
        return str(config["algorithm"])
    if (kind := block_kind_of(config)) is not None:
        return kind
    architecture = " ".join(config.get("architectures") or [])
    if "Eagle3" in architecture:
        return "eagle3"
    if "Eagle" in architecture:
        return "eagle1"
    return "eagle3" if any("hidden_norm" in name or "midlayer" in name for name in names) else "eagle1"


def draft_config_of(files: DraftFiles, target: Any | None = None) -> DraftConfig:
    """The shape of the draft in `files`. What the config leaves open is read off the tensors' shapes, then taken from
    the target (its transformers config)."""
    source = str(files.directory / "config.json")
    check_kinds(files.config, source)
    values = dict(files.config)
    values["algorithm"] = algorithm_of(values, list(files.tensors))
    if values["algorithm"] in BLOCK_KINDS:  # their config.json says everything
        return config_from_values(values, source)
    values = fill_from_tensors(values, files.tensors, target)
    values = fill_from_target(values, target if values.get("hidden_size") else None, source)
    fc = files.tensors.get("fc.weight")
    ids = aux_layer_ids_of(values, source)
    if values["algorithm"] == "eagle1":
        values["draft_vocab_size"] = values.get("vocab_size")
        ids = None
    elif fc is not None:
        width = values.get("hidden_size")
        if values.get("target_hidden_size") is None:
            whole = isinstance(width, int) and width > 0 and fc.shape[1] % width == 0
            values["target_hidden_size"] = width if whole else fc.shape[1] // (len(ids or ()) or 3)
        count = fc.shape[1] // (values["target_hidden_size"] or width or 1)
        values["num_aux_layers"] = count
        if files.is_speculators and ids is not None:
            ids = ids[:count]  # some list the last layer as well
        if ids is not None and len(ids) != count:
            raise CheckpointError(
                f"{files.directory}: {len(ids)} aux layer ids, but fc is {fc.shape[1]} = {count} x"
                f" {fc.shape[1] // max(count, 1)} wide"
            )
    values["aux_layer_ids"] = ids
    values.pop("eagle_config", None)
    values.pop(AUX_IDS_KEY, None)
    return config_from_values(values, source)


def fill_from_tensors(values: dict[str, Any], tensors: dict[str, Tensor], target: Any | None) -> dict[str, Any]:
    """`values` with sizes that they lack read off a draft's tensors; head counts need the target's number of heads."""
    named = {canonical_name(name, values["algorithm"]): tensor for name, tensor in tensors.items()}
    layer = "midlayer." if values["algorithm"] == "eagle3" else "layers.0."
    gate, output = named.get(f"{layer}mlp.gate_proj.weight"), named.get(f"{layer}self_attn.o_proj.weight")
    key, head = named.get(f"{layer}self_attn.k_proj.weight"), named.get("lm_head.weight")
    found: dict[str, Any] = {"intermediate_size": None if gate is None else len(gate)}
    if target is not None and values.get("num_attention_heads") is None and output is not None and key is not None:
        heads = DraftConfig.from_target(target, algorithm=values["algorithm"]).num_attention_heads
        found |= {"num_attention_heads": heads, "head_dim": output.shape[1] // heads}
        found["num_key_value_heads"] = len(key) // max(found["head_dim"], 1)
    if values["algorithm"] == "eagle3" and head is not None:
        found["draft_vocab_size"] = len(head)
    return {**found, **{name: value for name, value in values.items() if value is not None}}


def fill_from_target(values: dict[str, Any], target: Any | None, source: str) -> dict[str, Any]:
    """`values` of a config.json with what they lack taken from the target, as `DraftConfig.from_target` would make it.

    Raises ConfigError for more than one layer. The target's width and vocabulary are not filled in where they are
    given: whoever knows the target compares them.
    """
    named = {name: algorithm for algorithm, name in ARCHITECTURES.items()}.get((values.get("architectures") or [""])[0])
    if (values.get("algorithm") or named) in BLOCK_KINDS:  # their config.json says everything
        return values
    if values.get("num_hidden_layers", 1) not in (1, None):
        raise CheckpointError(f"{source}: num_hidden_layers {values['num_hidden_layers']}: expected 1")
    if target is None:
        return values
    derived = DraftConfig.from_target(target, algorithm=values.get("algorithm", "eagle3")).to_dict()
    given = {name: value for name, value in values.items() if value is not None}
    width = given.get("hidden_size", derived["hidden_size"])
    if given.keys() & {"num_attention_heads", "num_key_value_heads", "head_dim"}:
        for name in ("num_key_value_heads", "head_dim"):
            del derived[name]
    elif isinstance(width, int) and width != derived["hidden_size"] and width % derived["head_dim"] == 0:
        heads = width // derived["head_dim"]
        derived["num_attention_heads"] = derived["num_key_value_heads"] = heads
        derived["intermediate_size"] = derived["intermediate_size"] * width // derived["hidden_size"]
    if given.keys() & {"rope_theta", "rope_scaling", "rope_parameters"}:
        del derived["rope_theta"], derived["rope_scaling"]
    if not given.keys().isdisjoint({"algorithm", "architectures"}):
        del derived["algorithm"]
    for name in ("target_hidden_size", "aux_layer_ids", "num_aux_layers"):
        del derived[name]
    return {**derived, **given}


def canonical_name(name: str, algorithm: str) -> str:
    """A tensor name as our modules have it: `midlayer.` for EAGLE-3, `layers.0.` for EAGLE-1."""
    if algorithm == "eagle3" and name.startswith("layers.0."):
        return "midlayer." + name.removeprefix("layers.0.")
    if algorithm == "eagle1" and name.startswith("midlayer."):
        return "layers.0." + name.removeprefix("midlayer.")
    return name


def canonical_weights(files: DraftFiles, config: DraftConfig) -> dict[str, Tensor]:
    """Trained weights under our names, without what repeats the target (embedding table, EAGLE-1's head), without the
    zero bias that SGLang wants beside EAGLE-1's fc, and without RoPE tables."""
    weights = {canonical_name(name, config.algorithm): tensor for name, tensor in files.tensors.items()}
    unused = {"d2t", "t2d"}
    if config.algorithm != "eagle3":
        unused |= {"embed_tokens.weight", "lm_head.weight"}
    elif config.hidden_size == config.target_hidden_size:
        unused.add("embed_tokens.weight")
    if "fc.bias" in weights and not weights["fc.bias"].any():
        unused.add("fc.bias")
    unused |= {name for name in weights if name.endswith("rotary_emb.inv_freq")}
    return {name: weight for name, weight in weights.items() if name not in unused}


def check_weights(
    files: DraftFiles, weights: dict[str, Tensor], wanted: dict[str, Tensor], algorithm: str, whose: str, hint: str = ""
) -> None:
    """Raise CheckpointError unless the weights are exactly the `wanted` parameters, shapes included."""
    place = f"{files.directory}: {files.weight_file}"
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing:
        raise CheckpointError(f"{place}: missing {', '.join(missing)}")
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        names = f"{', '.join(unknown[:5])}{more}"
        raise CheckpointError(f"{place}: no place for {names} in a draft of algorithm {algorithm}")
    for name, parameter in wanted.items():
        found, expected = tuple(weights[name].shape), tuple(parameter.shape)
        if found != expected:
            raise CheckpointError(f"{files.directory}: {name} has shape {found}, {whose} {expected}{hint}")


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that an exported draft of this config must hold (d2t and t2d apart): those of our
    module, and the bias that SGLang's EAGLE-1 fc has. Raises ConfigError for a shape that cannot be built."""
    d2t = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
    t2d = torch.arange(config.vocab_size) < config.draft_vocab_size
    with torch.device("meta"):
        draft = build_draft(config, d2t, t2d)
    shapes = {name: tuple(parameter.shape) for name, parameter in draft.named_parameters()}
    return shapes if config.algorithm != "eagle1" else shapes | {"fc.bias": (config.hidden_size,)}


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


def read_draft_config(path: Path, algorithm: str | None, target_config: Any | None = None) -> DraftConfig:
    """A draft's config.json for `algorithm` (None: its own), completed from the target's; a plain Llama config, as
    EAGLE's are, fits all."""
    file = path / "config.json" if path.is_dir() else path
    values = read_config(file)
    known = target_config if values.get("hidden_size") else None  # an empty file is a mistake, not a wish
    draft = config_from_values(fill_from_target(values, known, str(file)), str(file))
    if algorithm in (None, draft.algorithm):
        return draft
    architecture = "".join(values.get("architectures") or [])
    if "Eagle" in architecture or draft.algorithm in BLOCK_KINDS:
        raise ConfigError(f"{path}: architectures {architecture}: that is trained with --draft-kind {draft.algorithm}")
    return draft.replace(algorithm=algorithm or draft.algorithm, draft_vocab_size=draft.vocab_size)


def pickled_files(directory: Path) -> list[Path]:
    """The `pytorch_model*.bin` files that count, by the rules of `weight_files`."""
    return files_that_count(directory, PICKLED, PICKLED_INDEX, "pytorch_model*.bin")


def unnamed_aux_layer_ids(num_layers: int) -> tuple[int, ...]:
    """What a draft that names no aux layers is taken to read: EAGLE-3's choice, or ours where that collapses."""
    ids = eagle_aux_layer_ids(num_layers)
    return ids if ids[0] < ids[1] < ids[2] else default_aux_layer_ids(num_layers)[0]
