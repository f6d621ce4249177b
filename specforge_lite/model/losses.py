"""The teacher's tokens and the loss of all TTT steps, one chunk of logits at a time.

Letters: M predicted tokens u of the batch, m those of a chunk, K steps, D width of the head's input, H target width,
V / Vd target / draft vocabulary. Head inputs come as [M, K, D], predicted token first: the K rows that predict one
token share its teacher, so the teacher's distribution is made once per token and broadcast over the steps.

    loss = sum over (u, k) of weight[u, k] * CE(softmax(z_u over the draft vocabulary), logits of h[u, k])
    d loss / d logits = weight * (softmax(logits) - teacher)

An EAGLE-3 draft has a head of its own, an EAGLE-1 draft uses the target's, frozen, with its bias, scale and soft cap.

`--loss lk` and `lk_alpha` take the place of CE in the same pass: `model/lk_loss.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge_lite.model.deferred_grad import add_product
from specforge_lite.model.layers import maybe_fused
from specforge_lite.model.target_head import TargetHead

# Logits alive at a time. On a CPU a chunk stays in the cache; a GPU wants few and large ones, as its memory allows.
CPU_CHUNK_ELEMENTS = 4 << 20
CPU_PASS_ELEMENTS = 1 << 20
BYTES_PER_CHUNK_ELEMENT = 256  # of GPU memory: a chunk takes at most 12 bytes an element, 5% of it
UNKNOWN_MEMORY = 80 << 30  # of a device that does not tell


class TeacherChunks(Protocol):
    """What a target says about the M predicted tokens."""

    def chunk(self, tokens: slice, want_lse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of some of the tokens -> (logits over the draft vocabulary [m, Vd]; draft id of the most probable token [m]
        int64; logsumexp over the FULL vocabulary [m] in fp32 or wider, if wanted)."""


