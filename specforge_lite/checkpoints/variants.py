"""EAGLE-3 drafts that others train with a slightly different layer, so that they can be run here; ours never are.

speculators (vLLM project): `norm_before_residual` adds attention to the NORMED state, `norm_before_fc` norms the
concatenated aux states once before fc, Qwen3 layers norm queries and keys per head
(speculators/models/eagle3/model_definitions.py; read, not run: no such checkpoint was at hand).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge_lite.model.draft import Attend, DraftConfig
from specforge_lite.model.eagle3 import Eagle3Draft
from specforge_lite.model.layers import RMSNorm
from specforge_lite.model.rope import apply_rope


@dataclass(frozen=True)
class Variation:
    """What differs from the published EAGLE-3 layer."""

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    qk_norm: bool = False

    def any(self) -> bool:
        return self.norm_before_residual or self.norm_before_fc or self.qk_norm


def variation_of(flat_config: dict[str, Any], names: set[str]) -> Variation:
    """Read the variation off config.json and the tensor names (canonical ones)."""
    eagle = flat_config.get("eagle_config") or {}
    return Variation(
        norm_before_residual=bool(flat_config.get("norm_before_residual", False)),
        norm_before_fc=bool(eagle.get("norm_before_fc", flat_config.get("norm_before_fc", False))),
        qk_norm="midlayer.self_attn.q_norm.weight" in names,
    )


class Eagle3Variant(Eagle3Draft):
    """For inference only: `forward`, the training pass, is that of the published layer and refuses to run."""

    def __init__(self, config: DraftConfig, d2t: Tensor, t2d: Tensor, variation: Variation) -> None:
        super().__init__(config, d2t, t2d)
        self.variation = variation
        if variation.norm_before_fc:
            self.input_norm = RMSNorm(config.num_aux_layers * config.target_hidden_size, config.rms_norm_eps)
        if variation.qk_norm:
            for name in ("q_norm", "k_norm"):
                self.midlayer.self_attn.add_module(name, RMSNorm(config.head_dim, config.rms_norm_eps))

    def first_state(self, features: Tensor) -> Tensor:
        return super().first_state(self.input_norm(features) if self.variation.norm_before_fc else features)

    def step(
        self, state_BTD: Tensor, embeds_BTD: Tensor, position_ids_BT: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        layer, attention, head_dim = self.midlayer, self.midlayer.self_attn, self.config.head_dim
        normed = layer.hidden_norm(state_BTD)
        residual = normed if self.variation.norm_before_residual else state_BTD
        x = torch.cat([layer.input_layernorm(embeds_BTD.to(state_BTD.dtype)), normed], -1)
        q, k, v = (p(x).unflatten(-1, (-1, head_dim)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        if self.variation.qk_norm:
            q, k = attention.get_submodule("q_norm")(q), attention.get_submodule("k_norm")(k)
        cos, sin = self.rope(position_ids_BT)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        attended = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        state = residual + attention.o_proj(attended)
        state = state + layer.mlp(layer.post_attention_layernorm(state))
        head_input = self.norm(state)
        return (head_input if self.config.norm_output else state), head_input

    def forward(self, *args: Any, **unused: Any) -> Any:
        raise NotImplementedError("this variant of the EAGLE-3 layer is loaded for inference only")
