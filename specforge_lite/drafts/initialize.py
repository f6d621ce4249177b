"""Starting weights. Random is what EAGLE does; `init_from_target` copies what the target already knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.drafts.base import Draft
from specforge_lite.nn.target_head import TargetHead, weight_files

INIT_STD = 0.02


def init_random(draft: Draft, seed: int = 0) -> None:
    """Normal weights of standard deviation 0.02 (the Llama default), norms at one; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in draft.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * INIT_STD)
            del name


@torch.no_grad()
def fit_own_embeddings(draft: Draft, target_head: TargetHead) -> None:
    """For a draft narrower or wider than its target: project the target's embedding on its main directions."""
    if draft.embed_tokens is None:
        return
    table = target_head.embed_VH.float()
    width = draft.config.hidden_size
    if width >= table.shape[1]:
        draft.embed_tokens.weight[:, : table.shape[1]] = table
        draft.embed_tokens.weight[:, table.shape[1] :] = 0
        return
    _, directions = torch.linalg.eigh(table.T @ table)  # ascending eigenvalues
    draft.embed_tokens.weight.copy_(table @ directions[:, -width:].flip(1))


@torch.no_grad()
def init_from_target(draft: Draft, model_dir: str | Path, hf_config: Any, target_head: TargetHead) -> list[str]:
    """Copy `lm_head` rows and `norm` from the target's head, and from its last layer o_proj, MLP, norms and the state
    half of q, k, v (the embedding half stays random and small).

    Tensors whose shape or name differs (another width, fused projections, experts, MLA) keep their random start; their
    names are returned so that the caller can say so.
    """
    config = draft.config
    kept: list[str] = []
    if config.hidden_size == config.target_hidden_size:
        head = target_head.lm_head_VH[draft.target_ids.to(target_head.lm_head_VH.device)].float()
        draft.get_parameter("lm_head.weight").copy_(head * target_head.logit_scale)
        draft.get_parameter("norm.weight").copy_(target_head.norm_weight_H)
    else:
        kept += ["lm_head", "norm"]
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    sources = _last_layer(Path(model_dir), text.num_hidden_layers)
    plain_norms = not text.model_type.startswith("gemma")  # Gemma stores w - 1 and norms in other places
    copies = {
        "midlayer.self_attn.o_proj.weight": "self_attn.o_proj.weight",
        "midlayer.mlp.gate_proj.weight": "mlp.gate_proj.weight",
        "midlayer.mlp.up_proj.weight": "mlp.up_proj.weight",
        "midlayer.mlp.down_proj.weight": "mlp.down_proj.weight",
    }
    if plain_norms:
        copies["midlayer.hidden_norm.weight"] = "input_layernorm.weight"
        copies["midlayer.post_attention_layernorm.weight"] = "post_attention_layernorm.weight"
    for name, source in copies.items():
        if not _copy(draft.get_parameter(name), sources.get(source)):
            kept.append(name.removesuffix(".weight"))
    for letter in "qkv":
        name = f"midlayer.self_attn.{letter}_proj.weight"
        state_half = draft.get_parameter(name)[:, config.hidden_size :]
        if not _copy(state_half, sources.get(f"self_attn.{letter}_proj.weight")):
            kept.append(name.removesuffix(".weight"))
    return kept


def _copy(destination: Tensor, source: Tensor | None) -> bool:
    if source is None or source.shape != destination.shape:
        return False
    destination.copy_(source)
    return True


def _last_layer(directory: Path, num_layers: int) -> dict[str, Tensor]:
    """Tensors of the target's last decoder layer by their name inside the layer."""
    from safetensors import safe_open

    marker = f"layers.{num_layers - 1}."
    found: dict[str, Tensor] = {}
    for name, file in weight_files(directory).items():
        if marker in name and "vision" not in name:
            with safe_open(file, framework="pt") as handle:
                found[name.split(marker, 1)[1]] = handle.get_tensor(name)
    return found