@dataclass
class Teacher:
    """Of an EAGLE-3 draft: logits over its own vocabulary are made once and kept.

    draft_logits_MVd: compute dtype. argmax_M: the most probable token over the FULL vocabulary (target ids, int64),
    draft_id_M its draft id (that of the next lower token, where it is not in the draft vocabulary). lse_M: logsumexp
    over the full vocabulary, fp32 (fp64 for fp64 inputs), only if asked for.
    """

    draft_logits_MVd: Tensor
    argmax_M: Tensor
    draft_id_M: Tensor
    lse_M: Tensor | None

    def chunk(self, tokens: slice, want_lse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        lse_m = self.lse_M[tokens] if want_lse and self.lse_M is not None else None
        return self.draft_logits_MVd[tokens], self.draft_id_M[tokens], lse_m


def chunk_elements(device_type: str, memory: int = UNKNOWN_MEMORY) -> int:
    """Logits that may be alive at a time on a device with so many bytes of memory."""
    return CPU_CHUNK_ELEMENTS if device_type == "cpu" else memory // BYTES_PER_CHUNK_ELEMENT


def _chunks(num_tokens: int, columns: int, device: torch.device) -> Iterator[slice]:
    """0..num_tokens in as few chunks of `columns` logits a token as possible, of sizes as equal as they can be: a last
    chunk of a few tokens would cost a whole pass over the weights."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else UNKNOWN_MEMORY
    count = -(-num_tokens // max(4, chunk_elements(device.type, memory) // columns))
    for i in range(count):
        yield slice(num_tokens * i // count, num_tokens * (i + 1) // count)


@torch.no_grad()
def ask_teacher(target_head: TargetHead, last_MH: Tensor, draft_ids_Vd: Tensor, want_lse: bool = False) -> Teacher:
    """Full-vocabulary argmax in chunks, never stored; draft-vocabulary logits picked from the same product.

    last_MH: target states y_(u-1) after the final norm. draft_ids_Vd: target id of every draft id, ascending.
    """
    vocab_size, num_draft, device = target_head.lm_head_VH.shape[0], len(draft_ids_Vd), last_MH.device
    dtype = target_head.lm_head_VH.dtype
    logits = torch.empty(len(last_MH), num_draft, dtype=dtype, device=device)
    argmax = torch.empty(len(last_MH), dtype=torch.int64, device=device)
    accumulate = torch.promote_types(dtype, torch.float32)
    lse = torch.empty(len(last_MH), dtype=accumulate, device=device) if want_lse else None
    for chunk in _chunks(len(last_MH), vocab_size, device):
        full = target_head.logits(last_MH[chunk])
        torch.argmax(full, -1, out=argmax[chunk])
        if lse is not None:
            lse[chunk] = torch.logsumexp(full.to(accumulate), -1)
        if num_draft == vocab_size:
            logits[chunk] = full
        else:
            torch.index_select(full, 1, draft_ids_Vd, out=logits[chunk])
    draft_id = (torch.searchsorted(draft_ids_Vd, argmax, right=True) - 1).clamp_(min=0)
    return Teacher(logits, argmax, draft_id, lse)


def chunked_cross_entropy(
    head_in_MKD: Tensor,
    weight_MK: Tensor,
    teacher: TeacherChunks,
    head: Tensor | TargetHead,
    loss_name: str = "ce",
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunked linear + soft cross-entropy (or an LK loss); gradients are formed in the same pass.

    weight_MK: 0 where a row does not exist or does not count. head: the draft's parameter [Vd, D], which is cast to the
    dtype of its inputs here and gets a gradient summed in fp32; or the target's, which gets none. compiled: fuse
    everything between the matrix products with torch.compile.
    Returns (weighted loss sum, fp32 scalar; unweighted loss [M, K]; correct [M, K] bool), the last two detached.
    """
    own_VD = head if isinstance(head, Tensor) else None
    return _ChunkedCrossEntropy.apply(head_in_MKD, own_VD, weight_MK, teacher, head, loss_name, compiled)  # type: ignore[no-any-return]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        head_in_MKD: Tensor,
        own_VD: Tensor | None,
        weight_MK: Tensor,
        teacher: TeacherChunks,
        head: Tensor | TargetHead,
        loss_name: str,
        compiled: bool,
    ):
        (num_tokens, num_steps, width), device = head_in_MKD.shape, head_in_MKD.device
        accumulate = torch.promote_types(head_in_MKD.dtype, torch.float32)
        weight_MK = weight_MK.to(accumulate)
        loss_MK = torch.empty(num_tokens, num_steps, dtype=accumulate, device=device)
        correct_MK = torch.empty(num_tokens, num_steps, dtype=torch.bool, device=device)
        grad_in_MKD = torch.empty_like(head_in_MKD) if any(ctx.needs_input_grad[:2]) else None
        own, grad_head = own_VD is not None, None
        if own_VD is not None and not num_tokens:
            grad_head = torch.zeros_like(own_VD, dtype=accumulate)
        head_VD = _matrix(head, head_in_MKD.dtype)
        for chunk, logits_mKV, slope in _logit_chunks(head_in_MKD, head, head_VD):
            teacher_mV, teacher_id_m, lse_m = teacher.chunk(chunk, loss_name != "ce")
            exact = None if own else logits_mKV.argmax(-1) == teacher_id_m[:, None]
            loss_MK[chunk], hit_mK = _logits_to_gradient(
                logits_mKV, teacher_mV, teacher_id_m, lse_m, loss_name, compiled
            )
            correct_MK[chunk] = hit_mK if exact is None else exact  # a soft cap makes ties
            if grad_in_MKD is None:
                continue
            grad_logits = logits_mKV.view(-1, len(head_VD))
            if slope is not None:
                grad_logits.mul_(slope)
            weight = weight_MK[chunk].view(-1, 1).to(head_in_MKD.dtype)
            torch.mul(grad_logits @ head_VD, weight, out=grad_in_MKD[chunk].view(-1, width))
            if own:
                grad_head = add_product(grad_head, grad_logits, head_in_MKD[chunk].view(-1, width) * weight)
        ctx.save_for_backward(grad_in_MKD, grad_head)
        # where, not a product: the loss of a row that does not exist may be anything
        loss = torch.where(weight_MK > 0, loss_MK * weight_MK, 0).sum()
        ctx.mark_non_differentiable(loss_MK, correct_MK)
        return loss, loss_MK, correct_MK

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _loss: Tensor, _correct: Tensor):  # type: ignore[no-untyped-def, override]
        grad_in_MKD, grad_head_VD = ctx.saved_tensors
        # in place: they are nobody else's, and a second backward through the same graph raises
        if grad_in_MKD.dtype == torch.float16:  # a loss scale may lie outside its range, the product inside
            grad_in_MKD.copy_(grad_in_MKD.float().mul_(grad_loss))
        else:
            grad_in_MKD.mul_(grad_loss.to(grad_in_MKD.dtype))
        if grad_head_VD is not None:
            grad_head_VD.mul_(grad_loss)
        return grad_in_MKD, grad_head_VD, None, None, None, None, None


def _matrix(head: Tensor | TargetHead, dtype: torch.dtype) -> Tensor:
    return (head.lm_head_VH if isinstance(head, TargetHead) else head).to(dtype)


