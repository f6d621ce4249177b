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

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A hole of at most this many rows inside a run is attended over and thrown away; a longer one starts a new segment.
MAX_GAP = 32
# A step keeps rows that only earlier steps needed, up to this share of all rows: gathering the rest costs more.
SPARE_SHARE = 1 / 16


class Segment(NamedTuple):
    """Rows [compact_start, compact_stop) of a step's needed rows, lying in tokens [start, stop) of one document, with
    holes where these are more.

    key_start: first token of the document, counted in step-0 KEY rows, as start and stop are.
    """

    compact_start: int
    compact_stop: int
    start: int
    stop: int
    key_start: int


@dataclass(frozen=True)
class StepRows:
    """Rows of one TTT step. All index tensors are int64.

    row_tokens: token index t of every row that is computed: the needed ones, and a few that only earlier steps needed.
    from_previous: its place among the previous step's rows (step 0: among this process's key rows; None: all of them,
    in order). key_rows: its place among the step-0 key rows; first_keys: that of its document's first token.
    embed_places: place of token t + 1 + k in `RowPlan.embed_tokens`. position_ids: RoPE position, t + k counted in its
    document. segments: the same rows cut where attention may not or need not be contiguous; stay on the host.
    kernel: what an attention backend made of them (`ttt_attention.Backend.plan`).
    """

    row_tokens: Tensor
    from_previous: Tensor | None
    key_rows: Tensor
    first_keys: Tensor
    embed_places: Tensor
    position_ids: Tensor
    segments: list[Segment]
    kernel: Any = None


@dataclass(frozen=True)
class RowPlan:
    """Everything index-like that a K-step training pass needs, made once per batch on the host.

    num_positions: above every RoPE position. num_keys: rows whose step-0 key and value exist (those after a document's
    last needed row do not). key_tokens: those that this process makes (all, unless processes share the batch).
    key_places: their places among all, None when these are all. key_positions: their position inside their document.
    key_doc_lengths: tokens of that document.
    embed_tokens: every token whose embedding is read; its half of q, k, v depends on the token only, so it is projected
    once and not once per step. key_embed_places: place of token t + 1 there for each key token t.
    predicted_tokens [M]: every counted token u that one of this process's rows predicts.
    head_rows [M, K]: row t = u - 2 - k, or -1 where it lies before the document (or belongs to another process).
    head_places [M, K]: its place when the needed rows of all steps are laid end to end, -1 as above.
    """

    steps: list[StepRows]
    num_keys: int
    num_positions: int
    key_tokens: Tensor
    key_places: Tensor | None
    key_positions: Tensor
    key_doc_lengths: Tensor
    key_embed_places: Tensor
    embed_tokens: Tensor
    predicted_tokens: Tensor
    head_rows_MK: Tensor
    head_places_MK: Tensor

    def to(self, device: torch.device | str, kernel_plan: Callable[[StepRows, int, int], Any] | None = None) -> RowPlan:
        """Copy the index tensors to a device, all in one transfer that the host does not wait for.

        kernel_plan(rows of a step, number of the step, number of keys): what the attention backend wants with them.
        """
        plan = self
        if kernel_plan is not None:
            steps = [replace(s, kernel=kernel_plan(s, k, self.num_keys)) for k, s in enumerate(self.steps)]
            plan = replace(self, steps=steps)
        if torch.device(device).type == "cpu":
            return plan
        from specforge_lite.model.upload import on_device

        return on_device(plan, device)


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


