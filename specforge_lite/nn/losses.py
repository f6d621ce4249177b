"""The teacher's tokens and the soft cross-entropy of all TTT steps, one chunk of logits at a time.

Letters: M predicted tokens u of the batch, K steps, D draft width, H target width, V / Vd target / draft vocabulary.
Head inputs come as [M, K, D], predicted token first: the K rows that predict one token share its teacher, so the
teacher's distribution is made once per token and broadcast over the steps.

    loss = sum over (u, k) of weight[u, k] * CE(softmax(z_u over the draft vocabulary), W h[u, k])
    d loss / d logits = weight * (softmax(logits) - teacher)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_lite.nn.target_head import TargetHead

LossPass = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

# Elements of logits alive at a time (fp32: 4 bytes each). Below this GEMMs get thin, above it chunks leave the cache.
LOSS_CHUNK_ELEMENTS = 4 << 20
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
    buffer: Tensor | None = None
    for start in range(0, len(last_MH), rows):
        chunk = slice(start, start + rows)
        buffer = matmul_into(buffer, last_MH[chunk].to(dtype), target_head.lm_head_VH)
        full = target_head.scale_logits(buffer)
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
    head_in_MKD: Tensor,
    weight_MK: Tensor,
    teacher_MVd: Tensor,
    teacher_id_M: Tensor,
    head_VdD: Tensor,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunked linear + soft cross-entropy; gradients are formed in the same pass.

    weight_MK: 0 where a row does not exist. teacher_id_M: draft id of the teacher's argmax. compiled: fuse everything
    between the matrix products with torch.compile.
    Returns (weighted loss sum, fp32 scalar; unweighted loss [M, K]; correct [M, K] bool), the last two detached.
    """
    return _ChunkedCrossEntropy.apply(head_in_MKD, head_VdD, weight_MK, teacher_MVd, teacher_id_M, compiled)  # type: ignore[no-any-return]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        head_in_MKD: Tensor,
        head_VdD: Tensor,
        weight_MK: Tensor,
        teacher_MVd: Tensor,
        teacher_id_M: Tensor,
        compiled: bool,
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
        loss_pass = _compiled_loss_pass() if compiled else loss_pass_inplace
        tokens = max(4, LOSS_CHUNK_ELEMENTS // (num_draft * num_steps))
        buffer: Tensor | None = None
        for start in range(0, num_tokens, tokens):
            chunk = slice(start, start + tokens)
            hidden = head_in_MKD[chunk].reshape(-1, width)
            buffer = matmul_into(buffer, hidden, head_VdD)
            logits_mKV = buffer.view(-1, num_steps, num_draft)
            delta_mKV, loss_MK[chunk], correct_MK[chunk] = loss_pass(
                logits_mKV, teacher_MVd[chunk], teacher_id_M[chunk]
            )
            if grad_in_MKD is not None and grad_head_VdD is not None:
                delta = delta_mKV.view(-1, num_draft)
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
        grad_in = grad_in_MKD * grad_loss.to(grad_in_MKD.dtype)
        return grad_in, (grad_head_VdD * grad_loss).to(ctx.head_dtype), None, None, None, None


def loss_pass_inplace(logits_mKV: Tensor, teacher_mV: Tensor, teacher_id_m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits -> (softmax(logits) - teacher, in the logits' dtype and where possible memory; CE [m, K]; hit [m, K]).

    A tie with the teacher's token counts as a hit here; evaluation compares argmax ids (`judge_rows`).
    """
    accumulate = torch.promote_types(logits_mKV.dtype, torch.float32)
    wide_mKV = logits_mKV.to(accumulate)
    teacher_mV = torch.softmax(teacher_mV, -1, dtype=accumulate)
    top_mK = wide_mKV.amax(-1)
    hit_mK = _logit_of(wide_mKV, teacher_id_m) >= top_mK
    expected_mK = torch.bmm(wide_mKV, teacher_mV.unsqueeze(-1)).squeeze(-1)
    torch.softmax(wide_mKV, -1, out=wide_mKV)
    # logsumexp = top - log(p of the top); that p is at least 1 / Vd, so the log is safe
    loss_mK = top_mK - wide_mKV.amax(-1).log() - expected_mK
    return wide_mKV.sub_(teacher_mV.unsqueeze(1)).to(logits_mKV.dtype), loss_mK, hit_mK


def loss_pass_fused(logits_mKV: Tensor, teacher_mV: Tensor, teacher_id_m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, written as one expression for torch.compile: three reads and one write of the logits."""
    accumulate = torch.promote_types(logits_mKV.dtype, torch.float32)
    wide_mKV = logits_mKV.to(accumulate)
    teacher_mV = torch.softmax(teacher_mV.to(accumulate), -1)
    top_mK = wide_mKV.amax(-1)
    exp_mKV = (wide_mKV - top_mK.unsqueeze(-1)).exp()
    total_mK = exp_mKV.sum(-1)
    loss_mK = top_mK + total_mK.log() - (teacher_mV.unsqueeze(1) * wide_mKV).sum(-1)
    hit_mK = _logit_of(wide_mKV, teacher_id_m) >= top_mK
    delta_mKV = exp_mKV / total_mK.unsqueeze(-1) - teacher_mV.unsqueeze(1)
    return delta_mKV.to(logits_mKV.dtype), loss_mK, hit_mK


_COMPILED: dict[str, LossPass] = {}


def _compiled_loss_pass() -> LossPass:
    if "loss" not in _COMPILED:
        _COMPILED["loss"] = torch.compile(loss_pass_fused, dynamic=True)
    return _COMPILED["loss"]


def _logit_of(logits_mKV: Tensor, ids_m: Tensor) -> Tensor:
    return logits_mKV.gather(-1, ids_m[:, None, None].expand(-1, logits_mKV.shape[1], 1)).squeeze(-1)


def matmul_into(buffer: Tensor | None, rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight^T, into `buffer` when it has the shape: fresh pages cost a CPU a third of such a product."""
    if buffer is None or buffer.shape != (len(rows), len(weight)):
        return rows @ weight.T
    return torch.mm(rows, weight.T, out=buffer)


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
