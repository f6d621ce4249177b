"""The teacher's tokens and the loss of all TTT steps, one chunk of logits at a time.

Letters: M predicted tokens u of the batch, K steps, D draft width, H target width, V / Vd target / draft vocabulary.
Head inputs come as [M, K, D], predicted token first: the K rows that predict one token share its teacher, so the
teacher's distribution is made once per token and broadcast over the steps.

    loss = sum over (u, k) of weight[u, k] * CE(softmax(z_u over the draft vocabulary), W h[u, k])
    d loss / d logits = weight * (softmax(logits) - teacher)

The LK losses (`model/acceptance.py`) take the place of CE in the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_lite.model.acceptance import lk_pass
from specforge_lite.model.fused import fused
from specforge_lite.model.gemm import add_product, equal_chunks, matmul_into
from specforge_lite.model.target_head import TargetHead

# Elements of logits alive at a time (fp32: 4 bytes each). Below this GEMMs get thin, above it chunks leave the cache.
# The teacher's are read twice only, and its GEMM is the thinner one.
LOSS_CHUNK_ELEMENTS = 4 << 20
TEACHER_CHUNK_ELEMENTS = 8 << 20
LOSS_PASS_ELEMENTS = 1 << 20


@dataclass
class Teacher:
    """What the target says about M tokens.

    draft_logits_MVd: its logits over the draft vocabulary, compute dtype. argmax_M: its most probable token over the
    FULL vocabulary (target ids, int64). lse_M: logsumexp over the full vocabulary, fp32 (fp64 for fp64
    inputs), only if asked for.
    """

    draft_logits_MVd: Tensor
    argmax_M: Tensor
    lse_M: Tensor | None


def fast_argmax(x: Tensor) -> Tensor:
    """argmax over the last dimension, lowest index on ties; two levels, because a CPU argmax is ten times an amax.

    bf16 on a CPU is compared by its bits, as int16: ten times as fast again, and the same order from zero upwards.
    """
    width = x.shape[-1]
    block = next(size for size in (256, 128, 100, 64, 50, 32, 20, 16, 10, 8, 1) if width % size == 0)
    if x.is_cuda or block == 1 or width <= block:
        return x.argmax(-1)
    values = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    blocks = values.view(*x.shape[:-1], width // block, block)
    block_max = blocks.amax(-1)
    if x.dtype == torch.bfloat16 and bool((block_max.amax(-1) < 0).any()):  # a row without a number above zero
        return x.argmax(-1)
    best = block_max.argmax(-1, keepdim=True)
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
    accumulate = torch.promote_types(dtype, torch.float32)
    lse = torch.empty(len(last_MH), dtype=accumulate, device=last_MH.device) if want_lse else None
    buffer: Tensor | None = None
    for chunk in equal_chunks(len(last_MH), max(16, TEACHER_CHUNK_ELEMENTS // vocab_size)):
        buffer = matmul_into(buffer, last_MH[chunk].to(dtype), target_head.lm_head_VH)
        full = target_head.scale_logits(buffer)
        argmax[chunk] = fast_argmax(full)
        if lse is not None:
            lse[chunk] = torch.logsumexp(full.to(accumulate), -1)
        if want_logits:
            if num_draft == vocab_size:
                logits[chunk] = full
            else:
                torch.gather(full, 1, draft_ids_Vd.expand(len(full), -1), out=logits[chunk])
    return Teacher(logits, argmax, lse)


def ttt_cross_entropy(
    head_in_MKD: Tensor,
    weight_MK: Tensor,
    teacher_MVd: Tensor,
    teacher_id_M: Tensor,
    head_VdD: Tensor,
    compiled: bool = False,
    loss_name: str = "ce",
    teacher_lse_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunked linear + soft cross-entropy (or an LK loss); gradients are formed in the same pass.

    weight_MK: 0 where a row does not exist. teacher_id_M: draft id of the teacher's argmax. head_VdD: the parameter; it
    is cast to the dtype of its inputs here, and gets a gradient summed in fp32. compiled: fuse everything between the
    matrix products with torch.compile.
    Returns (weighted loss sum, fp32 scalar; unweighted loss [M, K]; correct [M, K] bool), the last two detached.
    """
    return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return]
        head_in_MKD, head_VdD, weight_MK, teacher_MVd, teacher_id_M, compiled, loss_name, teacher_lse_M
    )


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
        loss_name: str,
        teacher_lse_M: Tensor | None,
    ):
        (num_tokens, num_steps, width), device = head_in_MKD.shape, head_in_MKD.device
        head, num_draft = head_VdD.to(head_in_MKD.dtype), len(head_VdD)
        accumulate = torch.promote_types(head_in_MKD.dtype, torch.float32)
        weight_MK = weight_MK.to(accumulate)
        loss_MK = torch.empty(num_tokens, num_steps, dtype=accumulate, device=device)
        correct_MK = torch.empty(num_tokens, num_steps, dtype=torch.bool, device=device)
        grad_in_MKD = torch.empty_like(head_in_MKD) if any(ctx.needs_input_grad[:2]) else None
        grad_head = None if grad_in_MKD is None else torch.empty(num_draft, width, dtype=accumulate, device=device)
        chunks = equal_chunks(num_tokens, max(4, LOSS_CHUNK_ELEMENTS // (num_draft * num_steps)))
        buffer: Tensor | None = None
        for chunk in chunks:
            hidden = head_in_MKD[chunk].reshape(-1, width)
            buffer = logits = matmul_into(buffer, hidden, head)
            lse_m = None if teacher_lse_M is None else teacher_lse_M[chunk]
            logits_mKV = logits.view(-1, num_steps, num_draft)
            loss_MK[chunk], correct_MK[chunk] = logits_to_gradient(
                logits_mKV, teacher_MVd[chunk], teacher_id_M[chunk], compiled, loss_name, lse_m
            )
            if grad_in_MKD is not None and grad_head is not None:
                weight = weight_MK[chunk].reshape(-1, 1).to(hidden.dtype)
                grad_in_MKD[chunk] = (logits @ head).mul_(weight).view(-1, num_steps, width)
                add_product(grad_head, logits, hidden * weight, first=chunk.start == 0)
        if grad_head is not None and num_tokens == 0:
            grad_head.zero_()
        ctx.save_for_backward(grad_in_MKD, grad_head)
        # where, not a product: the loss of a row that does not exist may be anything
        loss = torch.where(weight_MK > 0, loss_MK * weight_MK, 0).sum()
        ctx.mark_non_differentiable(loss_MK, correct_MK)
        return loss, loss_MK, correct_MK

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _loss: Tensor, _correct: Tensor):  # type: ignore[no-untyped-def, override]
        grad_in_MKD, grad_head_VdD = ctx.saved_tensors
        # in place: they are nobody else's, and a second backward through the same graph raises
        if grad_in_MKD.dtype == torch.float16:  # a loss scale may lie outside its range, the product inside
            grad_in_MKD.copy_(grad_in_MKD.float().mul_(grad_loss))
        else:
            grad_in_MKD.mul_(grad_loss.to(grad_in_MKD.dtype))
        return grad_in_MKD, grad_head_VdD.mul_(grad_loss), None, None, None, None, None, None


def logits_to_gradient(
    logits_mKV: Tensor,
    teacher_mV: Tensor,
    teacher_id_m: Tensor,
    compiled: bool = False,
    loss_name: str = "ce",
    teacher_lse_m: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Overwrite logits by d loss / d logits, for CE softmax(logits) - teacher; -> (loss [m, K], hit [m, K]).

    On a CPU a few tokens at a time, so that what one pass writes is still in the cache for the next one.
    A tie with the teacher's token counts as a hit here; evaluation compares argmax ids (`judge_rows`).
    """
    tokens = len(logits_mKV) if logits_mKV.is_cuda else max(1, LOSS_PASS_ELEMENTS // logits_mKV[0].numel())
    parts = zip(logits_mKV.split(tokens), teacher_mV.split(tokens), teacher_id_m.split(tokens))
    if teacher_lse_m is None:
        loss_pass = fused(loss_pass_fused) if compiled else loss_pass_inplace
        results = [loss_pass(logits, teacher, ids) for logits, teacher, ids in parts]
    else:
        of_acceptance, lses = fused(lk_pass, compiled), teacher_lse_m.split(tokens)
        results = [of_acceptance(*part, lse, loss_name) for part, lse in zip(parts, lses)]
    losses, hits = zip(*results)
    return torch.cat(losses), torch.cat(hits)


def loss_pass_inplace(logits_mKV: Tensor, teacher_mV: Tensor, teacher_id_m: Tensor) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(logits_mKV.dtype, torch.float32)
    wide_mKV = logits_mKV.to(accumulate)
    teacher_mV = torch.softmax(teacher_mV, -1, dtype=accumulate)
    top_mK = wide_mKV.amax(-1)
    hit_mK = _logit_of(wide_mKV, teacher_id_m) >= top_mK
    # the teacher on the left: the same sums the other way round take a CPU five times as long
    expected_mK = torch.bmm(teacher_mV.unsqueeze(1), wide_mKV.transpose(1, 2)).squeeze(1)
    torch.softmax(wide_mKV, -1, out=wide_mKV)
    # logsumexp = top - log(p of the top); that p is at least 1 / Vd, so the log is safe
    loss_mK = top_mK - wide_mKV.amax(-1).log() - expected_mK
    wide_mKV.sub_(teacher_mV.unsqueeze(1))
    if wide_mKV is not logits_mKV:
        logits_mKV.copy_(wide_mKV)
    return loss_mK, hit_mK


def loss_pass_fused(logits_mKV: Tensor, teacher_mV: Tensor, teacher_id_m: Tensor) -> tuple[Tensor, Tensor]:
    """The same, written as one expression for torch.compile."""
    accumulate = torch.promote_types(logits_mKV.dtype, torch.float32)
    wide_mKV = logits_mKV.to(accumulate)
    teacher_m1V = torch.softmax(teacher_mV.to(accumulate), -1).unsqueeze(1)
    top_mK = wide_mKV.amax(-1)
    exp_mKV = (wide_mKV - top_mK.unsqueeze(-1)).exp()
    total_mK = exp_mKV.sum(-1)
    loss_mK = top_mK + total_mK.log() - (teacher_m1V * wide_mKV).sum(-1)
    hit_mK = _logit_of(wide_mKV, teacher_id_m) >= top_mK
    logits_mKV.copy_(exp_mKV / total_mK.unsqueeze(-1) - teacher_m1V)
    return loss_mK, hit_mK


def _logit_of(logits_mKV: Tensor, ids_m: Tensor) -> Tensor:
    return logits_mKV.gather(-1, ids_m[:, None, None].expand(-1, logits_mKV.shape[1], 1)).squeeze(-1)


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
    for chunk in equal_chunks(num_tokens, max(4, LOSS_CHUNK_ELEMENTS // (len(head_VdD) * num_steps))):
        logits_mKV = (head_in_MKD[chunk].reshape(-1, width) @ head_VdD.T).view(-1, num_steps, len(head_VdD))
        correct_MK[chunk] = fast_argmax(logits_mKV) == teacher_id_M[chunk, None]
        target_mV = (teacher.draft_logits_MVd[chunk].float() - teacher.lse_M[chunk, None]).exp()
        draft_mKV = torch.softmax(logits_mKV, -1, dtype=torch.float32)
        alpha_MK[chunk] = torch.minimum(draft_mKV, target_mV.unsqueeze(1)).sum(-1)
    return correct_MK, alpha_MK
