"""Which blocks of a batch a DFlash or DSpark training step computes, and which of their slots count.

A block starts at an anchor a, a token the target has produced; its slots read [x_a, MASK x (B-1)] at positions
a .. a+B-1, see the context strictly before a in the same document and all of their own block, and predict

    T = 6, anchors 2 and 4, B = 3     keys: c0 c1 c2 c3 c4 c5 | block 2: s0 s1 s2 | block 4: s0 s1 s2
    slots of block 2                         x  x  .  .  .  . |          x  x  x  |          .  .  .
    slots of block 4                         x  x  x  x  .  . |          .  .  .  |          x  x  x

    slot              0        1        2                       (B = 3)
    input             x_a      MASK     MASK
    dspark predicts   x_{a+1}  x_{a+2}  x_{a+3}                 first_slot 0
    dflash predicts   -        x_{a+1}  x_{a+2}                 first_slot 1: slot 0 only carries the anchor

Prediction k of anchor a is x_{a+1+k}. It counts while x_{a+1} .. x_{a+1+k} are all supervised tokens of the document.
The weight of prediction k is exp(-k / gamma). DSpark: DeepSpec, `deepspec/trainer`; DFlash: z-lab/dflash.

Letters: N tokens, n blocks, B slots, P predictions of a block, S = n*B slots, R counted slots, U distinct labels,
C context tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from specforge_lite.model.flex import FlexRows
from specforge_lite.model.upload import on_device

# Anchors whose attention is one call: its mask is [BLOCKS_PER_CALL * B, context] booleans.
BLOCKS_PER_CALL = 64


@dataclass(frozen=True)
class AttentionCall:
    """Blocks [first, stop) of one document, whose context keys are places [key_start, key_stop)."""

    first: int
    stop: int
    key_start: int
    key_stop: int


@dataclass(frozen=True)
class QueryRows:
    """Slots that ask: all of them, or the counted ones (the last layer). slots_R: ascending places in 0..S-1; block_R:
    the block of each; bounds: n + 1 python ints, rows of block i are bounds[i] .. bounds[i+1]-1. kernel: block mask of
    flex_attention, where that attends."""

    slots_R: Tensor
    block_R: Tensor
    bounds: list[int]
    kernel: FlexRows | None = None


@dataclass(frozen=True)
class BlockPlan:
    """Everything index-like of a step, made on the host. Index tensors are int64.

    anchors_n: token index of each anchor, ascending. slot_positions_S: RoPE positions, counted in the document.
    context_tokens_C: tokens that some block sees, with their positions. key_stop_n: place after the last context key a
    block sees (its first is that of its document: key_start_n). counted_slots_R: place in 0..S-1, in the order of their
    labels; label_places_R: their place in labels_U, the distinct label tokens, ascending. prediction_R: k of each.
    calls: see AttentionCall. counted_nP bool. every, counted: the slots that ask in all layers but the last, and in the
    last; counted_back_R: place in `counted` of each of counted_slots_R.
    """

    block_size: int
    num_predictions: int
    anchors_n: Tensor
    slot_positions_S: Tensor
    context_tokens_C: Tensor
    context_positions_C: Tensor
    key_start_n: Tensor
    key_stop_n: Tensor
    counted_slots_R: Tensor
    label_places_R: Tensor
    prediction_R: Tensor
    labels_U: Tensor
    counted_nP: Tensor
    calls: list[AttentionCall]
    every: QueryRows
    counted: QueryRows
    counted_back_R: Tensor

    def to(self, device: torch.device, with_flex_masks: bool = False) -> BlockPlan:
        """Copy the index tensors to a device, all in one transfer that the host does not wait for."""
        plan = self
        if with_flex_masks:
            plan = replace(self, every=self._with_mask(self.every), counted=self._with_mask(self.counted))
        return on_device(plan, device)

    def _with_mask(self, rows: QueryRows) -> QueryRows:
        """Block masks of flex_attention: the context before a row's anchor, and the slots of its block."""
        if not len(rows.slots_R):
            return rows
        num_context, size = len(self.context_tokens_C), self.block_size
        own_R = num_context + size * rows.block_R
        first_R, last_R = self.key_start_n[rows.block_R], self.key_stop_n[rows.block_R] - 1
        num_keys, sizes = num_context + len(self.slot_positions_S), [num_context, size]
        kernel = FlexRows.of(first_R, last_R, [(own_R, own_R + size - 1)], num_keys, sizes)
        return replace(rows, kernel=kernel)


def anchor_candidates(loss_mask_N: Tensor, doc_offsets: Sequence[int]) -> Tensor:
    """Tokens a with m[a] = m[a+1] = 1 in one document, ascending: the first token of an answer is never a label, since
    the target's own prompt pass gives it."""
    candidate_N = torch.zeros_like(loss_mask_N)
    candidate_N[:-1] = loss_mask_N[:-1] & loss_mask_N[1:]
    ends = torch.tensor([stop - 1 for start, stop in pairwise(doc_offsets) if stop > start], dtype=torch.int64)
    candidate_N[ends] = False
    return candidate_N.nonzero().squeeze(1)


