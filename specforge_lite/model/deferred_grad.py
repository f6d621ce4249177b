"""Weights and tables that every TTT step reads and whose gradient is formed once, after the last of them.

Autograd would form a gradient per step and add them up, in the compute dtype: K - 1 additions of whole matrices, in
bf16 a loss of precision as well. Here each step's backward only leaves what it has (its rows), and the gradient is one
matrix product over the rows of all steps, summed in fp32.

    anchor = _Anchor(parameters)        every use takes the anchor as an input, so its backward runs after theirs
    use k backward: collect(x, grad)    nothing is returned for the anchor
    anchor backward: the collected rows become the gradient of the parameters

Letters: R rows of a step, I input width, O output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_lite.model.gemm import add_product

# Rows that may wait for their matrix product; bounds the memory of the collected gradients of long batches.
MAX_PENDING_ROWS = 8192


class LateWeight:
    """[O, I] matrix in the compute dtype, made of the rows of `parts` (parameters or views of them, fp32 or wider)."""

    def __init__(self, parts: list[Tensor], dtype: torch.dtype) -> None:
        with torch.no_grad():
            self.value_OI = torch.cat([part.to(dtype) for part in parts]) if len(parts) > 1 else parts[0].to(dtype)
            if self.value_OI.stride(-1) != 1:
                self.value_OI = self.value_OI.contiguous()
        self._sizes = [len(part) for part in parts]
        self._pending: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        self._grad_OI: Tensor | None = None
        self.anchor = _WeightAnchor.apply(self, *parts)

    def __call__(self, x_RI: Tensor, add_RO: Tensor | None = None, first: int = 0, stop: int | None = None) -> Tensor:
        """add + x @ rows[first:stop]^T."""
        stop = len(self.value_OI) if stop is None else stop
        return _LateLinear.apply(x_RI, add_RO, self.anchor, self, first, stop)  # type: ignore[no-any-return]

    def collect(self, x_RI: Tensor, grad_RO: Tensor, first: int, stop: int) -> None:
        """Keep a use's rows until enough of them are there."""
        pending = self._pending.setdefault((first, stop), [])
        pending.append((x_RI, grad_RO))
        wide = x_RI.dtype == torch.promote_types(x_RI.dtype, torch.float32)  # then a GEMM adds up at no cost
        if wide or sum(len(x) for x, _ in pending) >= MAX_PENDING_ROWS:
            self._form(first, stop)

    def _form(self, first: int, stop: int) -> None:
        pending = self._pending.pop((first, stop))
        x = pending[0][0] if len(pending) == 1 else torch.cat([x for x, _ in pending])
        grad = pending[0][1] if len(pending) == 1 else torch.cat([grad for _, grad in pending])
        whole = (first, stop) == (0, len(self.value_OI))
        new = self._grad_OI is None
        if self._grad_OI is None:
            make = torch.empty if whole else torch.zeros
            accumulate = torch.promote_types(x.dtype, torch.float32)
            self._grad_OI = make(self.value_OI.shape, dtype=accumulate, device=x.device)
        add_product(self._grad_OI[first:stop], grad, x, first=new)

    def take(self) -> list[Tensor]:
        """The gradients of `parts`; forgets them."""
        for first, stop in sorted(self._pending, key=lambda rows: rows[0] - rows[1]):  # the widest first
            self._form(first, stop)
        grad_OI, self._grad_OI = self._grad_OI, None
        if grad_OI is None:
            grad_OI = torch.zeros_like(self.value_OI)
        return list(grad_OI.split(self._sizes))


class _WeightAnchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, late: LateWeight, *parts: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.late, ctx.dtypes = late, [part.dtype for part in parts]
        return parts[0].new_empty(0)

    @staticmethod
    def backward(ctx, _grad: Tensor):  # type: ignore[no-untyped-def, override]
        return None, *(grad.to(dtype) for grad, dtype in zip(ctx.late.take(), ctx.dtypes))


class _LateLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, x_RI: Tensor, add_RO: Tensor | None, _anchor: Tensor, late: LateWeight, first: int, stop: int
    ) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.late, ctx.rows = late, (first, stop)
        weight_IO = late.value_OI[first:stop].T
        return x_RI @ weight_IO if add_RO is None else torch.addmm(add_RO, x_RI, weight_IO)

    @staticmethod
    def backward(ctx, grad_RO: Tensor):  # type: ignore[no-untyped-def, override]
        (x_RI,) = ctx.saved_tensors
        first, stop = ctx.rows
        ctx.late.collect(x_RI, grad_RO, first, stop)
        grad_RI = grad_RO @ ctx.late.value_OI[first:stop] if ctx.needs_input_grad[0] else None
        return grad_RI, grad_RO if ctx.needs_input_grad[1] else None, None, None, None, None


class LateTable:
    """[E, O] rows made once and read by several steps; their gradients are added into one buffer."""

    def __init__(self, table_EO: Tensor) -> None:
        self._value_EO = table_EO.detach()
        self._grad_EO: Tensor | None = None
        self._anchor = _TableAnchor.apply(self, table_EO)

    def rows(self, places_R: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
        """Columns first..stop of some rows."""
        stop = self._value_EO.shape[1] if stop is None else stop
        return _TableRows.apply(self._anchor, self, places_R, first, stop)  # type: ignore[no-any-return]

    def pick(self, places_R: Tensor, first: int, stop: int) -> Tensor:
        return self._value_EO[:, first:stop].index_select(0, places_R)

    def add(self, grad_RO: Tensor, places_R: Tensor, first: int, stop: int) -> None:
        if self._grad_EO is None:
            dtype = torch.promote_types(grad_RO.dtype, torch.float32)
            self._grad_EO = torch.zeros(self._value_EO.shape, dtype=dtype, device=grad_RO.device)
        self._grad_EO[:, first:stop].index_add_(0, places_R, grad_RO.to(self._grad_EO.dtype))

    def take(self) -> Tensor:
        """The gradient of the table; forgets it."""
        grad_EO, self._grad_EO = self._grad_EO, None
        return torch.zeros_like(self._value_EO) if grad_EO is None else grad_EO.to(self._value_EO.dtype)


class _TableAnchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: LateTable, table_EO: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.table = table
        return table_EO.new_empty(0)

    @staticmethod
    def backward(ctx, _grad: Tensor):  # type: ignore[no-untyped-def, override]
        return None, ctx.table.take()


class _TableRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, _anchor: Tensor, table: LateTable, places_R: Tensor, first: int, stop: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(places_R)
        ctx.table, ctx.columns = table, (first, stop)
        return table.pick(places_R, first, stop)

    @staticmethod
    def backward(ctx, grad_RO: Tensor):  # type: ignore[no-untyped-def, override]
        (places_R,) = ctx.saved_tensors
        ctx.table.add(grad_RO, places_R, *ctx.columns)
        return None, None, None, None, None
