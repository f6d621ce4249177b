"""Losses of a block draft through the target's frozen head, a few labels at a time: logits are never stored.

Prediction k of anchor a has the label u = a+1+k, the teacher softmax(head(y_{u-1})) and, with a Markov head, the bias
W2 W1[x_{u-1}]: all three depend on u alone, so they are made once per label and shared by the (at most P) rows that
predict it.

    z_R = head(h_R) + W2 W1[x_{u-1}]     p = softmax(z)     q = softmax(head(y_{u-1}))      fp32, whole vocabulary
    CE = -log p[x_u]     L1 = sum |p - q|     acceptance = 1 - L1 / 2     BCE = BCEwithlogits(w . [h ; W1[x_{u-1}]] + b,
                                                                                               acceptance)
    loss = sum weight (ce CE + l1 L1 + confidence BCE)
    dCE/dz = p - onehot      dL1/dz = p (s - sum_v p s), s = sign(p - q)

DeepSpec (DSpark), loss of the trainer; DFlash is CE alone.

Letters: R counted rows, U labels, H hidden width, V vocabulary, E Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from specforge_lite.model.fused import fused
from specforge_lite.model.target_head import TargetHead

# Logits of a chunk on a CPU: what stays in its caches. A GPU wants large products: a share of its memory.
CPU_CHUNK_BYTES = 8 << 20
GPU_CHUNK_SHARE = 1 / 64
# fp32 copies of the logits of a chunk that are alive at once.
LIVE_COPIES = 6


@dataclass(frozen=True)
class BlockLossWeights:
    """Weights of the terms; DFlash: cross-entropy only."""

    cross_entropy: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0


@dataclass
class BlockRows:
    """What the loss reads of each row, and of each label.

    label_places_R: ascending places in the labels; weights_R fp32. label_tokens_U, teacher_UH: x_u and y_{u-1}.
    needs_teacher: off where only the cross-entropy is wanted; `correct` then means the label itself.
    """

    label_places_R: Tensor
    weights_R: Tensor
    label_tokens_U: Tensor
    teacher_UH: Tensor
    weights: BlockLossWeights
    needs_teacher: bool


@dataclass
class BlockResults:
    """Per row, detached, fp32: cross-entropy, L1 (0 without a teacher), acceptance, confidence logit; and whether the
    argmax is the teacher's (without one: the label)."""

    ce_R: Tensor
    l1_R: Tensor
    acceptance_R: Tensor
    confidence_R: Tensor
    correct_R: Tensor


def block_loss(
    h_RH: Tensor,
    markov: tuple[Tensor, Tensor] | None,
    confidence: tuple[Tensor, Tensor] | None,
    rows: BlockRows,
    head: TargetHead,
    compiled: bool = False,
) -> tuple[Tensor, BlockResults]:
    """-> (sum of weighted terms, results). markov: (W1[x_{u-1}] [U, E], W2 [V, E]). confidence: (w [1, H+E], b [1]).
    compiled: what lies between the matrix products is one compiled function.

    Gradients reach h, both Markov matrices and the confidence head; the target's head is frozen.
    """
    results: list[BlockResults] = []
    e_UE, w2_VE = markov if markov is not None else (None, None)
    w, b = confidence if confidence is not None else (None, None)
    loss = _BlockLoss.apply(h_RH, e_UE, w2_VE, w, b, rows, head, results, fused(loss_pass, compiled))
    return loss, results[0]


