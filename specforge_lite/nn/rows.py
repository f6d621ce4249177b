"""Which rows of a batch each TTT step has to compute.

A counted token u (supervised, and its teacher token is in the draft vocabulary) is predicted at step k by row
t = u - 2 - k of the same document. With a 10-token document whose tokens 6, 7, 8 are counted and K = 3:

    token        0  1  2  3  4  5  6  7  8  9
    counted                        x  x  x
    head rows, step 0            4  5  6             (u - 2)
    head rows, step 1         3  4  5                (u - 3)
    head rows, step 2      2  3  4                   (u - 4)
    needed rows  step 0: 2..6   step 1: 2..5   step 2: 2..4
    keys         step 0: rows 0..6 (k and v only for 0, 1; nothing for 7..9)

A row of step k >= 1 is read by nobody but the same row at later steps, so a row without a head row at this step or a
later one is not computed. Needed rows shrink with k, because rows t = u - 2 - j, j >= k, are a
subset of those of k - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# A hole of at most this many rows inside a run is attended over and thrown away; a longer one starts a new segment.
MAX_GAP = 32


@dataclass(frozen=True)
class Segment:
    """Rows [compact_start, compact_stop) of a step's needed rows, lying in tokens [start, stop) of one document.

    key_start: first token of the document, counted in step-0 KEY rows, as start and stop are.
    index: where the segment's rows lie in start..stop-1, or None when it has no holes.
    """

    compact_start: int
    compact_stop: int
    start: int
    stop: int
    key_start: int
    index: Tensor | None = None


@dataclass(frozen=True)
class StepRows:
    """Rows of one TTT step. All index tensors are int64 on the plan's device.

    row_tokens: token index t of every needed row. from_previous: its place among the previous step's needed rows
    (None: all of them, in order). key_rows: its place among the step-0 key rows. embed_places: place of token
    t + 1 + k in `RowPlan.embed_tokens`. position_ids: RoPE position, t + k counted in its document.
    segments: the same rows cut where attention may not or need not be contiguous.
    """

    row_tokens: Tensor
    from_previous: Tensor | None
    key_rows: Tensor
    embed_places: Tensor
    position_ids: Tensor
    segments: list[Segment]


@dataclass(frozen=True)
class RowPlan:
    """Everything index-like that a K-step training pass needs, made once per batch on the host.

    key_tokens: tokens whose step-0 key and value exist (those after a document's last needed row do not).
    key_positions: their position inside their document. embed_tokens: every token whose embedding is read; its half of
    q, k, v depends on the token only, so it is projected once and not once per step. key_embed_places: place of token
    t + 1 there for each key token t. predicted_tokens [M]: every counted token u.
    head_places [K, M]: place of row u - 2 - k among the needed rows of step k, or -1 where it lies before the document.
    """

    steps: list[StepRows]
    key_tokens: Tensor
    key_positions: Tensor
    key_embed_places: Tensor
    embed_tokens: Tensor
    predicted_tokens: Tensor
    head_places_KM: Tensor

    def to(self, device: torch.device | str) -> RowPlan:
        """Copy the index tensors to a device."""
        if torch.device(device).type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        steps = [
            StepRows(
                move(s.row_tokens),
                None if s.from_previous is None else move(s.from_previous),
                move(s.key_rows),
                move(s.embed_places),
                move(s.position_ids),
                s.segments,
            )
            for s in self.steps
        ]
        return RowPlan(
            steps,
            move(self.key_tokens),
            move(self.key_positions),
            move(self.key_embed_places),
            move(self.embed_tokens),
            move(self.predicted_tokens),
            move(self.head_places_KM),
        )


def predictable_tokens(loss_mask_N: Tensor, doc_offsets: list[int], mask_shift: int = 0) -> Tensor:
    """bool [N]: tokens u that row u - 2 - k predicts at step k and is supervised for.

    Ours is the mask of the predicted token, m_u. EAGLE and SpecForge use m_(u-2) (`mask_shift=2`): the first two
    tokens of an answer are then never trained and the two after it are. The first two tokens of a document have no row.
    """
    mask = loss_mask_N
    if mask_shift:
        mask = torch.cat([mask.new_zeros(mask_shift), mask])[: len(loss_mask_N)]
    else:
        mask = mask.clone()
    starts = torch.tensor(doc_offsets[:-1], device=mask.device)
    stops = torch.tensor(doc_offsets[1:], device=mask.device)
    for offset in (0, 1):
        first = starts + offset
        mask[first[first < stops]] = False
    return mask


def plan_rows(counted_N: Tensor, doc_offsets: list[int], num_steps: int, max_gap: int = MAX_GAP) -> RowPlan:
    """Plan K steps for counted tokens bool [N] on the CPU (none of them among the first two of a document)."""
    counted = counted_N.cpu()
    offsets = torch.tensor(doc_offsets)
    tokens = counted.nonzero().squeeze(1)
    doc_of_N = torch.bucketize(torch.arange(len(counted)), offsets[1:], right=True)
    start_of_N = offsets[doc_of_N] if len(counted) else torch.zeros(0, dtype=torch.int64)
    # head_rows[k]: t = u - 2 - k, or -1 outside the document
    steps_K1 = torch.arange(num_steps)[:, None]
    head_rows_KM = tokens[None] - 2 - steps_K1
    head_rows_KM = torch.where(head_rows_KM >= start_of_N[tokens][None], head_rows_KM, -1)

    needed_KN = torch.zeros(num_steps, len(counted) + 1, dtype=torch.bool)  # the last column takes the -1
    needed_KN.scatter_(1, head_rows_KM % (len(counted) + 1), True)
    needed_KN = needed_KN[:, :-1].flip(0).cumsum(0).flip(0).bool()  # row is needed at k if it has a head row at j >= k

    key_mask_N = torch.zeros(len(counted), dtype=torch.bool)
    for start, stop in pairwise(doc_offsets):
        last = needed_KN[0, start:stop].nonzero()
        if len(last):
            key_mask_N[start : start + int(last[-1]) + 1] = True
    key_tokens = key_mask_N.nonzero().squeeze(1)
    key_place_N = key_mask_N.cumsum(0) - 1

    embed_mask_N = torch.zeros(len(counted) + num_steps, dtype=torch.bool)
    embed_mask_N[key_tokens + 1] = True
    for k in range(1, num_steps):
        embed_mask_N[1 + k : 1 + k + len(counted)] |= needed_KN[k][: len(embed_mask_N) - 1 - k]
    embed_place_N = embed_mask_N.cumsum(0) - 1

    steps, places = [], []
    previous: Tensor | None = None
    for k in range(num_steps):
        rows = needed_KN[k].nonzero().squeeze(1)
        place_N = needed_KN[k].cumsum(0) - 1
        places.append(torch.where(head_rows_KM[k] >= 0, place_N[head_rows_KM[k]], -1))
        base = key_tokens if previous is None else previous
        same = len(base) == len(rows)
        steps.append(
            StepRows(
                row_tokens=rows,
                from_previous=None if same else torch.searchsorted(base, rows),
                key_rows=key_place_N[rows],
                embed_places=embed_place_N[rows + 1 + k],
                position_ids=rows - start_of_N[rows] + k,
                segments=_segments(rows, doc_of_N, key_place_N, start_of_N, max_gap),
            )
        )
        previous = rows
    return RowPlan(
        steps=steps,
        key_tokens=key_tokens,
        key_positions=key_tokens - start_of_N[key_tokens],
        key_embed_places=embed_place_N[key_tokens + 1],
        embed_tokens=embed_mask_N.nonzero().squeeze(1),
        predicted_tokens=tokens,
        head_places_KM=torch.stack(places),
    )


def _segments(rows: Tensor, doc_of_N: Tensor, key_place_N: Tensor, start_of_N: Tensor, max_gap: int) -> list[Segment]:
    if not len(rows):
        return []
    breaks = (rows.diff() > max_gap + 1) | (doc_of_N[rows].diff() != 0)
    starts = [0, *(breaks.nonzero().squeeze(1) + 1).tolist()]
    stops = [*starts[1:], len(rows)]
    first, last = rows[torch.tensor(starts)], rows[torch.tensor(stops) - 1]
    key_first, key_last = key_place_N[first].tolist(), key_place_N[last].tolist()
    key_doc = key_place_N[start_of_N[first]].tolist()
    segments = []
    for i, j, a, b, doc in zip(starts, stops, key_first, key_last, key_doc, strict=True):
        index = None if b + 1 - a == j - i else key_place_N[rows[i:j]] - a
        segments.append(Segment(i, j, a, b + 1, doc, index))
    return segments