def _logit_chunks(
    head_in_MKD: Tensor, head: Tensor | TargetHead, head_VD: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor | float | None]]:
    """-> (tokens, their logits [m, K, V], slope of the logits over the products) of each chunk."""
    num_tokens, num_steps, width = head_in_MKD.shape
    for chunk in _chunks(num_tokens, len(head_VD) * num_steps, head_in_MKD.device):
        logits, slope = head_in_MKD[chunk].view(-1, width) @ head_VD.T, None
        if isinstance(head, TargetHead):
            logits, slope = head.finish(logits)
        yield chunk, logits.view(-1, num_steps, len(head_VD)), slope


def _logits_to_gradient(
    logits_mKV: Tensor, teacher_mV: Tensor, teacher_id_m: Tensor, lse_m: Tensor | None, loss_name: str, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Overwrite logits by d loss / d logits; -> (loss [m, K], hit [m, K]).

    A tie with the teacher's token counts as a hit here; evaluation compares argmax ids (`judge_rows`).
    """
    tokens = len(logits_mKV)
    if logits_mKV.device.type == "cpu":  # few at a time, so that what one pass writes is in the cache for the next
        tokens = max(1, CPU_PASS_ELEMENTS // logits_mKV[0].numel())
    parts = zip(logits_mKV.split(tokens), teacher_mV.split(tokens), teacher_id_m.split(tokens))
    if lse_m is None:
        results = [maybe_fused(cross_entropy_pass, compiled)(*part) for part in parts]
    else:
        from specforge_lite.model.lk_loss import lk_pass

        lk = maybe_fused(lk_pass, compiled)
        results = [lk(*part, lse, loss_name) for part, lse in zip(parts, lse_m.split(tokens))]
    if len(results) == 1:
        return results[0]
    losses, hits = zip(*results)
    return torch.cat(losses), torch.cat(hits)


def cross_entropy_pass(logits_mKV: Tensor, teacher_mV: Tensor, teacher_id_m: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite logits by softmax(logits) - softmax(teacher); -> (loss [m, K], hit [m, K])."""
    accumulate = torch.promote_types(logits_mKV.dtype, torch.float32)
    wide_mKV = logits_mKV.to(accumulate)
    teacher_m1V = torch.softmax(teacher_mV, -1, dtype=accumulate).unsqueeze(1)
    top_mK1 = wide_mKV.amax(-1, keepdim=True)
    own_mK1 = wide_mKV.gather(-1, teacher_id_m[:, None, None].expand(-1, wide_mKV.shape[1], 1))
    expected_mK = (wide_mKV * teacher_m1V).sum(-1)
    exp_mKV = wide_mKV.sub_(top_mK1).exp_()
    total_mK1 = exp_mKV.sum(-1, keepdim=True)
    exp_mKV.div_(total_mK1).sub_(teacher_m1V)
    if exp_mKV.dtype != logits_mKV.dtype:
        logits_mKV.copy_(exp_mKV)
    return (top_mK1 + total_mK1.log()).squeeze(-1) - expected_mK, (own_mK1 >= top_mK1).squeeze(-1)


@torch.no_grad()
def judge_rows(head_in_MKD: Tensor, teacher: TeacherChunks, head: Tensor | TargetHead) -> tuple[Tensor, Tensor, Tensor]:
    """For evaluation: (argmax [M, K] draft ids, whether it is the teacher's [M, K] bool, alpha [M, K] fp32).

    alpha = sum over v of min(p, q): the chance that speculative sampling keeps the token; p is the target's
    probability over its FULL vocabulary, q the draft's.
    """
    guess_MK = torch.empty(head_in_MKD.shape[:2], dtype=torch.int64, device=head_in_MKD.device)
    correct_MK = torch.empty_like(guess_MK, dtype=torch.bool)
    alpha_MK = torch.empty_like(guess_MK, dtype=torch.float32)
    for chunk, logits_mKV, _slope in _logit_chunks(head_in_MKD, head, _matrix(head, head_in_MKD.dtype)):
        teacher_mV, teacher_id_m, lse_m = teacher.chunk(chunk, want_lse=True)
        assert lse_m is not None
        guess_MK[chunk] = logits_mKV.argmax(-1)
        correct_MK[chunk] = guess_MK[chunk] == teacher_id_m[:, None]
        target_mV = (teacher_mV.float() - lse_m[:, None]).exp()
        draft_mKV = torch.softmax(logits_mKV, -1, dtype=torch.float32)
        alpha_MK[chunk] = torch.minimum(draft_mKV, target_mV.unsqueeze(1)).sum(-1)
    return guess_MK, correct_MK, alpha_MK