class _BlockLoss(torch.autograd.Function):
    """Makes the gradients in the forward pass, while each chunk's logits are at hand."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        h_RH: Tensor,
        e_UE: Tensor | None,
        w2_VE: Tensor | None,
        w_1F: Tensor | None,
        b_1: Tensor | None,
        rows: BlockRows,
        head: TargetHead,
        results: list[BlockResults],
        between: LossPass,
    ) -> Tensor:
        inputs = (h_RH, e_UE, w2_VE, w_1F, b_1)
        needed = any(ctx.needs_input_grad[:5])
        grads = [torch.zeros_like(x, dtype=_wide(x)) if x is not None and needed else None for x in inputs]
        num_rows, device = len(h_RH), h_RH.device
        new = lambda: torch.zeros(num_rows, dtype=_wide(h_RH), device=device)  # noqa: E731
        out = BlockResults(new(), new(), new(), new(), torch.zeros(num_rows, dtype=torch.bool, device=device))
        total = torch.zeros((), dtype=_wide(h_RH), device=device)
        num_labels = len(rows.label_tokens_U)
        chunk = chunk_labels(head.lm_head_VH.shape[0], device, num_rows / max(num_labels, 1))
        bounds = torch.searchsorted(
            rows.label_places_R, torch.arange(0, num_labels + chunk, chunk, device=device).clamp(max=num_labels)
        ).tolist()
        for index, (first, stop) in enumerate(pairwise(bounds)):
            if first < stop:
                labels = slice(index * chunk, min((index + 1) * chunk, num_labels))
                total += _chunk(inputs, grads, rows, head, out, labels, slice(first, stop), between)
        results.append(out)
        ctx.save_for_backward(
            *(None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs)),
        )
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None, None


def _chunk(
    inputs: tuple[Tensor | None, ...],
    grads: list[Tensor | None],
    rows: BlockRows,
    head: TargetHead,
    out: BlockResults,
    labels: slice,
    span: slice,
    between: LossPass,
) -> Tensor:
    """Loss of the rows `span`, whose labels are `labels`; fills their results and adds their gradients."""
    h_RH, e_UE, w2_VE, w_1F, b_1 = inputs
    assert h_RH is not None
    h, wide = h_RH[span], _wide(h_RH)
    weight = rows.weights_R[span].to(wide)
    place = rows.label_places_R[span] - labels.start
    base_RV = head.logits(h).to(wide)
    logits_RV = base_RV
    if e_UE is not None and w2_VE is not None:
        bias_UV = (e_UE[labels] @ w2_VE.T.to(e_UE.dtype)).to(wide)
        logits_RV = base_RV + bias_UV.index_select(0, place)
    label_R1 = rows.label_tokens_U[labels].index_select(0, place)[:, None]
    teacher_UV = head.logits(rows.teacher_UH[labels]).to(wide) if rows.needs_teacher else None
    ce, l1 = rows.weights.cross_entropy, rows.weights.l1
    dz_RV, ce_R, l1_R, correct_R = between(logits_RV, teacher_UV, place, label_R1, weight, ce, l1)
    out.ce_R[span], out.correct_R[span] = ce_R, correct_R
    terms_R = ce * ce_R
    if l1_R is not None:
        out.l1_R[span], out.acceptance_R[span] = l1_R, (1 - l1_R / 2).clamp(0, 1)
        terms_R = terms_R + l1 * l1_R
    if w_1F is not None and b_1 is not None:
        terms_R = terms_R + rows.weights.confidence * _confidence(inputs, grads, rows, out, labels, span, place)
    if grads[0] is not None:
        grads[0][span] += _through_head(dz_RV, base_RV, head)
        if e_UE is not None and w2_VE is not None and grads[1] is not None and grads[2] is not None:
            dz_UV = dz_RV.new_zeros(labels.stop - labels.start, dz_RV.shape[1]).index_add_(0, place, dz_RV)
            grads[1][labels] += dz_UV @ w2_VE.to(wide)
            grads[2].addmm_(dz_UV.T, e_UE[labels].to(wide))
    return (weight * terms_R).sum()


LossPass = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor, Tensor | None, Tensor]
]


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


def _confidence(
    inputs: tuple[Tensor | None, ...],
    grads: list[Tensor | None],
    rows: BlockRows,
    out: BlockResults,
    labels: slice,
    span: slice,
    place: Tensor,
) -> Tensor:
    """BCE of the confidence logit against the acceptance, per row; adds its gradients."""
    h_RH, e_UE, _, w_1F, b_1 = inputs
    assert h_RH is not None
    assert w_1F is not None
    assert b_1 is not None
    wide = _wide(h_RH)
    parts = [h_RH[span].to(wide)] if e_UE is None else [h_RH[span].to(wide), e_UE[labels].to(wide)[place]]
    x_RF = torch.cat(parts, 1)
    logit_R = x_RF @ w_1F.to(wide)[0] + b_1.to(wide)
    out.confidence_R[span] = logit_R
    target_R = out.acceptance_R[span].to(wide)
    if grads[0] is not None and grads[3] is not None and grads[4] is not None:
        d_R = rows.weights.confidence * rows.weights_R[span].to(wide) * (logit_R.sigmoid() - target_R)
        dx_RF = d_R[:, None] * w_1F.to(wide)
        width = h_RH.shape[1]
        grads[0][span] += dx_RF[:, :width]
        if grads[1] is not None:
            grads[1][labels].index_add_(0, place, dx_RF[:, width:])
        grads[3] += d_R @ x_RF
        grads[4] += d_R.sum()
    return binary_cross_entropy_with_logits(logit_R, target_R, reduction="none")


def _through_head(dz_RV: Tensor, base_RV: Tensor, head: TargetHead) -> Tensor:
    """Gradient of the logits -> of the head's input [R, H]: soft cap, logit scale, product."""
    if head.logit_softcap:
        dz_RV = dz_RV * (1 - (base_RV / head.logit_softcap).square())
    if head.logit_scale != 1.0:
        dz_RV = dz_RV * head.logit_scale
    return (dz_RV.to(head.lm_head_VH.dtype) @ head.lm_head_VH).to(base_RV.dtype)


def chunk_labels(vocab_size: int, device: torch.device, rows_per_label: float) -> int:
    """Labels a chunk may have, so that LIVE_COPIES of its rows' logits stay within the budget of the device."""
    budget = CPU_CHUNK_BYTES
    if device.type == "cuda":
        budget = int(torch.cuda.get_device_properties(device).total_memory * GPU_CHUNK_SHARE)
    return max(16, int(budget / (4 * LIVE_COPIES * vocab_size * max(rows_per_label, 1.0))))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
