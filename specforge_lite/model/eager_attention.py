"""Attention of the training-time test with every score materialised: the oracle, and `eager` of the flag."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specforge_lite.model.row_plan import StepRows
from specforge_lite.model.ttt_attention import Backend, Keys


class Eager(Backend):
    """Masked scores are minus infinity; one softmax."""

    def attend(self, q_RHd: Tensor, keys: Keys, values: Keys, rows: StepRows) -> Tensor:
        k0_NGd, v0_NGd = keys[0], values[0]
        group = q_RHd.shape[1] // k0_NGd.shape[1]
        scale = 1 / math.sqrt(q_RHd.shape[2])
        expand = lambda x: x.repeat_interleave(group, dim=1)  # noqa: E731  (query head h reads key head h // group)
        scores = [torch.einsum("rhd,nhd->hrn", q_RHd, expand(k0_NGd)) * scale]
        keys_N = torch.arange(len(k0_NGd), device=q_RHd.device)
        visible_RN = (keys_N <= rows.key_rows[:, None]) & (keys_N >= rows.first_keys[:, None])
        scores[0] = scores[0].masked_fill(~visible_RN, float("-inf"))
        scores += [(torch.einsum("rhd,rhd->hr", q_RHd, expand(k)) * scale).unsqueeze(-1) for k in keys[1:]]
        probabilities = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.promote_types(q_RHd.dtype, torch.float32))
        probabilities = probabilities.to(q_RHd.dtype)
        out_RHd = torch.einsum("hrn,nhd->rhd", probabilities[..., : len(k0_NGd)], expand(v0_NGd))
        for j, value in enumerate(values[1:]):
            out_RHd = out_RHd + probabilities[..., len(k0_NGd) + j].T.unsqueeze(-1) * expand(value)
        return out_RHd
