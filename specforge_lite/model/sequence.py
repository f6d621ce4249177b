"""Sequence parallelism of the training step: processes share one packed batch, and each has some of its rows.

    rows t of the batch    0 1 2 | 3 4 5 | 6 7 8 | 9 10 11
    process 0 of 2         own                     own         needs the step-0 keys and values of all rows
    process 1 of 2                 own     own                 the same

Only the step-0 block of attention looks at other rows, so its keys and values are all that travels: each process makes
those of its own rows, and their sum over the group (every other entry is zero) is the whole. Everything else of a row,
at every step k, belongs to its owner: q, o, MLP, the single keys, teacher, head and loss. So time and memory of all of
it shrink with the size of the group, and gradients of the weights are sums over the group.

Letters: N step-0 key rows of the batch, R own ones, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What a row costs that gives a key and a value at step 0 and nothing else, in rows of one step: fc, k and v.
KEY_ROW_COST = 0.2


@dataclass(frozen=True)
class SequenceGroup:
    """This process's place among those that share a batch. group: their process group."""

    rank: int
    size: int
    group: Any

    def own_rows(self, predictable_N: Tensor, doc_offsets: list[int], num_steps: int) -> Tensor:
        """bool [N] on the CPU: the rows of this process, see `own_rows`."""
        return own_rows(predictable_N, doc_offsets, num_steps, self.rank, self.size)

    def share(self, key_RGd: Tensor, value_RGd: Tensor, places_R: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """Own keys and values -> those of all N rows [N, G, d]. Every process of the group calls it, and its backward,
        equally often."""
        shared = _Share.apply(torch.stack([key_RGd, value_RGd]), places_R, num_keys, self.group)
        return shared[0], shared[1]


class _Share(torch.autograd.Function):
    """A sum of zero-padded parts: twice the traffic of an all-gather, but parts need not be equal."""

    @staticmethod
    def forward(ctx, own_2RGd: Tensor, places_R: Tensor, num_keys: int, group: Any) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(places_R)
        ctx.group = group
        whole = own_2RGd.new_zeros(2, num_keys, *own_2RGd.shape[2:]).index_copy_(1, places_R, own_2RGd)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, grad_2NGd: Tensor):  # type: ignore[no-untyped-def, override]
        (places_R,) = ctx.saved_tensors
        grad = grad_2NGd.contiguous()  # what this process's rows gave
        dist.all_reduce(grad, group=ctx.group)
        return grad.index_select(1, places_R), None, None, None


def own_rows(predictable_N: Tensor, doc_offsets: list[int], num_steps: int, rank: int, size: int) -> Tensor:
    """bool [N] on the CPU: the rows of process `rank` of `size`.

    predictable_N: supervised tokens (`rows.predictable_tokens`), known to every process. The batch is cut into 2 * size
    parts of equal cost, a row counting once for each step that needs it and a little as a key row; process r has part r
    from the front and part r from the back. So it has as many rows as the others, and of a long document its rows see
    as many keys. No supervised token: nobody owns anything.
    """
    predictable_N = predictable_N.cpu()
    cost_N = torch.zeros(len(predictable_N), dtype=torch.float64)
    for start, stop in pairwise(doc_offsets):
        steps_L = needed_steps(predictable_N[start:stop], num_steps)
        needed = steps_L.nonzero()
        if len(needed):
            keys = int(needed[-1]) + 1
            cost_N[start : start + keys] = KEY_ROW_COST + steps_L[:keys]
    total = float(cost_N.sum())
    part_N = ((cost_N.cumsum(0) - cost_N / 2) * (2 * size / max(total, 1e-9))).long()
    return (cost_N > 0) & ((part_N == rank) | (part_N == 2 * size - 1 - rank))


def needed_steps(predictable_L: Tensor, num_steps: int) -> Tensor:
    """int64 [L]: how many steps need row t of a document: up to the last k for which token t + 2 + k is supervised."""
    steps_L = torch.zeros(len(predictable_L), dtype=torch.int64)
    for k in range(num_steps):
        ahead = predictable_L[2 + k :]
        steps_L[: len(ahead)][ahead] = k + 1
    return steps_L
