"""Weights that every TTT step reads and whose gradient autograd receives once, after the last of them.

Autograd would form a gradient per step and add them up in the compute dtype: K - 1 additions of whole matrices, in bf16
a loss of precision as well. Here the backward of each use adds its matrix product to one fp32 buffer.

    anchor = _Anchor(parameters)      every use takes the anchor as an input, so its backward runs after theirs
    use k backward: weight.grad += grad_out^T x      nothing is returned for the anchor
    anchor backward: the buffer becomes the gradient of the parameters

Letters: R rows of a step, I input width, O output width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DeferredWeight:
    """[O, I] matrix in the compute dtype, made of the rows of `parts` (parameters or views of them)."""

    def __init__(self, parts: list[Tensor], dtype: torch.dtype) -> None:
        with torch.no_grad():
            casts = [part.to(dtype) for part in parts]
            self.value_OI = torch.cat(casts) if len(casts) > 1 else casts[0].contiguous()
        self.grad_OI: Tensor | None = None
        self._sizes = [len(part) for part in parts]
        self._anchor = _Anchor.apply(self, *parts)

    def __call__(self, x_RI: Tensor, add_RO: Tensor | None = None) -> Tensor:
        """add + x @ W^T."""
        return _DeferredLinear.apply(x_RI, add_RO, self._anchor, self)  # type: ignore[no-any-return]

    def take_gradients(self) -> list[Tensor]:
        """The gradients of `parts`, summed in fp32 or wider; forgets them."""
        grad_OI, self.grad_OI = self.grad_OI, None
        return list((torch.zeros_like(self.value_OI) if grad_OI is None else grad_OI).split(self._sizes))


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: DeferredWeight, *parts: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.weight, ctx.dtypes = weight, [part.dtype for part in parts]
        return parts[0].new_empty(0)

    @staticmethod
    def backward(ctx, _grad: Tensor):  # type: ignore[no-untyped-def, override]
        return None, *(grad.to(dtype) for grad, dtype in zip(ctx.weight.take_gradients(), ctx.dtypes))


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, x_RI: Tensor, add_RO: Tensor | None, _anchor: Tensor, weight: DeferredWeight
    ) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.weight = weight
        return x_RI @ weight.value_OI.T if add_RO is None else torch.addmm(add_RO, x_RI, weight.value_OI.T)

    @staticmethod
    def backward(ctx, grad_RO: Tensor):  # type: ignore[no-untyped-def, override]
        (x_RI,) = ctx.saved_tensors
        weight = ctx.weight
        weight.grad_OI = add_product(weight.grad_OI, grad_RO, x_RI)
        grad_RI = grad_RO @ weight.value_OI if ctx.needs_input_grad[0] else None
        return grad_RI, grad_RO if ctx.needs_input_grad[1] else None, None, None


def add_product(total_OI: Tensor | None, left_RO: Tensor, right_RI: Tensor) -> Tensor:
    """total + left^T @ right, in place where there is a total; in fp32, or wider for wider inputs."""
    dtype = left_RO.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == wide:
        return left_RO.T @ right_RI if total_OI is None else total_OI.addmm_(left_RO.T, right_RI)
    if left_RO.device.type == "cpu":  # no 16-bit product there has a 32-bit result
        product = left_RO.T @ right_RI
        return product.to(wide) if total_OI is None else total_OI.add_(product)
    if total_OI is None:
        return torch.mm(left_RO.T, right_RI, out_dtype=wide)
    return torch.addmm(total_OI, left_RO.T, right_RI, out_dtype=wide, out=total_OI)
