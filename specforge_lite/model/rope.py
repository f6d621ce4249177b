"""Rotary position embedding. Scaled variants (llama3, yarn, linear, longrope) come from transformers' own formulas."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from specforge_lite.core.errors import ConfigError, suggest


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

    def tables(self, num_positions: int) -> RopeTables:
        """The tables of the first positions."""
        cos, sin = self(torch.arange(num_positions, device=self.inv_freq.device))
        half = cos.shape[-1] // 2
        return RopeTables(cos[:, :half].contiguous(), sin[:, :half].contiguous())


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., heads, d]; cos, sin [..., d] -> rotated x, same dtype."""
    half = x.shape[-1] // 2
    return _Rotate.apply(x, cos[..., :half].unsqueeze(-2), sin[..., :half].unsqueeze(-2))  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin. Its transpose rotates back, so nothing but cos and sin is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos.to(grad.dtype), -sin.to(grad.dtype)), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """x [..., d] rotated by tables of half its width [..., d / 2], into `out` if given."""
    first, second = x.chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def split_rotated(
    rows_RO: Tensor, tables: RopeTables, position_ids_R: Tensor, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Projected rows [R, O] -> queries, keys (after RoPE) and values [R, heads, d] in `dtype`.

    heads: how many of each; any may be 0.
    """
    return _SplitRotated.apply(rows_RO, tables, position_ids_R, heads, dtype)  # type: ignore[no-any-return]


class _SplitRotated(torch.autograd.Function):
    """One output buffer, one gradient buffer: queries, keys and values never need to be cut out or put together."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        rows_RO: Tensor,
        tables: RopeTables,
        position_ids_R: Tensor,
        heads: tuple[int, int, int],
        dtype: torch.dtype,
    ):
        ctx.save_for_backward(position_ids_R)
        ctx.tables, ctx.heads, ctx.dtype = tables, heads, rows_RO.dtype
        x_RHd = rows_RO.unflatten(-1, (sum(heads), -1)).to(dtype)
        out_RHd = torch.empty_like(x_RHd, memory_format=torch.contiguous_format)
        rotated = heads[0] + heads[1]
        cos, sin = tables.at(position_ids_R, dtype)
        rotate(x_RHd[:, :rotated], cos, sin, out=out_RHd[:, :rotated])
        out_RHd[:, rotated:] = x_RHd[:, rotated:]
        return out_RHd.split(heads, dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def, override]
        (position_ids_R,) = ctx.saved_tensors
        cos, sin = ctx.tables.at(position_ids_R, grads[0].dtype)
        num_rows, _, head_dim = grads[0].shape
        out_RHd = torch.empty(num_rows, sum(ctx.heads), head_dim, dtype=grads[0].dtype, device=grads[0].device)
        parts = out_RHd.split(ctx.heads, dim=1)
        for grad, part in zip(grads[:2], parts[:2]):
            rotate(grad, cos, -sin, out=part)
        parts[2].copy_(grads[2])
        return out_RHd.flatten(1).to(ctx.dtype), None, None, None, None


@dataclass(frozen=True)
class RopeTables:
    """cos and sin of positions 0 .. P-1, half the head width each (the other half is the same)."""

    cos_Ph: Tensor
    sin_Ph: Tensor

    def at(self, position_ids_R: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables of some positions, to be broadcast over heads: [R, 1, d / 2] each."""
        pick = lambda table: table.index_select(0, position_ids_R).unsqueeze(1).to(dtype)  # noqa: E731
        return pick(self.cos_Ph), pick(self.sin_Ph)


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
    kind = scaling.get("rope_type")
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ConfigError(f"rope_type: unknown value '{kind}'{suggest(str(kind), ROPE_INIT_FUNCTIONS)}")
    try:
        inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, device=None)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"rope scaling '{kind}' with {scaling}: {type(error).__name__}: {error}") from None
    return inv_freq, float(attention_scaling)
