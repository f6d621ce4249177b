"""The draft's decoder layer and its parts, named as Llama checkpoints name them.

Letters: D hidden width, F feed-forward width, H / G query / key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, rms_norm, silu

from specforge_lite.model.fused import fused

if TYPE_CHECKING:
    from specforge_lite.model.draft import Attend, DraftConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "swish": silu,
    "relu": relu,
    "gelu": gelu,
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
}


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not torch.is_grad_enabled():  # one fused kernel, where weight and input are of one dtype
            return rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number per row, where torch's parts keep two more copies of x in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        x, weight, scale = ctx.saved_tensors
        normed, wide_grad = x * scale, grad.to(scale.dtype)
        grad_weight = (wide_grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        wide_grad = wide_grad * weight
        mean = (wide_grad * normed).mean(-1, keepdim=True)
        return wide_grad.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), grad_weight, None


class Projections(nn.Module):
    """q, k, v of a layer's input, o back to the state. No biases, and no norms of queries and keys, unless a checkpoint
    of others has them."""

    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(self, in_width: int, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(in_width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(in_width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(in_width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.register_module("q_norm", None)
        self.register_module("k_norm", None)
        self.head_dim, self.num_kv_heads = head_dim, kv_heads
        self.qkv: Callable[[Tensor], Tensor] | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., in] -> (queries and keys [..., H + G, d], values [..., G, d])."""
        if self.qkv is not None:
            qkv = self.qkv(x)
        else:
            qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        qk, v = heads[..., : -self.num_kv_heads, :], heads[..., -self.num_kv_heads :, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk[..., : -self.num_kv_heads, :], qk[..., -self.num_kv_heads :, :]
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], -2)
        return qk, v

    def fuse(self) -> None:
        self.qkv = _joined([self.q_proj, self.k_proj, self.v_proj])


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); other activations by transformers' names `gelu`, `gelu_pytorch_tanh`, `relu`."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = activation
        self.gate_up: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up is None:
            inner = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        else:
            gate, up = self.gate_up(x).chunk(2, -1)
            inner = ACTIVATIONS[self.activation](gate) * up
        return self.down_proj(inner)  # type: ignore[no-any-return]

    def fuse(self) -> None:
        self.gate_up = _joined([self.gate_proj, self.up_proj])


def _joined(layers: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
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


class DraftLayer(nn.Module):
    """x -> attention, added to `residual` -> post_attention_layernorm -> SwiGLU, added.

    EAGLE-3 (`input_norms`): x = [input_layernorm(e) ; hidden_norm(h)], 2D wide, and the residual is the un-normed h.
    EAGLE-1: x = fc [e ; h], D wide, is its own residual. `forward` decodes; training runs the same layer over packed
    rows (`model/unroll.py`).
    """

    def __init__(self, config: DraftConfig, in_width: int, input_norms: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Projections(
            in_width, width, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.mlp = SwiGLU(width, config.intermediate_size, config.hidden_act)
        if input_norms:
            self.hidden_norm = RMSNorm(width, eps)
            self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)

    def forward(self, x: Tensor, residual_BTD: Tensor, rope: Callable[[Tensor], Tensor], attend: Attend) -> Tensor:
        """x [B, T, in] -> state [B, T, D]. rope: rotates [B, T, heads, d]."""
        attention = self.self_attn
        qk, v = attention.project(x)
        qk_BHTd = rope(qk).transpose(1, 2)
        q, k = qk_BHTd[:, : -attention.num_kv_heads], qk_BHTd[:, -attention.num_kv_heads :]
        attended = attend(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
        state = residual_BTD + attention.o_proj(attended)
        return state + self.mlp(self.post_attention_layernorm(state))  # type: ignore[no-any-return]

    def fuse(self) -> None:
        """For decoding: fewer products; a chain step of a small draft costs dispatch, not arithmetic."""
        self.self_attn.fuse()
        self.mlp.fuse()


def gated(gate_up: Tensor, activation: str, compiled: bool = False) -> Tensor:
    """[..., 2F] = [gate ; up] -> activation(gate) * up [..., F], keeping only the input for backward."""
    if activation in ("silu", "swish"):
        return _SiluGate.apply(gate_up, compiled)  # type: ignore[no-any-return]
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


class _SiluGate(torch.autograd.Function):
    """The sigmoid is cheap to make again, F floats per row are not."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, compiled: bool) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(gate_up)
        ctx.compiled = compiled
        return fused(silu_gate, compiled)(gate_up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        return fused(silu_gate_backward, ctx.compiled)(grad, *ctx.saved_tensors), None


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def silu_gate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * silu(gate)], -1)
