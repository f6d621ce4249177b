"""Attention of the training-time test, three ways that agree.

At step k a row t sees, in one softmax, the step-0 keys of tokens <= t of its document and, for each later step
j = 1..k, the single key that step j made for the same row t (design of EAGLE-3's training-time test):

    row t, step 2:   [ k0[start] ... k0[t] | k1[t] | k2[t] ]

Letters: R needed rows of this step, N step-0 key rows, H query heads, G key/value heads, d head width,
J = k later keys.

eager           materialised scores and mask; the oracle.
sdpa            flash attention over the step-0 block, the J single keys merged by log-sum-exp; O(R) memory.
flex_attention  one block mask; torch has no backward for it on CPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specforge_lite.model.device import attention_dtype, choose_attention
from specforge_lite.model.flash import Flash, FlashRows, flash_rows
from specforge_lite.model.row_plan import StepRows

# Name -> module and class, imported when it is chosen.
BACKENDS = {"eager": "eager_attention:Eager", "sdpa": "ttt_attention:Merged", "flex_attention": "flex:Flex"}

Keys = Sequence[Tensor]  # those of step 0 [N, G, d], then of each later step [R, G, d]; values alike


class Backend:
    """One way to attend."""

    def __init__(self, device_type: str = "cpu") -> None:
        self.device_type = device_type

    def plan(self, rows: StepRows, step: int, num_keys: int) -> Any:
        """On the host: what `attend` wants to find in `rows.kernel`; its tensors go to the device with the plan."""
        return None

    def attend(self, q_RHd: Tensor, keys: Keys, values: Keys, rows: StepRows) -> Tensor:
        """-> output [R, H, d]."""
        raise NotImplementedError


def make_backend(name: str, device_type: str = "cpu") -> Backend:
    """`name` as `--draft-attention-backend` has it; flex_attention that has to run backward on a CPU becomes sdpa."""
    if name != "flex_attention" or device_type != "cpu" or torch.is_grad_enabled():
        name = choose_attention(name, device_type)
    backend: Backend = load(BACKENDS[name])(device_type)
    return backend


def load(place: str) -> Any:
    """`module:name` of this package's room."""
    module, name = place.split(":")
    return getattr(importlib.import_module(f"specforge_lite.model.{module}"), name)


class Merged(Backend):
    """Flash attention over step 0 merged with the J single keys; exact, memory O(R + N)."""

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__(device_type)
        self._flash: type[Flash] = load("flash_cpu:CpuFlash" if device_type == "cpu" else "flash_cuda:VarlenFlash")

    def plan(self, rows: StepRows, step: int, num_keys: int) -> FlashRows:
        return flash_rows(rows, num_keys, self._flash.max_copies)

    def attend(self, q_RHd: Tensor, keys: Keys, values: Keys, rows: StepRows) -> Tensor:
        dtype = q_RHd.dtype
        if attention_dtype(dtype, q_RHd.device.type) != dtype:
            q_RHd, keys, values = q_RHd.float(), [key.float() for key in keys], [value.float() for value in values]
        if len(q_RHd) == 0:
            return (q_RHd + 0 * sum(x.sum() for x in (*keys, *values))).to(dtype)
        return _Merged.apply(self._flash(rows.kernel), len(keys), q_RHd, *keys, *values).to(dtype)  # type: ignore[no-any-return]


