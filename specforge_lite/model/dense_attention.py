"""Attention over the step-0 keys with stored probabilities: for CPUs, where rows are few.

The flash kernel for CPUs runs at half the rate of plain matrix products, and its backward makes every probability anew.
Up to about a thousand tokens all probabilities of a training pass fit in a few MB per step, so here they are kept: two
matrix products forward, four backward, each at its full rate. Rows are taken in blocks, so that of the keys after a row
only those inside its own block are computed for nothing.

Letters: R rows, N step-0 keys, H query heads, G key heads, g = H / G, d head width; r rows of a block times g, n keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from specforge_lite.model.row_plan import Segment

BLOCK_ROWS = 96
# Probabilities kept per step; above this, flash attention: it needs no memory for them.
MAX_PROBABILITIES = 2 << 20


class Step0Block(Protocol):
    """Attention over the step-0 keys alone."""

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """-> (output [R, H, d], logsumexp of the scores [R, H] in fp32 or wider, what backward wants kept)."""
        ...

    def backward(
        self,
        grad_RHd: Tensor,
        q_RHd: Tensor,
        k0_NGd: Tensor,
        v0_NGd: Tensor,
        out_RHd: Tensor,
        z_RH: Tensor,
        kept: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k0, v0 where each probability is exp(score - z) and `out` the output of ALL keys."""
        ...


@dataclass(frozen=True)
class RowBlock:
    """Rows [start, stop) of a step and the keys [first_key, last_key) they see; hidden: [rows, 1, keys from
    `first_hidden` on] True where a key comes after the row."""

    start: int
    stop: int
    first_key: int
    last_key: int
    first_hidden: int
    hidden: Tensor


def row_blocks(segments: list[Segment]) -> list[RowBlock]:
    """The rows of all segments in blocks of at most BLOCK_ROWS."""
    blocks = []
    for segment in segments:
        count = segment.compact_stop - segment.compact_start
        places = torch.arange(count) if segment.index is None else segment.index
        keys_R = segment.start + places  # the key of a row's own token
        parts = -(-count // BLOCK_ROWS)
        bounds = [count * i // parts for i in range(parts + 1)]
        for first, stop in pairwise(bounds):
            own = keys_R[first:stop]
            first_hidden, last_key = int(own[0]) + 1, int(own[-1]) + 1
            hidden = torch.arange(first_hidden, last_key)[None, None] > own[:, None, None]
            start = segment.compact_start + first
            blocks.append(RowBlock(start, start + stop - first, segment.key_start, last_key, first_hidden, hidden))
    return blocks


def num_probabilities(segments: list[Segment], num_heads: int) -> int:
    """At most so many are kept."""
    return sum((s.compact_stop - s.compact_start) * (s.stop - s.key_start) for s in segments) * num_heads


class CpuDense:
    """Keeps the log-sum-exp and the probabilities of each block of rows for backward."""

    def __init__(self, segments: list[Segment]) -> None:
        self._blocks = row_blocks(segments)

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        groups, kept = k0_NGd.shape[1], []
        keys_GdN, values_GNd = k0_NGd.permute(1, 2, 0).contiguous(), v0_NGd.transpose(0, 1)
        out_RHd = torch.empty_like(q_RHd, memory_format=torch.contiguous_format)
        lse_RH = q_RHd.new_empty(q_RHd.shape[:2])
        q_RHd = q_RHd * (1 / math.sqrt(q_RHd.shape[2]))
        for block in self._blocks:
            keys = slice(block.first_key, block.last_key)
            scores_Grn = torch.bmm(_by_key_head(q_RHd[block.start : block.stop], groups), keys_GdN[:, :, keys])
            _hide(scores_Grn, block)
            top_Gr = scores_Grn.amax(-1)
            torch.softmax(scores_Grn, -1, out=scores_Grn)
            # logsumexp = top - log(p of the top); that p is at least 1 / n, so the log is safe
            lse_Gr = top_Gr - scores_Grn.amax(-1).log_()
            _put(out_RHd, block, torch.bmm(scores_Grn, values_GNd[:, keys]))
            _put(lse_RH.unsqueeze(-1), block, lse_Gr.unsqueeze(-1))
            kept.append(scores_Grn)
        return out_RHd, lse_RH, [lse_RH, *kept]

    def backward(
        self,
        grad_RHd: Tensor,
        q_RHd: Tensor,
        k0_NGd: Tensor,
        v0_NGd: Tensor,
        out_RHd: Tensor,
        z_RH: Tensor,
        kept: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A kept probability P is of the step-0 keys alone; among all keys it is f P, f = exp(lse - z).

        dV = P^T (f dO), dP = f dO V^T, dS = P (dP - f rowsum(dO O)): f goes to dO and to the row sums.
        """
        groups, scale = k0_NGd.shape[1], 1 / math.sqrt(q_RHd.shape[2])
        factor_RH = (kept[0] - z_RH).exp_()
        delta_RH = (grad_RHd * out_RHd).sum(-1).mul_(factor_RH)
        grad_RHd = grad_RHd * factor_RH.unsqueeze(-1)
        dq_RHd, q_RHd = torch.empty_like(q_RHd, memory_format=torch.contiguous_format), q_RHd * scale
        keys_GNd, values_GdN = k0_NGd.transpose(0, 1), v0_NGd.permute(1, 2, 0).contiguous()
        dk_GNd, dv_GNd = (torch.zeros_like(keys_GNd, memory_format=torch.contiguous_format) for _ in range(2))
        for block, probabilities_Grn in zip(self._blocks, kept[1:]):
            rows, keys = slice(block.start, block.stop), slice(block.first_key, block.last_key)
            grad_Grd = _by_key_head(grad_RHd[rows], groups)
            d_scores_Grn = torch.bmm(grad_Grd, values_GdN[:, :, keys])
            d_scores_Grn.sub_(_by_key_head(delta_RH[rows].unsqueeze(-1), groups)).mul_(probabilities_Grn)
            _put(dq_RHd, block, torch.bmm(d_scores_Grn, keys_GNd[:, keys]))
            dk_GNd[:, keys].baddbmm_(d_scores_Grn.transpose(1, 2), _by_key_head(q_RHd[rows], groups))
            dv_GNd[:, keys].baddbmm_(probabilities_Grn.transpose(1, 2), grad_Grd)
        return dq_RHd.mul_(scale), dk_GNd.transpose(0, 1), dv_GNd.transpose(0, 1)


def _by_key_head(x_RHd: Tensor, groups: int) -> Tensor:
    """[rows, H, d] -> [G, rows * g, d]."""
    return x_RHd.unflatten(1, (groups, -1)).permute(1, 0, 2, 3).flatten(1, 2)


def _put(target_RHd: Tensor, block: RowBlock, x_Grd: Tensor) -> None:
    """The other way round, into the block's rows."""
    groups = len(x_Grd)
    target = target_RHd[block.start : block.stop].unflatten(1, (groups, -1))
    target.copy_(x_Grd.unflatten(1, (len(target), -1)).permute(1, 0, 2, 3))


def _hide(scores_Grn: Tensor, block: RowBlock) -> None:
    rows = block.stop - block.start
    after = scores_Grn.view(len(scores_Grn), rows, -1, scores_Grn.shape[2])[..., block.first_hidden - block.first_key :]
    after.masked_fill_(block.hidden, float("-inf"))
