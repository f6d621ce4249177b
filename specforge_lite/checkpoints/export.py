"""Write a draft as SGLang, vLLM and `SpeculativeModel` load it: config.json + model.safetensors.

The engines take the same tensors and disagree on one config key, the ids of the aux layers; both of its places are
written, each in the convention of the engine that reads it (`model.draft.aux_layer_ids_of` names the lines).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite import __version__
from specforge_lite.checkpoints.contract import check_draft
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.checkpoints.training_run import TRAINING_CONFIG, newest_complete, read_state, verify_checkpoint
from specforge_lite.core.errors import CheckpointError, ConfigError, suggest
from specforge_lite.core.files import atomic_directory, save_tensors, user_errors, write_json
from specforge_lite.model.config_json import BLOCK_KINDS
from specforge_lite.model.draft import ARCHITECTURES, AUX_IDS_KEY, Draft, DraftConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_draft(
    draft: Draft,
    output_dir: str | Path,
    aux_layer_ids: tuple[int, ...] | None = None,
    dtype: str = "bfloat16",
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `draft` to `output_dir` and check what was written against the engines' contract.

    aux_layer_ids: outputs of these target layers feed the draft; default: those of the draft's config.
    provenance: JSON-ready facts about the training run, kept in config.json under `specforge_lite`.
    Raises ConfigError for an unknown dtype or missing aux layer ids, CheckpointError when the directory is taken.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: unknown value '{dtype}'{suggest(dtype, DTYPES)}")
    config = draft.config if aux_layer_ids is None else draft.config.replace(aux_layer_ids=tuple(aux_layer_ids))
    if config.algorithm != "eagle1" and config.aux_layer_ids is None:
        raise ConfigError(
            "aux_layer_ids: the draft's config has none, and engines would take their default for the target's depth;"
            " give the ids that the draft was trained with"
        )
    folder = Path(output_dir)
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder}: exists already; give another directory, or --overwrite")
    with user_errors(folder), atomic_directory(folder) as partial:
        write_json(partial / "config.json", exported_config(config, dtype, provenance))
        save_tensors(exported_tensors(draft, DTYPES[dtype]), partial / "model.safetensors", {"format": "pt"})
        problems = [finding for finding in check_draft(partial) if finding.is_broken]
        if problems:
            raise CheckpointError(f"the exported draft would not be served: {problems[0].message}")
    return folder


def export_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    aux_layer_ids: tuple[int, ...] | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> Path:
    """Export the draft of a training checkpoint `step_N`, or of the newest complete one in a run's output directory.

    Raises CheckpointError when it is damaged or holds none; otherwise as `export_draft`.
    """
    source = Path(checkpoint)
    if not (source / TRAINING_CONFIG).exists():
        newest = newest_complete(source) if source.is_dir() else None
        if newest is None:
            raise CheckpointError(f"{source}: neither a checkpoint step_N nor an output directory that holds one")
        source = newest
    else:
        verify_checkpoint(source)
    return export_draft(load_draft(source), output_dir, aux_layer_ids, dtype, training_facts(source), overwrite)


def training_facts(checkpoint: Path) -> dict[str, Any]:
    """Where the draft comes from: step, and what the run recorded about versions, code and command."""
    facts: dict[str, Any] = {"step": read_state(checkpoint).step, "checkpoint": checkpoint.name}
    for name in ("provenance", "config"):
        file = checkpoint / f"{name}.json"
        if file.exists():
            facts[name] = json.loads(file.read_text(encoding="utf-8"))
    return facts


# Fields of DraftConfig that config.json has under the same name.
SAME_NAMES = (
    "hidden_size", "target_hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "vocab_size",
    "draft_vocab_size", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def exported_config(config: DraftConfig, dtype: str, provenance: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of an exported draft. Keys that only newer or older servers read are both there."""
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.algorithm]],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **{name: getattr(config, name) for name in SAME_NAMES},
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "specforge_lite": {"version": __version__, **(provenance or {})},
    }
    if config.algorithm == "eagle1":
        # SGLang resolves the first name, vLLM (which puts `Eagle` before each) the second.
        values["architectures"] = [ARCHITECTURES["eagle1"], "EagleLlamaForCausalLM"]
        del values["draft_vocab_size"]
        return values
    outputs = list(config.aux_layer_ids or ())
    if config.algorithm in BLOCK_KINDS:
        del values["draft_vocab_size"], values["target_hidden_size"]
        return values | _block_keys(config)
    values["aux_layer_ids"] = outputs
    values[AUX_IDS_KEY] = [i + 1 for i in outputs]  # vLLM: layer inputs
    values["eagle_config"] = {AUX_IDS_KEY: outputs, "use_aux_hidden_state": True}  # SGLang: layer outputs
    values["norm_output"], values["fc_norm"] = config.norm_output, config.fc_norm
    return values


def _block_keys(config: DraftConfig) -> dict[str, Any]:
    """What the config.json of a block draft has besides the keys of every draft, at every place where an engine looks.

    `target_layer_ids` are 0-based layer OUTPUTS, ours; both engines add 1."""
    layers, mask = list(config.aux_layer_ids or ()), config.mask_token_id
    values: dict[str, Any] = {
        "model_type": "qwen3",
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "block_size": config.block_size,
        "mask_token_id": mask,
        "target_layer_ids": layers,
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": layers},
        "loss_gamma": config.loss_gamma,
    }
    if config.algorithm == "dspark":
        values |= {
            "markov_rank": config.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": config.confidence_head,
            "confidence_head_with_markov": bool(config.markov_rank),
            "sample_from_anchor": True,
        }
    return values


def exported_tensors(draft: Draft, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> tensor as the engines expect it. A draft with the whole vocabulary has no d2t: vLLM refuses one."""
    config = draft.config
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in draft.named_parameters()}
    if config.algorithm == "eagle1":
        tensors.setdefault("fc.bias", torch.zeros(config.hidden_size, dtype=dtype))  # SGLang's fc has one, ours none
    if config.algorithm == "eagle3" and config.draft_vocab_size < config.vocab_size:
        tensors["d2t"] = draft.d2t.cpu().to(torch.int64)
        tensors["t2d"] = draft.t2d.cpu()
    return tensors
