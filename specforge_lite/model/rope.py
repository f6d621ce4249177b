"""Rotary position embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from specforge_lite.model.draft import DraftConfig


class RotaryEmbedding(nn.Module):
    """cos and sin of integer positions, half the head width each (the other half is the same), fp32."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None, max_positions: int) -> None:
        super().__init__()
        inv_freq, self.attention_scaling = _frequencies(head_dim, theta, scaling, max_positions)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @classmethod
    def of(cls, config: DraftConfig) -> RotaryEmbedding:
        """That of a draft."""
        return cls(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [...] int64 -> (cos, sin) [..., 1, head_dim / 2], to be broadcast over heads."""
        cos, sin = self.table(position_ids).unsqueeze(-3).unbind(-2)
        return cos, sin

    @torch.no_grad()
    def table(self, position_ids: Tensor) -> Tensor:
        """[..., 2, head_dim / 2]: cos and sin of positions."""
        angles = position_ids.unsqueeze(-1) * self.inv_freq.float()
        return torch.stack([angles.cos(), angles.sin()], -2) * self.attention_scaling


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., heads, d] with its halves rotated against each other, as Llama checkpoints expect; same dtype.
    cos, sin [..., 1, d / 2]."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if not torch.is_grad_enabled():
        return _rotate(x, cos, sin, 1)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    """Its transpose rotates back, so nothing but cos and sin is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out


def _frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any] | None, max_positions: int
) -> tuple[Tensor, float]:
    if not scaling or scaling.get("rope_type", "default") == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (theta**exponent), 1.0
    from specforge_lite.model.scaled_rope import scaled_frequencies

    return scaled_frequencies(head_dim, theta, scaling, max_positions)
