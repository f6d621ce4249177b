"""Flash attention of packed documents on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_lite.model.flash import MAX_KEY_COPIES, Flash, take


class VarlenFlash(Flash):
    """aten's FlashAttention-2, one variable-length call for all segments. It aligns a causal mask to the bottom right,
    which is what a span of rows at the end of its keys needs."""

    max_copies = MAX_KEY_COPIES

    def call(self, q_PHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows
        k, v = take(k0_NGd, rows.key_places), take(v0_NGd, rows.key_places)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q_PHd, k, v, rows.query_offsets, rows.key_offsets, rows.max_queries, rows.max_keys, 0.0, True, False
        )
        return out, lse.T

    def call_backward(
        self, grad_PHd: Tensor, q_PHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, out_PHd: Tensor, z_PH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.rows
        k, v = take(k0_NGd, rows.key_places), take(v0_NGd, rows.key_places)
        unused = torch.zeros(2, dtype=torch.uint64, device=k.device)  # state of the generator for dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad_PHd.contiguous(), q_PHd.contiguous(), k, v, out_PHd.contiguous(), z_PH.T.contiguous(),
            rows.query_offsets, rows.key_offsets, rows.max_queries, rows.max_keys, 0.0, True, unused, unused[:0],
        )  # fmt: skip
        if rows.key_places is not None:
            dk = torch.zeros_like(k0_NGd).index_add_(0, rows.key_places, dk)
            dv = torch.zeros_like(v0_NGd).index_add_(0, rows.key_places, dv)
        return dq, dk, dv
