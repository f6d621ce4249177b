"""`Eagle3Draft.step` in half the operations, for decoding: a chain step of a small draft costs dispatch, not
arithmetic.

Same weights (a frozen draft's parameters become views of the fused matrices, so nothing is stored twice), same result
up to rounding; `draft.step` stays the definition and the oracle of the tests.

Letters: B rows, T tokens, D width, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from specforge_lite.model.draft import Attend, Draft
from specforge_lite.model.eagle3 import Eagle3Draft
from specforge_lite.model.layers import gated

Step = Callable[[Tensor, Tensor, Tensor, Attend], tuple[Tensor, Tensor]]


def step_of(draft: Draft) -> Step:
    """The fastest equal of `draft.step`; that itself for other drafts, and for one that is being trained."""
    is_plain = type(draft) is Eagle3Draft and not draft.fc.weight.requires_grad
    return FusedStep(draft) if is_plain and isinstance(draft, Eagle3Draft) else draft.step


class FusedStep:
    """Callable as `draft.step(state_BTD, embeds_BTD, position_ids_BT, attend)`."""

    def __init__(self, draft: Eagle3Draft) -> None:
        config, layer = draft.config, draft.midlayer
        attention, mlp = layer.self_attn, layer.mlp
        self.width, self.eps = (config.hidden_size,), config.rms_norm_eps
        self.num_q, self.num_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.norm_output, self.activation = config.head_dim, config.norm_output, mlp.activation
        self.qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = fuse([mlp.gate_proj, mlp.up_proj])
        self.o_proj, self.down_proj, self.rope = attention.o_proj, mlp.down_proj, draft.rope
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, draft.norm)
        self.norm_e, self.norm_h, self.norm_post, self.norm_out = (norm.weight for norm in norms)
        self.table_P2d = torch.empty(0)

    def __call__(
        self, state_BTD: Tensor, embeds_BTD: Tensor, position_ids_BT: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        width, eps = self.width, self.eps
        x = torch.cat([rms_norm(embeds_BTD, width, self.norm_e, eps), rms_norm(state_BTD, width, self.norm_h, eps)], -1)
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([self.num_q + self.num_kv, self.num_kv], 2)
        q, k = self.rotate(qk, position_ids_BT).transpose(1, 2).split([self.num_q, self.num_kv], 1)
        attended = attend(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
        state = state_BTD + self.o_proj(attended)
        inner = gated_plain(self.gate_up(rms_norm(state, width, self.norm_post, eps)), self.activation)
        state = state + self.down_proj(inner)
        head_input = rms_norm(state, width, self.norm_out, eps)
        return (head_input if self.norm_output else state), head_input

    def rotate(self, x_BThd: Tensor, position_ids_BT: Tensor) -> Tensor:
        """RoPE from a table of cosines and sines, extended when a text outgrows it."""
        cos_BT1d, sin_BT1d = self.table_P2d[position_ids_BT].unsqueeze(2).unbind(-2)
        half = x_BThd.shape[-1] // 2
        low, high = x_BThd[..., :half], x_BThd[..., half:]
        out = x_BThd * cos_BT1d
        out[..., :half].addcmul_(high, sin_BT1d[..., :half], value=-1)
        out[..., half:].addcmul_(low, sin_BT1d[..., half:])
        return out

    def cover(self, num_positions: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the table hold positions below `num_positions`."""
        if len(self.table_P2d) < num_positions:
            positions = torch.arange(max(2 * num_positions, 256), device=device)
            self.table_P2d = torch.stack(self.rope(positions), 1).to(dtype)


def fuse(layers: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """One product for several layers that read the same input; their weights become views of its matrix."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, part in zip(layers, weight.split(sizes)):
        layer.weight = nn.Parameter(part, requires_grad=False)
    bias = None
    if any(layer.bias is not None for layer in layers):
        zeros = [weight.new_zeros(size) for size in sizes]
        bias = torch.cat([zero if layer.bias is None else layer.bias.detach() for layer, zero in zip(layers, zeros)])
    return lambda x: linear(x, weight, bias)


def gated_plain(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up without the training version's bookkeeping."""
    if activation not in ("silu", "swish"):
        return gated(gate_up, activation)
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)
