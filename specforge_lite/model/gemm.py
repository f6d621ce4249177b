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
