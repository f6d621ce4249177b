"""The teacher's tokens and the soft cross-entropy of all TTT steps, one chunk of logits at a time.

Letters: M predicted tokens u of the batch, K steps, D draft width, H target width, V / Vd target / draft vocabulary.
Head inputs come as [M, K, D], predicted token first: the K rows that predict one token share its teacher, so the
teacher's distribution is made once per token and broadcast over the steps.

    loss = sum over (u, k) of weight[u, k] * CE(softmax(z_u over the draft vocabulary), W h[u, k])
    d loss / d logits = weight * (softmax(logits) - teacher)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_lite.nn.target_head import TargetHead

# Elements of logits alive at a time (fp32: 4 bytes each). Below this GEMMs get thin, above it chunks leave the cache.
LOSS_CHUNK_ELEMENTS = 2 << 20
TEACHER_CHUNK_ELEMENTS = 4 << 20


@dataclass
class Teacher:
    """What the target says about M tokens.

    draft_logits_MVd: its logits over the draft vocabulary, compute dtype. argmax_M: its most probable token over the
    FULL vocabulary (target ids, int64). lse_M: logsumexp over the full vocabulary, fp32, only if asked for.
    """

    draft_logits_MVd: Tensor
    argmax_M: Tensor
    lse_M: Tensor | None


def fast_argmax(x: Tensor) -> Tensor:
    """argmax over the last dimension, lowest index on ties; two levels, because a CPU argmax is ten times an amax."""
    width = x.shape[-1]
    block = next(size for size in (256, 128, 100, 64, 50, 32, 20, 16, 10, 8, 1) if width % size == 0)
    if x.is_cuda or block == 1 or width <= block:
        return x.argmax(-1)
    blocks = x.view(*x.shape[:-1], width // block, block)
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(-2, best.unsqueeze(-1).expand(*best.shape, block)).squeeze(-2).argmax(-1)
    return best.squeeze(-1) * block + inside


@torch.no_grad()
def ask_teacher(
    target_head: TargetHead, last_MH: Tensor, draft_ids_Vd: Tensor, want_lse: bool = False, want_logits: bool = True
) -> Teacher:
    """Full-vocabulary argmax in chunks, never stored; draft-vocabulary logits picked from the same product.

    last_MH: target states y_(u-1) after the final norm. draft_ids_Vd: target id of every draft id.
    """
    vocab_size, num_draft = target_head.lm_head_VH.shape[0], len(draft_ids_Vd)
    dtype = target_head.lm_head_VH.dtype
    logits = torch.empty(len(last_MH) if want_logits else 0, num_draft, dtype=dtype, device=last_MH.device)
    argmax = torch.empty(len(last_MH), dtype=torch.int64, device=last_MH.device)
    lse = torch.empty(len(last_MH), device=last_MH.device) if want_lse else None
    rows = max(16, TEACHER_CHUNK_ELEMENTS // vocab_size)
    for start in range(0, len(last_MH), rows):
        chunk = slice(start, start + rows)
        full = target_head.logits(last_MH[chunk])
        argmax[chunk] = fast_argmax(full)
        if lse is not None:
            lse[chunk] = torch.logsumexp(full.float(), -1)
        if want_logits:
            if num_draft == vocab_size:
                logits[chunk] = full
            else:
                torch.index_select(full, 1, draft_ids_Vd, out=logits[chunk])
    return Teacher(logits, argmax, lse)


def ttt_cross_entropy(
    head_in_MKD: Tensor, weight_MK: Tensor, teacher_MVd: Tensor, teacher_id_M: Tensor, head_VdD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunked linear + soft cross-entropy; gradients are formed in the same pass.

    weight_MK: 0 where a row does not exist. teacher_id_M: draft id of the teacher's argmax.
    Returns (weighted loss sum, fp32 scalar; unweighted loss [M, K]; correct [M, K] bool), the last two detached.
    """
    return _ChunkedCrossEntropy.apply(head_in_MKD, head_VdD, weight_MK, teacher_MVd, teacher_id_M)  # type: ignore[no-any-return]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, head_in_MKD: Tensor, head_VdD: Tensor, weight_MK: Tensor, teacher_MVd: Tensor, teacher_id_M: Tensor
    ):
        num_tokens, num_steps, width = head_in_MKD.shape
        num_draft = len(head_VdD)
        accumulate = torch.promote_types(head_in_MKD.dtype, torch.float32)
        weight_MK = weight_MK.to(accumulate)
        loss_MK = torch.empty(num_tokens, num_steps, dtype=accumulate, device=head_in_MKD.device)
        correct_MK = torch.empty(num_tokens, num_steps, dtype=torch.bool, device=head_in_MKD.device)
        want_grad = any(ctx.needs_input_grad[:2])
        grad_in_MKD = torch.empty_like(head_in_MKD) if want_grad else None
        grad_head_VdD = torch.zeros(num_draft, width, dtype=accumulate, device=head_VdD.device) if want_grad else None
        tokens = max(4, LOSS_CHUNK_ELEMENTS // (num_draft * num_steps))
        buffer: Tensor | None = None
        for start in range(0, num_tokens, tokens):
            chunk = slice(start, start + tokens)
            hidden = head_in_MKD[chunk].reshape(-1, width)
            buffer = _matmul_into(buffer, hidden, head_VdD)
            logits_mKV = buffer.view(-1, num_steps, num_draft).to(accumulate)
            teacher_mV = torch.softmax(teacher_MVd[chunk], -1, dtype=accumulate)
            top_mK = logits_mKV.amax(-1)
            pick = teacher_id_M[chunk, None, None].expand(-1, num_steps, 1)
            teacher_logit_mK = logits_mKV.gather(-1, pick).squeeze(-1)
            # A tie with the teacher's token counts as right here; evaluation compares argmax ids.
            correct_MK[chunk] = teacher_logit_mK >= top_mK
            expected_mK = torch.bmm(logits_mKV, teacher_mV.unsqueeze(-1)).squeeze(-1)
            loss_MK[chunk] = _softmax_inplace(logits_mKV, top_mK) - expected_mK
            if grad_in_MKD is not None and grad_head_VdD is not None:
                logits_mKV.sub_(teacher_mV.unsqueeze(1))
                delta = logits_mKV.view(-1, num_draft).to(hidden.dtype)
                weight = weight_MK[chunk].reshape(-1, 1).to(hidden.dtype)
                grad_in_MKD[chunk] = ((delta @ head_VdD) * weight).view(-1, num_steps, width)
                _accumulate(grad_head_VdD, delta, hidden * weight)
        ctx.save_for_backward(grad_in_MKD, grad_head_VdD)
        ctx.head_dtype = head_VdD.dtype
        # where, not a product: the loss of a row that does not exist may be anything
        loss = torch.where(weight_MK > 0, loss_MK * weight_MK, 0).sum()
        ctx.mark_non_differentiable(loss_MK, correct_MK)
        return loss, loss_MK, correct_MK

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _loss: Tensor, _correct: Tensor):  # type: ignore[no-untyped-def, override]
        grad_in_MKD, grad_head_VdD = ctx.saved_tensors
        scale = grad_loss
        return grad_in_MKD * scale.to(grad_in_MKD.dtype), (grad_head_VdD * scale).to(ctx.head_dtype), None, None, None


