"""Flash attention over the step-0 keys of packed documents, by the segments that a step's rows lie in.

Letters: R rows of a step, N step-0 keys, H / G query / key heads, d head width, P rows of all segments with their
holes, S keys of all segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge_lite.model.row_plan import MAX_GAP, Segment

# Keys of a document are copied once per segment of its rows; segments are joined until all copies are at most this
# many times the keys.
MAX_KEY_COPIES = 8


class Step0Block(Protocol):
    """Attention over the step-0 keys alone."""

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        """-> (output [R, H, d], logsumexp of the scores [R, H] in fp32 or wider)."""
        ...

    def backward(
        self, grad_RHd: Tensor, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_RHd: Tensor, z_RH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k0, v0 where each probability is exp(score - z) and `out` the output of ALL keys."""
        ...


class CpuFlash:
    """aten's flash kernel for CPUs. Its causal mask starts at the top left, so a span is two calls: all tokens before
    it, and itself, joined by their log-sum-exp."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        out_RHd = torch.empty_like(q_RHd, memory_format=torch.contiguous_format)
        z_RH = torch.empty(q_RHd.shape[:2], dtype=torch.promote_types(q_RHd.dtype, torch.float32))
        for segment in self._segments:
            q = _heads_first(_segment_rows(q_RHd, segment), k0_NGd.shape[1])
            parts = []
            for first, stop, causal in _blocks(segment):
                k, v = (_keys_first(x[first:stop], len(q)) for x in (k0_NGd, v0_NGd))
                parts.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal))
            out, lse = parts[-1]
            if len(parts) == 2:
                (out_before, lse_before), (out_own, lse_own) = parts
                lse = torch.logaddexp(lse_before, lse_own)
                out = out_before * (lse_before - lse).exp_().unsqueeze(-1)
                out.addcmul_(out_own, (lse_own - lse).exp_().unsqueeze(-1))
            _unpad(out_RHd, _tokens_first(out), segment)
            _unpad(z_RH, _tokens_first(lse), segment)
        return out_RHd, z_RH

    def backward(
        self, grad_RHd: Tensor, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_RHd: Tensor, z_RH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = k0_NGd.shape[1]
        dq_RHd = torch.empty_like(q_RHd, memory_format=torch.contiguous_format)
        dk0_NGd, dv0_NGd = torch.zeros_like(k0_NGd), torch.zeros_like(v0_NGd)
        for segment in self._segments:
            grad, q, out = (_heads_first(_segment_rows(x, segment), groups) for x in (grad_RHd, q_RHd, out_RHd))
            z_TH = _segment_rows(z_RH, segment, fill=float("inf"))
            z = z_TH.view(len(z_TH), groups, -1).permute(2, 1, 0)
            dq_total: Tensor | None = None
            for first, stop, causal in _blocks(segment):
                k, v = (_keys_first(x[first:stop], len(q)) for x in (k0_NGd, v0_NGd))
                dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, q, k, v, out, z, 0.0, causal
                )
                dq_total = dq if dq_total is None else dq_total.add_(dq)
                dk0_NGd[first:stop] += dk.sum(0).transpose(0, 1)
                dv0_NGd[first:stop] += dv.sum(0).transpose(0, 1)
            assert dq_total is not None
            _unpad(dq_RHd, _tokens_first(dq_total), segment)
        return dq_RHd, dk0_NGd, dv0_NGd


def _heads_first(x_THd: Tensor, groups: int) -> Tensor:
    """[T, G * g, d] -> [g, G, T, d] view: the g query heads that share a key head become a batch, so that keys and
    values need no copy per query head (they are expanded with stride 0)."""
    return x_THd.unflatten(1, (groups, -1)).permute(2, 1, 0, 3)


def _keys_first(x_TGd: Tensor, batch: int) -> Tensor:
    return x_TGd.transpose(0, 1).expand(batch, -1, -1, -1)


def _tokens_first(x_gGTd: Tensor) -> Tensor:
    return x_gGTd.permute(2, 1, 0, *range(3, x_gGTd.ndim)).flatten(1, 2)


def _blocks(segment: Segment) -> list[tuple[int, int, bool]]:
    """(first key, last key + 1, causal) of the two blocks a segment sees: all tokens before it, and itself."""
    before = [(segment.key_start, segment.start, False)] if segment.start > segment.key_start else []
    return [*before, (segment.start, segment.stop, True)]


def _segment_rows(x: Tensor, segment: Segment, fill: float = 0.0) -> Tensor:
    """Rows of a segment as one contiguous token range; holes are `fill` and their results are thrown away."""
    rows = x[segment.compact_start : segment.compact_stop]
    if segment.index is None:
        return rows
    padded = x.new_full((segment.stop - segment.start, *x.shape[1:]), fill)
    padded[segment.index] = rows
    return padded


def _unpad(target: Tensor, rows: Tensor, segment: Segment) -> None:
    target[segment.compact_start : segment.compact_stop] = rows if segment.index is None else rows[segment.index]


@dataclass(frozen=True)
class FlashRows:
    """The segments of a step as sequences of one variable-length call.

    query_places [P]: row of each query, any row for a hole; None: the rows as they are. holes [P] bool. row_places [R]:
    where each row lies among the P. key_places [S]: None: the keys as they are. offsets: int32, one more than segments.
    """

    query_places: Tensor | None
    holes: Tensor | None
    row_places: Tensor | None
    key_places: Tensor | None
    query_offsets: Tensor
    key_offsets: Tensor
    max_queries: int
    max_keys: int


def flash_rows(segments: list[Segment], num_keys: int) -> FlashRows:
    """Plan the call. Segments of one document share its keys, which are then copied, or joined where there are many."""
    gap = MAX_GAP
    while sum(s.stop - s.key_start for s in segments) > MAX_KEY_COPIES * num_keys and gap < num_keys:
        gap *= 2
        segments = _join_segments(segments, gap)
    queries, holes, keys = [], [], []
    for segment in segments:
        length = segment.stop - segment.start
        places, hole = torch.full((length,), segment.compact_start), torch.zeros(length, dtype=torch.bool)
        if segment.index is None:
            places = torch.arange(segment.compact_start, segment.compact_stop)
        else:
            places[segment.index] = torch.arange(segment.compact_start, segment.compact_stop)
            hole[:] = True
            hole[segment.index] = False
        queries.append(places)
        holes.append(hole)
        keys.append(torch.arange(segment.key_start, segment.stop))
    padded = any(segment.index is not None for segment in segments)
    hole_P, key_S = torch.cat([torch.zeros(0, dtype=torch.bool), *holes]), torch.cat([torch.zeros(0).long(), *keys])
    as_they_are = len(key_S) == num_keys and bool((key_S == torch.arange(num_keys)).all())
    offsets = lambda parts: torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).int()  # noqa: E731
    return FlashRows(
        query_places=torch.cat(queries) if padded else None,
        holes=hole_P if padded else None,
        row_places=(~hole_P).nonzero().squeeze(1) if padded else None,
        key_places=None if as_they_are else key_S,
        query_offsets=offsets(queries),
        key_offsets=offsets(keys),
        max_queries=max((len(part) for part in queries), default=0),
        max_keys=max((len(part) for part in keys), default=0),
    )


def _join_segments(segments: list[Segment], max_gap: int) -> list[Segment]:
    """Neighbours of one document with a hole of at most `max_gap` rows become one segment with that hole."""
    joined: list[Segment] = []
    for right in segments:
        left = joined[-1] if joined else None
        if left is None or left.key_start != right.key_start or right.start - left.stop > max_gap:
            joined.append(right)
            continue
        places = [
            torch.arange(s.stop - s.start) if s.index is None else s.index + 0 for s in (left, right)
        ]  # inside their own segment
        index = torch.cat([places[0], places[1] + right.start - left.start])
        joined[-1] = Segment(left.compact_start, right.compact_stop, left.start, right.stop, left.key_start, index)
    return joined


class VarlenFlash:
    """aten's FlashAttention-2, one variable-length call for all segments. It aligns a causal mask to the bottom right,
    which is what a span of rows at the end of its keys needs."""

    def __init__(self, rows: FlashRows) -> None:
        self._rows = rows

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows
        q, k, v = _take(q_RHd, rows.query_places), _take(k0_NGd, rows.key_places), _take(v0_NGd, rows.key_places)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, rows.query_offsets, rows.key_offsets, rows.max_queries, rows.max_keys, 0.0, True, False
        )
        return _take(out, rows.row_places), _take(lse.T, rows.row_places)

    def backward(
        self, grad_RHd: Tensor, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_RHd: Tensor, z_RH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = self._rows
        k, v = _take(k0_NGd, rows.key_places), _take(v0_NGd, rows.key_places)
        grad, q, out = (_take(x, rows.query_places).contiguous() for x in (grad_RHd, q_RHd, out_RHd))
        z_PH = _take(z_RH, rows.query_places)
        if rows.holes is not None:
            z_PH = z_PH.masked_fill(rows.holes[:, None], float("inf"))  # all their probabilities are then 0
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the generator for dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, z_PH.T.contiguous(), rows.query_offsets, rows.key_offsets,
            rows.max_queries, rows.max_keys, 0.0, True, unused, unused[:0],
        )  # fmt: skip
        if rows.key_places is not None:
            dk = torch.zeros_like(k0_NGd).index_add_(0, rows.key_places, dk)
            dv = torch.zeros_like(v0_NGd).index_add_(0, rows.key_places, dv)
        return _take(dq, rows.row_places), dk, dv


def _take(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x.index_select(0, places)
