"""Flash attention of packed documents on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_lite.model.flash import Flash
from specforge_lite.model.row_plan import Segment


class CpuFlash(Flash):
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