def _matmul_into(buffer: Tensor | None, hidden: Tensor, head_VdD: Tensor) -> Tensor:
    """hidden @ head^T, reusing the chunk buffer when it fits."""
    if buffer is None or len(buffer) != len(hidden):
        return hidden @ head_VdD.T
    return torch.mm(hidden, head_VdD.T, out=buffer)


def _softmax_inplace(logits_mKV: Tensor, top_mK: Tensor) -> Tensor:
    """logits become probabilities; returns their logsumexp [m, K]. At the top logit p >= 1/Vd, so its log is safe."""
    torch.softmax(logits_mKV, -1, out=logits_mKV)
    return top_mK - logits_mKV.amax(-1).log()


def _accumulate(total_VdD: Tensor, delta: Tensor, hidden: Tensor) -> None:
    if total_VdD.dtype == delta.dtype:
        total_VdD.addmm_(delta.T, hidden)
    else:
        total_VdD += delta.T @ hidden


@torch.no_grad()
def judge_rows(head_in_MKD: Tensor, teacher: Teacher, teacher_id_M: Tensor, head_VdD: Tensor) -> tuple[Tensor, Tensor]:
    """For evaluation: (argmax equals the teacher's [M, K] bool, alpha [M, K] fp32).

    alpha = sum over v of min(p, q): the chance that speculative sampling keeps the token; p is the target's
    probability over its FULL vocabulary, q the draft's.
    """
    assert teacher.lse_M is not None
    num_tokens, num_steps, width = head_in_MKD.shape
    correct_MK = torch.empty(num_tokens, num_steps, dtype=torch.bool, device=head_in_MKD.device)
    alpha_MK = torch.empty(num_tokens, num_steps, device=head_in_MKD.device)
    tokens = max(4, LOSS_CHUNK_ELEMENTS // (len(head_VdD) * num_steps))
    for start in range(0, num_tokens, tokens):
        chunk = slice(start, start + tokens)
        logits_mKV = (head_in_MKD[chunk].reshape(-1, width) @ head_VdD.T).view(-1, num_steps, len(head_VdD))
        correct_MK[chunk] = fast_argmax(logits_mKV) == teacher_id_M[chunk, None]
        target_mV = (teacher.draft_logits_MVd[chunk].float() - teacher.lse_M[chunk, None]).exp()
        draft_mKV = torch.softmax(logits_mKV, -1, dtype=torch.float32)
        alpha_MK[chunk] = torch.minimum(draft_mKV, target_mV.unsqueeze(1)).sum(-1)
    return correct_MK, alpha_MK
