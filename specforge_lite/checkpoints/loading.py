"""`load_draft`: a draft network from an exported directory, a SafeAILab/EAGLE checkpoint or a speculators directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from specforge_lite.checkpoints.draft_files import (
    DraftFiles,
    canonical_name,
    draft_config_of,
    expected_shapes,
    read_draft_files,
    vocabulary_of,
)
from specforge_lite.checkpoints.variants import Eagle3Variant, variation_of
from specforge_lite.core.errors import CheckpointError
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.registry import build_draft


def load_draft(
    directory: str | Path,
    num_target_layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Draft:
    """Build the draft in `directory` with its weights, frozen and in evaluation mode.

    num_target_layers settles aux layer ids that config.json leaves open; dtype: None keeps what is stored.
    Raises CheckpointError for a missing, unknown or misshapen tensor, ConfigError for config.json.
    """
    return draft_of_files(read_draft_files(directory), num_target_layers, dtype, device)


def draft_of_files(
    files: DraftFiles,
    num_target_layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Draft:
    """The same for a directory that was read already."""
    config = draft_config_of(files, num_target_layers)
    weights = canonical_weights(files, config)
    d2t, t2d = vocabulary_of(files, config)
    variation = variation_of(files.config, set(weights))
    if config.algorithm == "eagle3" and variation.any():
        draft: Draft = Eagle3Variant(config, d2t, t2d, variation)
    else:
        draft = build_draft(config, d2t, t2d)
    add_biases(draft, weights)
    check_weights(files, config, draft, weights)
    draft.load_state_dict(weights, strict=False, assign=True)
    stored = next(weight.dtype for weight in weights.values())
    return draft.to(device=device, dtype=dtype or stored).eval().requires_grad_(False)


def canonical_weights(files: DraftFiles, config: DraftConfig) -> dict[str, Tensor]:
    """Trained weights under our names, without what repeats the target (embedding table, EAGLE-1's head), without the
    zero bias that SGLang wants beside EAGLE-1's fc, and without RoPE tables."""
    weights = {canonical_name(name, config.algorithm): tensor for name, tensor in files.tensors.items()}
    unused = {"d2t", "t2d"}
    if "embed_tokens.weight" not in expected_shapes(config):
        unused.add("embed_tokens.weight")
    if config.algorithm == "eagle1":
        unused.add("lm_head.weight")
    if "fc.bias" in weights and not weights["fc.bias"].any():
        unused.add("fc.bias")
    unused |= {name for name in weights if name.endswith("rotary_emb.inv_freq")}
    return {name: weight for name, weight in weights.items() if name not in unused}


def add_biases(draft: Draft, weights: dict[str, Tensor]) -> None:
    """Linear layers get a bias where the checkpoint has one (SafeAILab's EAGLE-1 fc, Qwen2 attention)."""
    modules = dict(draft.named_modules())
    for name in weights:
        layer = modules.get(name.removesuffix(".bias"))
        if name.endswith(".bias") and isinstance(layer, nn.Linear) and layer.bias is None:
            layer.bias = nn.Parameter(torch.empty(layer.out_features))


def check_weights(files: DraftFiles, config: DraftConfig, draft: Draft, weights: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the weights are exactly the draft's parameters, shapes included."""
    wanted = {name: tuple(p.shape) for name, p in draft.named_parameters()}
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise CheckpointError(f"{files.directory}: {files.weight_file}: missing {', '.join(missing)}")
    unknown = sorted(weights.keys() - wanted.keys())
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(
            f"{files.directory}: {files.weight_file}: no place for {', '.join(unknown[:5])}{more} in a draft of"
            f" algorithm {config.algorithm}"
        )
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{files.directory}: {name} has shape {tuple(weights[name].shape)}, config.json makes it {shape}"
            )
