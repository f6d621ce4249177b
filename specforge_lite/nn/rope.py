"""Rotary position embedding. Scaled variants (llama3, yarn, linear, longrope) come from transformers' own formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """cos and sin for integer positions, fp32. `apply` rotates halves, as Llama checkpoints expect."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None, max_positions: int) -> None:
        super().__init__()
        inv_freq, self.attention_scaling = _frequencies(head_dim, theta, scaling, max_positions)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [...] int64 -> (cos, sin) [..., head_dim] fp32."""
        inv_freq = self.inv_freq.float()
        angles = position_ids.unsqueeze(-1).to(inv_freq.dtype) * inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., heads, d]; cos, sin [..., d] -> rotated x, same dtype."""
    return _Rotate.apply(x, cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype))  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin. Its transpose rotates back, so nothing but cos and sin is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any] | None, max_positions: int
) -> tuple[Tensor, float]:
    if not scaling or scaling.get("rope_type", "default") == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (theta**exponent), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**scaling, "rope_theta": theta}
    config = SimpleNamespace(
        rope_parameters=parameters,
        rope_scaling=parameters,
        rope_theta=theta,
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_positions,
        standardize_rope_params=lambda: None,
    )
    inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, device=None)
    return inv_freq, float(attention_scaling)