class _Merged(torch.autograd.Function):
    """o = sum over blocks of o_b exp(lse_b - z), z = logsumexp of all lse and single scores.

    Backward hands the merged o and z to the flash backward: it recomputes P = exp(S - z), which is then the true
    probability of each step-0 key, and its row sums of do * o are the true ones. The single keys are done by hand.
    """

    @staticmethod
    def forward(ctx, block: Flash, num_keys: int, q_RHd: Tensor, *keys_values: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        keys, values = keys_values[:num_keys], keys_values[num_keys:]
        out_RHd, z_RH = block.forward(q_RHd, keys[0], values[0])
        probabilities: list[Tensor] = []
        if num_keys > 1:
            out_RHd, z_RH, probabilities = merge_single_keys(q_RHd, out_RHd, z_RH, keys[1:], values[1:])
        ctx.block, ctx.num_keys = block, num_keys
        ctx.save_for_backward(q_RHd, out_RHd, z_RH, *keys_values, *probabilities)
        return out_RHd

    @staticmethod
    def backward(ctx, grad_RHd: Tensor):  # type: ignore[no-untyped-def, override]
        q_RHd, out_RHd, z_RH, *rest = ctx.saved_tensors
        count = ctx.num_keys
        keys, values, probabilities = rest[:count], rest[count : 2 * count], rest[2 * count :]
        dq_RHd, dk0_NGd, dv0_NGd = ctx.block.backward(grad_RHd, q_RHd, keys[0], values[0], out_RHd, z_RH)
        dk, dv = single_keys_backward(grad_RHd, q_RHd, out_RHd, probabilities, keys[1:], values[1:], dq_RHd)
        return None, None, dq_RHd, dk0_NGd, *dk, dv0_NGd, *dv


def merge_single_keys(
    q_RHd: Tensor, out0_RHd: Tensor, lse0_RH: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Join the attention over step 0 (its output and log-sum-exp) with the J single keys of each row.

    -> (output, logsumexp of all scores, probability [R, G, g] of each single key). One key at a time: every row has its
    own, so there is no matrix product in it, and plain sums are faster than R tiny ones.
    """
    groups = keys[0].shape[1]
    q_RGgd = _by_group(q_RHd, groups).to(lse0_RH.dtype) * (1 / math.sqrt(q_RHd.shape[2]))
    lse0_RGg = lse0_RH.unflatten(1, (groups, -1))
    scores = [(q_RGgd * key.unsqueeze(2)).sum(-1) for key in keys]
    all_scores = torch.stack([lse0_RGg, *scores])
    z_RGg = torch.logsumexp(all_scores, 0)
    share0_RGg, *probabilities = (all_scores - z_RGg).exp_().unbind()
    out_RGgd = _by_group(out0_RHd, groups) * share0_RGg.unsqueeze(-1)
    for probability, value in zip(probabilities, values):
        out_RGgd.addcmul_(probability.unsqueeze(-1), value.unsqueeze(2))
    return out_RGgd.to(q_RHd.dtype).view(out0_RHd.shape), z_RGg.flatten(1), probabilities


def single_keys_backward(
    grad_RHd: Tensor,
    q_RHd: Tensor,
    out_RHd: Tensor,
    probabilities: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    dq_RHd: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Add the single keys' part to dq; -> gradients of the keys, and of the values."""
    if not probabilities:
        return [], []
    groups, scale, wide = keys[0].shape[1], 1 / math.sqrt(q_RHd.shape[2]), probabilities[0].dtype
    q_RGgd, grad_RGgd = (_by_group(x, groups).to(wide) for x in (q_RHd, grad_RHd))
    delta_RGg = (grad_RGgd * _by_group(out_RHd, groups)).sum(-1)
    own_RGgd = torch.zeros_like(q_RGgd)
    q_RGgd = q_RGgd * scale
    key_grads, value_grads = [], []
    for probability, key, value in zip(probabilities, keys, values):
        d_score = (grad_RGgd * value.unsqueeze(2)).sum(-1).sub_(delta_RGg).mul_(probability).unsqueeze(-1)
        own_RGgd.addcmul_(d_score, key.unsqueeze(2))
        key_grads.append((d_score * q_RGgd).sum(2).to(key.dtype))
        value_grads.append((probability.unsqueeze(-1) * grad_RGgd).sum(2).to(value.dtype))
    _by_group(dq_RHd, groups).add_(own_RGgd, alpha=scale)
    return key_grads, value_grads


def _by_group(x_RHd: Tensor, groups: int) -> Tensor:
    """[R, H, d] -> [R, G, g, d]: the g query heads that share a key head."""
    return x_RHd.unflatten(1, (groups, -1))
