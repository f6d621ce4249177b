"""The layout and the layer of speculators (vLLM project): EAGLE-3 drafts that can be run here; ours never are so.

`transformer_layer_config` holds the layer's keys. `norm_before_residual` adds attention to the NORMED state,
`norm_before_fc` norms the concatenated aux states once before fc, Qwen3 layers norm queries and keys per head
(speculators/models/eagle3/model_definitions.py; read, not run: no such checkpoint was at hand).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specforge_lite.core.errors import CheckpointError
from specforge_lite.model.draft import AUX_IDS_KEY, DraftConfig
from specforge_lite.model.eagle3 import Eagle3Draft
from specforge_lite.model.layers import RMSNorm


def flatten_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A speculators config.json with `transformer_layer_config` lifted to the top, as vLLM does it."""
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


@dataclass(frozen=True)
class LayerChanges:
    """What differs from the published EAGLE-3 layer."""

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    qk_norm: bool = False

    def any(self) -> bool:
        return self.norm_before_residual or self.norm_before_fc or self.qk_norm


def layer_changes_of(flat_config: dict[str, Any], names: set[str]) -> LayerChanges:
    """Read off config.json and the tensor names (canonical ones)."""
    eagle = flat_config.get("eagle_config") or {}
    return LayerChanges(
        norm_before_residual=bool(flat_config.get("norm_before_residual", False)),
        norm_before_fc=bool(eagle.get("norm_before_fc", flat_config.get("norm_before_fc", False))),
        qk_norm="midlayer.self_attn.q_norm.weight" in names,
    )


class SpeculatorsEagle3(Eagle3Draft):
    """For inference only: `forward`, the training pass, is that of the published layer and refuses to run."""

    def __init__(self, config: DraftConfig, d2t: Tensor, t2d: Tensor, changes: LayerChanges) -> None:
        super().__init__(config, d2t, t2d)
        self.changes = changes
        if changes.norm_before_fc:
            self.input_norm = RMSNorm(config.num_aux_layers * config.target_hidden_size, config.rms_norm_eps)
        if changes.qk_norm:
            attention = self.midlayer.self_attn
            attention.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            attention.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def first_state(self, features: Tensor) -> Tensor:
        return super().first_state(self.input_norm(features) if self.changes.norm_before_fc else features)

    def layer_input(self, state_BTD: Tensor, embeds_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x, residual_BTD = super().layer_input(state_BTD, embeds_BTD)
        normed_BTD = x[..., -self.config.hidden_size :]
        return x, normed_BTD if self.changes.norm_before_residual else residual_BTD

    def forward(self, *args: Any, **unused: Any) -> Any:
        raise NotImplementedError("this EAGLE-3 layer of speculators is loaded for inference only")
