"""Flash attention over the step-0 keys of packed documents, by the segments that a step's rows lie in.

Letters: R rows of a step, N step-0 keys, H / G query / key heads, d head width, P rows of all segments with their
holes, S keys of all segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_lite.model.row_plan import MAX_GAP, Segment, StepRows

# Keys of a document are copied once per segment of its rows; segments are joined until all copies are at most this
# many times the keys.
MAX_KEY_COPIES = 8


@dataclass(frozen=True)
class FlashRows:
    """The segments of a step as sequences of one variable-length call.

    query_places [P]: row of each query, any row for a hole; None: the rows as they are. holes [P] bool. row_places [R]:
    where each row lies among the P. key_places [S]: None: the keys as they are. offsets: int32, one more than segments.
    """

    segments: list[Segment]
    query_places: Tensor | None
    holes: Tensor | None
    row_places: Tensor | None
    key_places: Tensor | None
    query_offsets: Tensor
    key_offsets: Tensor
    max_queries: int
    max_keys: int


def flash_rows(rows: StepRows, num_keys: int, max_copies: float = MAX_KEY_COPIES) -> FlashRows:
    """Plan the call. Segments of one document share its keys, which are then copied, or joined where there are many."""
    segments, gap = rows.segments, MAX_GAP
    while sum(s.stop - s.key_start for s in segments) > max_copies * num_keys and gap < num_keys:
        gap *= 2
        segments = _join(segments, gap)
    queries, keys = [s.stop - s.start for s in segments], [s.stop - s.key_start for s in segments]
    query_offsets, key_offsets = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (queries, keys))
    shifts = query_offsets[:-1] - torch.tensor([s.start for s in segments], dtype=torch.int64)
    counts = torch.tensor([s.compact_stop - s.compact_start for s in segments], dtype=torch.int64)
    row_places = rows.key_rows + shifts.repeat_interleave(counts)
    holes = torch.ones(sum(queries), dtype=torch.bool)
    holes[row_places] = False
    query_places = torch.zeros(len(holes), dtype=torch.int64)
    query_places[row_places] = torch.arange(len(row_places))
    key_places = torch.cat([torch.zeros(0).long(), *(torch.arange(s.key_start, s.stop) for s in segments)])
    as_they_are = len(key_places) == num_keys and bool((key_places == torch.arange(num_keys)).all())
    padded = len(holes) > len(row_places)
    return FlashRows(
        segments=segments,
        query_places=query_places if padded else None,
        holes=holes if padded else None,
        row_places=row_places if padded else None,
        key_places=None if as_they_are else key_places,
        query_offsets=query_offsets.int(),
        key_offsets=key_offsets.int(),
        max_queries=max(queries, default=0),
        max_keys=max(keys, default=0),
    )


def _join(segments: Sequence[Segment], max_gap: int) -> list[Segment]:
    """Neighbours of one document with a hole of at most `max_gap` rows become one segment with that hole."""
    joined: list[Segment] = []
    for right in segments:
        left = joined[-1] if joined else None
        if left is not None and left.key_start == right.key_start and right.start - left.stop <= max_gap:
            joined[-1] = left._replace(compact_stop=right.compact_stop, stop=right.stop)
        else:
            joined.append(right)
    return joined


class Flash:
    """A flash kernel over all segments of a step; `call` and `call_backward` see queries with holes."""

    max_copies: float

    def __init__(self, rows: FlashRows) -> None:
        self.rows = rows

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        """-> (output [R, H, d], logsumexp of the scores [R, H] in fp32 or wider)."""
        out_PHd, lse_PH = self.call(take(q_RHd, self.rows.query_places), k0_NGd, v0_NGd)
        return take(out_PHd, self.rows.row_places), take(lse_PH, self.rows.row_places)

    def backward(
        self, grad_RHd: Tensor, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_RHd: Tensor, z_RH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k0, v0 where each probability is exp(score - z) and `out` the output of ALL keys."""
        rows = self.rows
        grad, q, out, z_PH = (take(x, rows.query_places) for x in (grad_RHd, q_RHd, out_RHd, z_RH))
        if rows.holes is not None:
            z_PH = z_PH.masked_fill(rows.holes[:, None], float("inf"))  # all their probabilities are then 0
        dq, dk, dv = self.call_backward(grad, q, k0_NGd, v0_NGd, out, z_PH)
        return take(dq, rows.row_places), dk, dv

    def call(self, q_PHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        """-> (output [P, H, d], logsumexp [P, H])."""
        raise NotImplementedError

    def call_backward(
        self, grad_PHd: Tensor, q_PHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_PHd: Tensor, z_PH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> gradients of q [P, H, d], k0, v0 [N, G, d]."""
        raise NotImplementedError


def take(x: Tensor, places: Tensor | None) -> Tensor:
    """Rows of x by place; None: all."""
    return x if places is None else x.index_select(0, places)
