"""Losses of a block draft through the target's frozen head, a few labels at a time: logits are never stored.

Prediction k of anchor a has the label u = a+1+k, the teacher softmax(head(y_{u-1})) and, with a Markov head, the bias
W2 W1[x_{u-1}]: all three depend on u alone, so they are made once per label and shared by the (at most P) rows that
predict it.

    z_R = head(h_R) + W2 W1[x_{u-1}]     p = softmax(z)     q = softmax(head(y_{u-1}))      fp32, whole vocabulary
    CE = -log p[x_u]     L1 = sum |p - q|     acceptance = 1 - L1 / 2     loss = sum weight (ce CE + l1 L1)
    dCE/dz = p - onehot      dL1/dz = p (s - sum_v p s), s = sign(p - q)

DeepSpec (DSpark), loss of the trainer; DFlash is CE alone.

Letters: R counted rows, U labels, H hidden width, V vocabulary, E Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from specforge_lite.model.layers import maybe_fused
from specforge_lite.model.target_head import TargetHead

# Logits of a chunk on a CPU: what stays in its caches. A GPU wants large products: a share of its memory.
CPU_CHUNK_BYTES = 8 << 20
GPU_CHUNK_SHARE = 1 / 64
# fp32 copies of the logits of a chunk that are alive at once.
LIVE_COPIES = 6


@dataclass
class BlockRows:
    """What the loss reads of each row, and of each label.

    label_places_R: ascending places in the labels; weights_R fp32. label_tokens_U: x_u. teacher_UH: y_{u-1}, or None
    where only the cross-entropy is wanted; `correct` then means the label itself. ce, l1: weights of the two terms.
    """

    label_places_R: Tensor
    weights_R: Tensor
    label_tokens_U: Tensor
    teacher_UH: Tensor | None
    ce: float
    l1: float


@dataclass
class BlockResults:
    """Per row, detached, fp32: cross-entropy, acceptance (0 without a teacher); and whether the argmax is the teacher's
    (without one: the label)."""

    ce_R: Tensor
    acceptance_R: Tensor
    correct_R: Tensor


def block_loss(
    h_RH: Tensor, markov: tuple[Tensor, Tensor] | None, rows: BlockRows, head: TargetHead, compiled: bool = False
) -> tuple[Tensor, BlockResults]:
    """-> (weighted sum, results). markov: (W1[x_{u-1}] [U, E], W2 [V, E]); gradients reach them and h. compiled: what
    lies between the matrix products is one compiled function."""
    loss, *results = _BlockLoss.apply(h_RH, *(markov or (None, None)), rows, head, compiled)
    return loss, BlockResults(*results)


class _BlockLoss(torch.autograd.Function):
    """Makes the gradients in the forward pass, while each chunk's logits are at hand."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        h_RH: Tensor,
        e_UE: Tensor | None,
        w2_VE: Tensor | None,
        rows: BlockRows,
        head: TargetHead,
        compiled: bool,
    ):
        wide, device, inputs = torch.promote_types(h_RH.dtype, torch.float32), h_RH.device, (h_RH, e_UE, w2_VE)
        needed = any(ctx.needs_input_grad[:3])
        dh_RH, de_UE, dw2_VE = (torch.zeros_like(x, dtype=wide) if needed and x is not None else None for x in inputs)
        ce_R, acceptance_R = (torch.zeros(len(h_RH), dtype=wide, device=device) for _ in range(2))
        correct_R = torch.zeros(len(h_RH), dtype=torch.bool, device=device)
        total = torch.zeros((), dtype=wide, device=device)
        num_labels, matrix_VH, between = len(rows.label_tokens_U), head.lm_head_VH, maybe_fused(loss_pass, compiled)
        size = chunk_labels(len(matrix_VH), device, len(h_RH) / max(num_labels, 1))
        starts = torch.arange(0, num_labels + size, size, device=device).clamp(max=num_labels)
        bounds = torch.searchsorted(rows.label_places_R, starts).tolist()
        for index, (first, stop) in enumerate(pairwise(bounds)):
            labels, span = slice(index * size, min((index + 1) * size, num_labels)), slice(first, stop)
            place_R, weight_R = rows.label_places_R[span] - labels.start, rows.weights_R[span].to(wide)
            raw_RV, slope_RV = head.finish(h_RH[span].to(matrix_VH.dtype) @ matrix_VH.T)
            logits_RV = raw_RV.to(wide)
            if e_UE is not None and w2_VE is not None:
                bias_UV = (e_UE[labels] @ w2_VE.T.to(e_UE.dtype)).to(wide)
                logits_RV = logits_RV + bias_UV.index_select(0, place_R)
            teacher_UV = None if rows.teacher_UH is None else head.logits(rows.teacher_UH[labels]).to(wide)
            label_R1 = rows.label_tokens_U[labels].index_select(0, place_R)[:, None]
            dz_RV, ce_R[span], l1_R, correct_R[span] = between(
                logits_RV, teacher_UV, place_R, label_R1, weight_R, rows.ce, rows.l1
            )
            terms_R = rows.ce * ce_R[span]
            if l1_R is not None:
                acceptance_R[span] = (1 - l1_R / 2).clamp(0, 1)
                terms_R = terms_R + rows.l1 * l1_R
            total += (weight_R * terms_R).sum()
            if dh_RH is None:
                continue
            if e_UE is not None and w2_VE is not None and de_UE is not None and dw2_VE is not None:
                dz_UV = dz_RV.new_zeros(labels.stop - labels.start, dz_RV.shape[1]).index_add_(0, place_R, dz_RV)
                de_UE[labels] = dz_UV @ w2_VE.to(wide)
                dw2_VE.addmm_(dz_UV.T, e_UE[labels].to(wide))
            draw_RV = dz_RV if slope_RV is None else dz_RV * slope_RV
            dh_RH[span] = (draw_RV.to(matrix_VH.dtype) @ matrix_VH).to(wide)
        grads = (dh_RH, de_UE, dw2_VE)
        ctx.save_for_backward(*(None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs)))
        ctx.mark_non_differentiable(ce_R, acceptance_R, correct_R)
        return total, ce_R, acceptance_R, correct_R

    @staticmethod
    def backward(ctx, grad: Tensor, *_results: Tensor):  # type: ignore[no-untyped-def, override]
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None


