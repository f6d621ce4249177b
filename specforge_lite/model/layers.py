"""The draft's decoder layer and its parts, named as Llama checkpoints name them.

Letters: D hidden width, F feed-forward width, H / G query / key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, rms_norm, silu

from specforge_lite.model.rope import apply_rope

if TYPE_CHECKING:
    from specforge_lite.model.draft import Attend, DraftConfig

P = ParamSpec("P")
R = TypeVar("R")

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
    """Weights of attention: q, k, v of the layer's input, o back to the state. Biases, and norms of queries and keys
    (Qwen3's; block drafts have them), are there in some checkpoints of others."""

    def __init__(self, config: DraftConfig, in_width: int, head_norms: bool) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(in_width, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(in_width, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(in_width, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=False)
        self.q_norm: RMSNorm | None = RMSNorm(head_dim, config.rms_norm_eps) if head_norms else None
        self.k_norm: RMSNorm | None = RMSNorm(head_dim, config.rms_norm_eps) if head_norms else None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); other activations by transformers' names `gelu`, `gelu_pytorch_tanh`, `relu`."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor, compiled: bool = False) -> Tensor:
        gate_up = torch.cat([project(x, self.gate_proj), project(x, self.up_proj)], -1)
        return project(gated(gate_up, self.activation, compiled), self.down_proj)


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in the dtype of its input, whatever that of its weights."""
    return linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


class DraftLayer(nn.Module):
    """x -> attention, added to `residual` -> post_attention_layernorm -> SwiGLU, added.

    EAGLE-3: x = [input_layernorm(e) ; hidden_norm(h)], 2D wide, and the residual is the un-normed h.
    EAGLE-1: x = fc [e ; h], D wide, is its own residual; no norms before it.
    Block drafts: x = input_layernorm(h), residual h; keys of the context as well (`model/block.py`).
    `forward` decodes; EAGLE's training runs the same layer over packed rows (`model/unroll.py`).
    """

    hidden_norm: RMSNorm
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm

    def __init__(self, config: DraftConfig, in_width: int, norms: Sequence[str] = (), head_norms: bool = False) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.self_attn = Projections(config, in_width, head_norms)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.hidden_act)
        for name in (*norms, "post_attention_layernorm"):
            self.add_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., in] -> [..., H, d] after norm and RoPE."""
        q = project(x, self.self_attn.q_proj).unflatten(-1, (-1, self.head_dim))
        return apply_rope(q if self.self_attn.q_norm is None else self.self_attn.q_norm(q), cos, sin)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., in] -> (keys after norm and RoPE, values) [..., G, d]."""
        layers = (self.self_attn.k_proj, self.self_attn.v_proj)
        k, v = (project(x, layer).unflatten(-1, (-1, self.head_dim)) for layer in layers)
        return apply_rope(k if self.self_attn.k_norm is None else self.self_attn.k_norm(k), cos, sin), v

    def finish(self, residual: Tensor, attended: Tensor, compiled: bool = False) -> Tensor:
        """Output projection of [..., H, d] and feed-forward, both added."""
        state = residual + project(attended.flatten(-2), self.self_attn.o_proj)
        return state + self.mlp(self.post_attention_layernorm(state), compiled)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, residual_BTD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x [B, T, in] -> state [B, T, D]. rope: cos and sin."""
        parts = (self.queries(x, *rope), *self.keys_values(x, *rope))
        attended = attend(*(part.transpose(1, 2) for part in parts))
        return self.finish(residual_BTD, attended.transpose(1, 2))


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
        return maybe_fused(silu_gate, compiled)(gate_up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        return maybe_fused(silu_gate_backward, ctx.compiled)(grad, *ctx.saved_tensors), None


def maybe_fused(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    """A module-level function, or its compiled form."""
    if not compiled:
        return function
    from specforge_lite.model.fused import fused

    return fused(function)


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def silu_gate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * silu(gate)], -1)
