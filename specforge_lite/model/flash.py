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


class VarlenFlash:
    """aten's FlashAttention-2, one variable-length call for all segments. It aligns a causal mask to the bottom right,
    which is what a span of rows at the end of its keys needs."""

    max_copies: float = MAX_KEY_COPIES

    def __init__(self, rows: FlashRows) -> None:
        self.rows = rows

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        """-> (output [R, H, d], logsumexp of the scores [R, H] in fp32 or wider)."""
        out_PHd, lse_PH = self.call(_take(q_RHd, self.rows.query_places), k0_NGd, v0_NGd)
        return _take(out_PHd, self.rows.row_places), _take(lse_PH, self.rows.row_places)

    def backward(
        self, grad_RHd: Tensor, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_RHd: Tensor, z_RH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k0, v0 where each probability is exp(score - z) and `out` the output of ALL keys."""
        rows = self.rows
        grad, q, out, z_PH = (_take(x, rows.query_places) for x in (grad_RHd, q_RHd, out_RHd, z_RH))
        if rows.holes is not None:
            z_PH = z_PH.masked_fill(rows.holes[:, None], float("inf"))  # all their probabilities are then 0
        dq, dk, dv = self.call_backward(grad, q, k0_NGd, v0_NGd, out, z_PH)
        return _take(dq, rows.row_places), dk, dv

    def call(self, q_PHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows
        k, v = _take(k0_NGd, rows.key_places), _take(v0_NGd, rows.key_places)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q_PHd, k, v, rows.query_offsets, rows.key_offsets, rows.max_queries, rows.max_keys, 0.0, True, False
        )
        return out, lse.T

    def call_backward(
        self, grad_PHd: Tensor, q_PHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_PHd: Tensor, z_PH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.rows
        k, v = _take(k0_NGd, rows.key_places), _take(v0_NGd, rows.key_places)
        unused = torch.zeros(2, dtype=torch.uint64, device=k.device)  # state of the generator for dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad_PHd.contiguous(), q_PHd.contiguous(), k, v, out_PHd.contiguous(), z_PH.T.contiguous(),
            rows.query_offsets, rows.key_offsets, rows.max_queries, rows.max_keys, 0.0, True, unused, unused[:0],
        )  # fmt: skip
        if rows.key_places is not None:
            dk = torch.zeros_like(k0_NGd).index_add_(0, rows.key_places, dk)
            dv = torch.zeros_like(v0_NGd).index_add_(0, rows.key_places, dv)
        return dq, dk, dv


class CpuFlash(VarlenFlash):
    """aten's flash kernel for CPUs, segment by segment. Its causal mask starts at the top left, so a segment is two
    calls: all tokens before it, and itself, joined by their log-sum-exp. No key is copied."""

    max_copies = float("inf")

    def call(self, q_PHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        out_PHd = torch.empty_like(q_PHd, memory_format=torch.contiguous_format)
        z_PH = torch.empty(q_PHd.shape[:2], dtype=torch.promote_types(q_PHd.dtype, torch.float32))
        for segment, queries in self._segments():
            q = _heads_first(q_PHd[queries], k0_NGd.shape[1])
            parts = []
            for keys, causal in _blocks(segment):
                k, v = (_keys_first(x[keys], len(q)) for x in (k0_NGd, v0_NGd))
                parts.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal))
            out, lse = parts[-1]
            if len(parts) == 2:
                (out_before, lse_before), (out_own, lse_own) = parts
                lse = torch.logaddexp(lse_before, lse_own)
                out = out_before * (lse_before - lse).exp_().unsqueeze(-1)
                out.addcmul_(out_own, (lse_own - lse).exp_().unsqueeze(-1))
            out_PHd[queries], z_PH[queries] = _tokens_first(out), _tokens_first(lse)
        return out_PHd, z_PH

    def call_backward(
        self, grad_PHd: Tensor, q_PHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_PHd: Tensor, z_PH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = k0_NGd.shape[1]
        dq_PHd = torch.zeros_like(q_PHd, memory_format=torch.contiguous_format)
        dk0_NGd, dv0_NGd = torch.zeros_like(k0_NGd), torch.zeros_like(v0_NGd)
        for segment, queries in self._segments():
            grad, q, out = (_heads_first(x[queries], groups) for x in (grad_PHd, q_PHd, out_PHd))
            z = z_PH[queries].unflatten(1, (groups, -1)).permute(2, 1, 0)
            for keys, causal in _blocks(segment):
                k, v = (_keys_first(x[keys], len(q)) for x in (k0_NGd, v0_NGd))
                dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, q, k, v, out, z, 0.0, causal
                )
                dq_PHd[queries] += _tokens_first(dq)
                dk0_NGd[keys] += dk.sum(0).transpose(0, 1)
                dv0_NGd[keys] += dv.sum(0).transpose(0, 1)
        return dq_PHd, dk0_NGd, dv0_NGd

    def _segments(self) -> list[tuple[Segment, slice]]:
        """Segments with the places of their queries among the P."""
        offsets = self.rows.query_offsets.tolist()
        return [(s, slice(start, stop)) for s, start, stop in zip(self.rows.segments, offsets, offsets[1:])]


def _blocks(segment: Segment) -> list[tuple[slice, bool]]:
    """(keys, causal) of the two blocks a segment sees: all tokens before it, and itself."""
    before = [(slice(segment.key_start, segment.start), False)] if segment.start > segment.key_start else []
    return [*before, (slice(segment.start, segment.stop), True)]


def _heads_first(x_THd: Tensor, groups: int) -> Tensor:
    """[T, G * g, d] -> [g, G, T, d] view: the g query heads that share a key head become a batch, so that keys and
    values need no copy per query head (they are expanded with stride 0)."""
    return x_THd.unflatten(1, (groups, -1)).permute(2, 1, 0, 3)


def _keys_first(x_TGd: Tensor, batch: int) -> Tensor:
    return x_TGd.transpose(0, 1).expand(batch, -1, -1, -1)


def _tokens_first(x_gGTd: Tensor) -> Tensor:
    return x_gGTd.permute(2, 1, 0, *range(3, x_gGTd.ndim)).flatten(1, 2)


def _take(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x.index_select(0, places)