def loss_pass(
    logits_RV: Tensor,
    teacher_UV: Tensor | None,
    place_R: Tensor,
    label_R1: Tensor,
    weight_R: Tensor,
    cross_entropy: float,
    l1: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """-> (gradient of the logits [R, V], CE [R], L1 [R] or None without a teacher, whether the argmax is right [R])."""
    log_p_RV = logits_RV.log_softmax(-1)
    ce_R = -log_p_RV.gather(1, label_R1)[:, 0]
    p_RV = log_p_RV.exp_()
    dz_RV = cross_entropy * p_RV
    dz_RV.scatter_add_(1, label_R1, torch.full_like(ce_R[:, None], -cross_entropy))
    if teacher_UV is None:
        return dz_RV.mul_(weight_R[:, None]), ce_R, None, logits_RV.argmax(-1) == label_R1[:, 0]
    correct_R = logits_RV.argmax(-1) == teacher_UV.argmax(-1)[place_R]
    gap_RV = p_RV - teacher_UV.softmax(-1).index_select(0, place_R)
    l1_R = gap_RV.abs().sum(-1)
    slope_RV = gap_RV.sign_().mul_(p_RV)  # p s
    dz_RV.add_(slope_RV.sub_(p_RV * slope_RV.sum(-1, keepdim=True)), alpha=l1)
    return dz_RV.mul_(weight_R[:, None]), ce_R, l1_R, correct_R


def chunk_labels(vocab_size: int, device: torch.device, rows_per_label: float) -> int:
    """Labels a chunk may have, so that LIVE_COPIES of its rows' logits stay within the budget of the device."""
    budget = CPU_CHUNK_BYTES
    if device.type == "cuda":
        budget = int(torch.cuda.get_device_properties(device).total_memory * GPU_CHUNK_SHARE)
    return max(16, int(budget / (4 * LIVE_COPIES * vocab_size * max(rows_per_label, 1.0))))