def draw_anchors(
    loss_mask_N: Tensor, doc_offsets: Sequence[int], sample_ids: Sequence[str], most: int, seed: int, epoch: int
) -> Tensor:
    """At most `most` candidates of every document, drawn without replacement, ascending int64 [n].

    The draw depends on (seed, epoch, sample id) only: it is the same after a resume and on any number of ranks, and
    another one in every epoch.
    """
    candidates = anchor_candidates(loss_mask_N, doc_offsets)
    bounds = torch.searchsorted(candidates, torch.tensor(list(doc_offsets))).tolist()
    drawn = []
    for index, (first, stop) in enumerate(pairwise(bounds)):
        own = candidates[first:stop]
        if len(own) > most:
            name = sample_ids[index] if index < len(sample_ids) else str(index)
            digest = hashlib.blake2b(f"{seed}:{epoch}:{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            own = own[torch.randperm(len(own), generator=generator)[:most].sort().values]
        drawn.append(own)
    return torch.cat(drawn) if drawn else candidates


def plan_blocks(
    loss_mask_N: Tensor, doc_offsets: Sequence[int], anchors_n: Tensor, block_size: int, first_slot: int
) -> BlockPlan:
    """Plan the blocks of ascending anchors, on the CPU. first_slot: the slot of prediction 0 (dspark 0, dflash 1)."""
    num_predictions = block_size - first_slot
    offsets = torch.tensor(list(doc_offsets), dtype=torch.int64)
    doc_n = torch.bucketize(anchors_n, offsets[1:], right=True)
    start_n, end_n = offsets[doc_n], offsets[doc_n + 1]
    steps_P = torch.arange(num_predictions)
    labels_nP = anchors_n[:, None] + 1 + steps_P
    inside_nP = labels_nP < end_n[:, None]
    supervised_nP = loss_mask_N[labels_nP.clamp(max=max(len(loss_mask_N) - 1, 0))] & inside_nP
    counted_nP = supervised_nP.long().cumprod(1).bool()

    # No block sees what lies between the last anchor of its document and the end of that.
    last_anchors = torch.full((len(offsets),), -1).scatter_reduce_(0, doc_n, anchors_n, "amax")
    tokens_N = torch.arange(len(loss_mask_N))
    context_N = tokens_N < last_anchors[torch.bucketize(tokens_N, offsets[1:], right=True)]
    context_tokens_C = context_N.nonzero().squeeze(1)
    place_N = torch.cat([torch.zeros(1, dtype=torch.int64), context_N.cumsum(0)])  # context tokens before each token
    key_start_n, key_stop_n = place_N[start_n], place_N[anchors_n]

    block_R, prediction_R = counted_nP.nonzero(as_tuple=True)
    label_R = labels_nP[block_R, prediction_R]
    order = label_R.argsort(stable=True)
    block_R, prediction_R, label_R = block_R[order], prediction_R[order], label_R[order]
    labels_U, label_places_R = label_R.unique(return_inverse=True)
    positions_nB = (anchors_n - start_n)[:, None] + torch.arange(block_size)
    doc_of_C = torch.bucketize(context_tokens_C, offsets[1:], right=True)
    slots_R = block_R * block_size + first_slot + prediction_R
    counted = _query_rows(slots_R.sort().values, len(anchors_n), block_size)
    return BlockPlan(
        block_size=block_size,
        num_predictions=num_predictions,
        anchors_n=anchors_n,
        slot_positions_S=positions_nB.flatten(),
        context_tokens_C=context_tokens_C,
        context_positions_C=context_tokens_C - offsets[doc_of_C],
        key_start_n=key_start_n,
        key_stop_n=key_stop_n,
        counted_slots_R=slots_R,
        label_places_R=label_places_R,
        prediction_R=prediction_R,
        labels_U=labels_U,
        counted_nP=counted_nP,
        calls=_calls(doc_n, key_start_n, key_stop_n),
        every=_query_rows(torch.arange(len(anchors_n) * block_size), len(anchors_n), block_size),
        counted=counted,
        counted_back_R=torch.searchsorted(counted.slots_R, slots_R),
    )


def _query_rows(slots_R: Tensor, num_blocks: int, block_size: int) -> QueryRows:
    block_R = slots_R // block_size
    return QueryRows(slots_R, block_R, torch.searchsorted(block_R, torch.arange(num_blocks + 1)).tolist())


def _calls(doc_n: Tensor, key_start_n: Tensor, key_stop_n: Tensor) -> list[AttentionCall]:
    documents, starts, stops = doc_n.tolist(), key_start_n.tolist(), key_stop_n.tolist()
    calls, first = [], 0
    for block in range(1, len(documents) + 1):
        if block == len(documents) or documents[block] != documents[first] or block - first == BLOCKS_PER_CALL:
            calls.append(AttentionCall(first, block, starts[first], stops[block - 1]))
            first = block
    return calls
