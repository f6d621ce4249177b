"""Matrix products into memory that is there already, and sums of them in fp32."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# Adding bf16 to fp32 makes an fp32 copy first: of this many rows at a time, so that it stays in the cache.
ADD_ROWS = 1024


def equal_chunks(length: int, at_most: int) -> list[slice]:
    """0..length cut into as few chunks of at most that size as possible, sizes as equal as they can be, largest first.

    A last chunk of a few rows would cost a whole pass over the weights.
    """
    count = -(-length // at_most)
    bounds = [-(-length * i // count) for i in range(count + 1)] if count else [0]
    return [slice(first, stop) for first, stop in pairwise(bounds)]


def matmul_into(buffer: Tensor | None, rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight^T, into `buffer` where it is large enough: fresh pages cost a CPU a third of such a product."""
    if buffer is None or len(buffer) < len(rows):
        return rows @ weight.T
    return torch.mm(rows, weight.T, out=buffer[: len(rows)])


def add_product(total_OI: Tensor, left_RO: Tensor, right_RI: Tensor, first: bool) -> None:
    """total += left^T @ right (the first time: total = ...), total in fp32 or wider."""
    if total_OI.dtype != left_RO.dtype:
        product = left_RO.T @ right_RI
        for total, part in zip(total_OI.split(ADD_ROWS), product.split(ADD_ROWS)):
            total.copy_(part) if first else total.add_(part)
    elif first:
        torch.mm(left_RO.T, right_RI, out=total_OI)
    else:
        total_OI.addmm_(left_RO.T, right_RI)


class RepeatedMatrix:
    """A matrix [O, I] that many rows are multiplied with, from both sides.

    On a CPU it is laid out once in the blocks that oneDNN's kernels read; a plain product does that anew every time
    (measured: 4% of a training step). Elsewhere these are plain products.
    """

    def __init__(self, weight_OI: Tensor, rows_per_product: int) -> None:
        self._weight_OI = weight_OI
        self._blocks: tuple[Tensor, Tensor] | None = None
        self._buffer: Tensor | None = None
        if _has_blocked_products(weight_OI):
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self._blocks = (reorder(weight_OI, rows_per_product), reorder(weight_OI.T, rows_per_product))

    def times_transposed(self, x_RI: Tensor) -> Tensor:
        """x @ W^T [R, O]; may be in the memory of the result before, which is then overwritten."""
        if self._blocks is None:
            self._buffer = matmul_into(self._buffer, x_RI, self._weight_OI)
            return self._buffer
        return _blocked_product(x_RI, self._blocks[0])

    def times(self, x_RO: Tensor) -> Tensor:
        """x @ W [R, I]."""
        return x_RO @ self._weight_OI if self._blocks is None else _blocked_product(x_RO, self._blocks[1])


def _has_blocked_products(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not a public operator: torch.compile's own
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _blocked_product(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")  # type: ignore[no-any-return]