def plan_rows(
    counted_N: Tensor,
    doc_offsets: list[int],
    num_steps: int,
    max_gap: int = MAX_GAP,
    spare_share: float = SPARE_SHARE,
    owned_N: Tensor | None = None,
) -> RowPlan:
    """Plan K steps for counted tokens bool [N] on the CPU (none of them among the first two of a document).

    spare_share: a step keeps the rows of the step before until this share of them is idle. owned_N bool: the rows that
    this process computes, when several share a batch; keys are still counted over all processes.
    """
    counted = counted_N.cpu()
    num_tokens = len(counted)
    offsets = torch.tensor(doc_offsets)
    doc_of_N = torch.bucketize(torch.arange(num_tokens), offsets[1:], right=True)
    start_of_N = offsets[doc_of_N] if num_tokens else torch.zeros(0, dtype=torch.int64)
    tokens, head_rows_KM = _head_rows(counted, start_of_N, num_steps)
    needed_KN = _needed(head_rows_KM, num_tokens)
    key_mask_N = torch.zeros(num_tokens, dtype=torch.bool)
    for start, stop in pairwise(doc_offsets):
        last = needed_KN[0, start:stop].nonzero()
        if len(last):
            key_mask_N[start : start + int(last[-1]) + 1] = True
    own_key_mask_N = key_mask_N
    if owned_N is not None:
        own_key_mask_N = key_mask_N & owned_N
        owned_KM = (head_rows_KM >= 0) & owned_N[head_rows_KM]
        head_rows_KM = torch.where(owned_KM, head_rows_KM, -1)
        tokens, head_rows_KM = tokens[owned_KM.any(0)], head_rows_KM[:, owned_KM.any(0)]
        needed_KN = _needed(head_rows_KM, num_tokens)
    key_tokens = own_key_mask_N.nonzero().squeeze(1)
    key_place_N = key_mask_N.cumsum(0) - 1

    embed_mask_N = torch.zeros(num_tokens + num_steps, dtype=torch.bool)
    embed_mask_N[key_tokens + 1] = True
    for k in range(1, num_steps):
        embed_mask_N[1 + k : 1 + k + num_tokens] |= needed_KN[k][: len(embed_mask_N) - 1 - k]
    embed_place_N = embed_mask_N.cumsum(0) - 1

    steps, places, num_rows = [], [], 0
    rows = key_tokens
    for k in range(num_steps):
        previous, rows = rows, needed_KN[k].nonzero().squeeze(1)
        if k and len(previous) - len(rows) <= spare_share * len(previous):
            rows = previous  # the idle ones among them are not needed later either: they read any embedding
        place_N = torch.full((num_tokens + 1,), -1).index_put_((rows,), torch.arange(len(rows)))
        place_M = place_N[head_rows_KM[k]]
        places.append(torch.where(place_M >= 0, place_M + num_rows, -1))
        num_rows += len(rows)
        steps.append(
            StepRows(
                row_tokens=rows,
                from_previous=None if len(previous) == len(rows) else torch.searchsorted(previous, rows),
                key_rows=key_place_N[rows],
                first_keys=key_place_N[start_of_N[rows]],
                embed_places=torch.where(needed_KN[k, rows], embed_place_N[rows + 1 + k], 0),
                position_ids=rows - start_of_N[rows] + k,
                segments=_segments(rows, doc_of_N, key_place_N, start_of_N, max_gap),
            )
        )
    return RowPlan(
        steps=steps,
        num_keys=int(key_mask_N.sum()),
        num_positions=int(offsets.diff().max()) + num_steps,
        key_tokens=key_tokens,
        key_places=None if owned_N is None else key_place_N[key_tokens],
        key_positions=key_tokens - start_of_N[key_tokens],
        key_doc_lengths=offsets.diff()[doc_of_N[key_tokens]],
        key_embed_places=embed_place_N[key_tokens + 1],
        embed_tokens=embed_mask_N.nonzero().squeeze(1),
        predicted_tokens=tokens,
        head_rows_MK=head_rows_KM.T.contiguous(),
        head_places_MK=torch.stack(places, 1),
    )


def _head_rows(counted_N: Tensor, start_of_N: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Counted tokens u [M], and row t = u - 2 - k [K, M], -1 where that is outside the document."""
    tokens_M = counted_N.nonzero().squeeze(1)
    rows_KM = tokens_M[None] - 2 - torch.arange(num_steps)[:, None]
    return tokens_M, torch.where(rows_KM >= start_of_N[tokens_M][None], rows_KM, -1)


def _needed(head_rows_KM: Tensor, num_tokens: int) -> Tensor:
    """bool [K, N]: row t has a head row at step k or a later one."""
    needed_KN = torch.zeros(len(head_rows_KM), num_tokens + 1, dtype=torch.bool)  # the last column takes the -1
    needed_KN.scatter_(1, head_rows_KM % (num_tokens + 1), True)
    return needed_KN[:, :-1].flip(0).cumsum(0).flip(0).bool()


def _segments(rows: Tensor, doc_of_N: Tensor, key_place_N: Tensor, start_of_N: Tensor, max_gap: int) -> list[Segment]:
    if not len(rows):
        return []
    breaks = (rows.diff() > max_gap + 1) | (doc_of_N[rows].diff() != 0)
    starts = [0, *(breaks.nonzero().squeeze(1) + 1).tolist()]
    stops = [*starts[1:], len(rows)]
    first, last = rows[torch.tensor(starts)], rows[torch.tensor(stops) - 1]
    key_first, key_last = key_place_N[first].tolist(), key_place_N[last].tolist()
    key_doc = key_place_N[start_of_N[first]].tolist()
    return [Segment(i, j, a, b + 1, doc) for i, j, a, b, doc in zip(starts, stops, key_first, key_last, key_doc)]
