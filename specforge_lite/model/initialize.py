"""Starting weights. Random is what EAGLE does; `init_from_target` copies what the target already knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.weight_files import logical_names, read_weight, weight_files
from specforge_lite.model.draft import Draft
from specforge_lite.model.target_head import ONE_PLUS_WEIGHT, TargetHead

INIT_STD = 0.02
STATE_PARTS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
COPIED = (
    "input_layernorm.weight", "post_attention_layernorm.weight",
    *(f"self_attn.{part}_proj.weight" for part in ("q", "k", "v", "qkv", "o")),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "gate_up", "down")),
)  # fmt: skip


def init_random(draft: Draft, seed: int = 0) -> None:
    """Normal weights of standard deviation 0.02 (the Llama default), norms at one, biases at zero; the same on all
    ranks."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in draft.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * INIT_STD)


@torch.no_grad()
def init_from_target(draft: Draft, model_dir: str | Path, hf_config: Any, target_head: TargetHead) -> list[str]:
    """Copy from the target's last layer o_proj, MLP, norms and q, k, v; EAGLE-3 also takes `lm_head` rows and `norm`
    from the target's head. EAGLE-3's q, k, v have an embedding half, which stays random and small.

    Tensors whose shape or name differs (another width, experts, MLA) keep their random start; their names are returned
    so that the caller can say so.
    """
    config = draft.config
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    sources = _last_layer(Path(model_dir), text.num_hidden_layers)
    _split_fused(sources, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim)
    kept: list[str] = []
    layer = "midlayer." if config.algorithm == "eagle3" else "layers.0."
    if config.algorithm == "eagle3" and config.hidden_size == config.target_hidden_size:
        head = target_head.lm_head_VH[draft.target_ids.to(target_head.lm_head_VH.device)].float()
        draft.get_parameter("lm_head.weight").copy_(head * target_head.logit_scale)
        draft.get_parameter("norm.weight").copy_(target_head.norm_weight_H)
    elif config.algorithm == "eagle3":
        kept += ["lm_head", "norm"]
    copies = {f"{name}.weight": f"{name}.weight" for name in STATE_PARTS}
    if text.model_type not in ONE_PLUS_WEIGHT and not target_head.norm_centers:
        if config.algorithm == "eagle3":
            copies["hidden_norm.weight"] = "input_layernorm.weight"
        copies["post_attention_layernorm.weight"] = "post_attention_layernorm.weight"
    copies |= {f"self_attn.{letter}_proj.weight": f"self_attn.{letter}_proj.weight" for letter in "qkv"}
    for name, source in copies.items():
        parameter: Tensor = draft.get_parameter(layer + name)
        found = sources.get(source)
        if source.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            parameter = parameter[:, -config.hidden_size :]  # the columns that read the state
        if found is not None and found.shape == parameter.shape:
            parameter.copy_(found)
        else:
            kept.append(layer + name.removesuffix(".weight"))
    return kept


def _split_fused(sources: dict[str, Tensor], num_queries: int, num_keys: int) -> None:
    """Phi-3 and GLM-4 store q, k, v, or gate and up, as one matrix."""
    fused = sources.get("self_attn.qkv_proj.weight")
    if fused is not None and len(fused) == num_queries + 2 * num_keys:
        for letter, part in zip("qkv", fused.split([num_queries, num_keys, num_keys])):
            sources[f"self_attn.{letter}_proj.weight"] = part
    fused = sources.get("mlp.gate_up_proj.weight")
    if fused is not None:
        sources["mlp.gate_proj.weight"], sources["mlp.up_proj.weight"] = fused.chunk(2)


def _last_layer(directory: Path, num_layers: int) -> dict[str, Tensor]:
    """Tensors of the target's last decoder layer that may be copied, by their name inside the layer.

    Only these are read: a layer of experts has gigabytes. What is quantised in a form that is not read stays out.
    """
    marker = f"layers.{num_layers - 1}."
    files = weight_files(directory)
    found: dict[str, Tensor] = {}
    for name in logical_names(files):
        inside = name.split(marker, 1)[1] if marker in name and "vision" not in name else ""
        if inside in COPIED and (tensor := read_weight(files, name)) is not None:
            found[inside] = tensor
    return found
