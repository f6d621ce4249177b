"""Building blocks of a draft layer, named as Llama checkpoints name them. D hidden width, F feed-forward width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from specforge_lite.model.fused import fused


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32, as Llama has it: normalise, back to the input's dtype, times the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number per row; gradients of the weight are summed in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        accumulate = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(accumulate)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        x, weight, scale = ctx.saved_tensors
        wide, wide_grad = x.to(scale.dtype), grad.to(scale.dtype)
        normed = wide * scale
        product = wide_grad * normed
        grad_weight = product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        mean = (product @ weight.to(scale.dtype)).unsqueeze(-1) / x.shape[-1]
        grad_x = (wide_grad * weight.to(scale.dtype)).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class Projections(nn.Module):
    """q, k, v from a 2-part input [embedding ; state], o back to the state. No biases."""

    def __init__(self, in_width: int, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(in_width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(in_width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(in_width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); other activations by transformers' names `gelu`, `gelu_pytorch_tanh`, `relu`."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(torch.cat([self.gate_proj(x), self.up_proj(x)], -1), self.activation))  # type: ignore[no-any-return]


def gated(gate_up: Tensor, activation: str, compiled: bool = False) -> Tensor:
    """[..., 2F] = [gate ; up] -> activation(gate) * up [..., F]."""
    if activation in ("silu", "swish"):
        return _SiluGate.apply(gate_up, compiled)  # type: ignore[no-any-return]
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


class _SiluGate(torch.autograd.Function):
    """silu(gate) * up, keeping only its input: the sigmoid is cheap to make again, F floats per row are not."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, compiled: bool) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(gate_up)
        ctx.compiled = compiled
        return (fused(silu_gate_expression) if compiled else silu_gate)(gate_up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        (gate_up,) = ctx.saved_tensors
        return (fused(silu_gate_backward_expression) if ctx.compiled else silu_gate_backward)(grad, gate_up), None


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)


def silu_gate_expression(gate_up: Tensor) -> Tensor:
    """The same as one expression, for torch.compile."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def silu_gate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, -1)
    torch.mul(grad, torch.nn.functional.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return out


def silu_gate_backward_expression(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The same as one expression, for torch.compile."""
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    gate, up = gate_up.to(accumulate).chunk(2, -1)
    wide = grad.to(accumulate)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad_gate = wide * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([grad_gate, wide * silu], -1).to(grad.dtype)
