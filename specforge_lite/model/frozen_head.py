"""Soft cross-entropy through the target's own, frozen head over its whole vocabulary, one chunk of logits at a time.

EAGLE-1 predicts the target's next hidden state and has no head; teacher and draft logits both come out of the target's
`lm_head`, both V wide, so neither may exist for more than a few tokens at once.

Letters: M predicted tokens of the batch, K steps, m tokens of a chunk, H target width, V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_lite.model import losses
from specforge_lite.model.losses import fast_argmax
from specforge_lite.model.target_head import TargetHead


@dataclass
class HeadLoss:
    """loss: weighted sum, a scalar to call backward on. Per token and step, detached: loss_MK fp32 (fp64 for fp64
    inputs); correct_MK bool, argmax equals the teacher's; alpha_MK fp32, sum over v of min(p, q), only if asked for."""

    loss: Tensor
    loss_MK: Tensor
    correct_MK: Tensor
    alpha_MK: Tensor | None


def frozen_head_cross_entropy(
    state_MKH: Tensor, weight_MK: Tensor, target_MH: Tensor, target_head: TargetHead, want_alpha: bool = False
) -> HeadLoss:
    """sum of weight * CE(softmax(head(target)), head(state)); gradients are formed in the same pass.

    state_MKH: predicted hidden states, after the final norm as the target's are. target_MH: the true ones.
    weight_MK: 0 where a row does not exist. The head's logit scale and soft cap apply to both.
    """
    loss, loss_MK, correct_MK, alpha_MK = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
        state_MKH, weight_MK, target_MH, target_head, want_alpha
    )
    return HeadLoss(loss, loss_MK, correct_MK, alpha_MK if want_alpha else None)


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, state_MKH: Tensor, weight_MK: Tensor, target_MH: Tensor, target_head: TargetHead, want_alpha: bool
    ):
        (num_tokens, num_steps, _), device = state_MKH.shape, state_MKH.device
        head_VH = target_head.lm_head_VH
        accumulate = torch.promote_types(state_MKH.dtype, torch.float32)
        weight_MK = weight_MK.to(accumulate)
        loss_MK = torch.empty(num_tokens, num_steps, dtype=accumulate, device=device)
        correct_MK = torch.empty(num_tokens, num_steps, dtype=torch.bool, device=device)
        alpha_MK = torch.empty(num_tokens, num_steps if want_alpha else 0, device=device)
        grad_MKH = torch.empty_like(state_MKH) if ctx.needs_input_grad[0] else None
        tokens = max(4, losses.LOSS_CHUNK_ELEMENTS // (len(head_VH) * (num_steps + 1)))
        for start in range(0, num_tokens, tokens):
            chunk = slice(start, start + tokens)
            teacher_mV = target_head.logits(target_MH[chunk])
            logits_mKV = target_head.logits(state_MKH[chunk])
            hit_mK = fast_argmax(logits_mKV) == fast_argmax(teacher_mV).unsqueeze(1)
            correct_MK[chunk] = hit_mK
            logits_mKV = logits_mKV.to(accumulate)
            teacher_mV = torch.softmax(teacher_mV, -1, dtype=accumulate)
            expected_mK = torch.bmm(logits_mKV, teacher_mV.unsqueeze(-1)).squeeze(-1)
            lse_mK = torch.logsumexp(logits_mKV, -1)
            loss_MK[chunk] = lse_mK - expected_mK
            if grad_MKH is None and not want_alpha:
                continue
            draft_mKV = (logits_mKV - lse_mK.unsqueeze(-1)).exp_()
            if want_alpha:
                alpha_MK[chunk] = torch.minimum(draft_mKV, teacher_mV.unsqueeze(1)).sum(-1)
            if grad_MKH is not None:
                delta_mKV = draft_mKV.sub_(teacher_mV.unsqueeze(1)).mul_(_slope(logits_mKV, target_head))
                grad = (delta_mKV.to(head_VH.dtype) @ head_VH).to(state_MKH.dtype)
                grad_MKH[chunk] = grad * weight_MK[chunk].unsqueeze(-1).to(grad.dtype)
        ctx.save_for_backward(grad_MKH)
        # where, not a product: the loss of a row that does not exist may be anything
        loss = torch.where(weight_MK > 0, loss_MK * weight_MK, 0).sum()
        ctx.mark_non_differentiable(loss_MK, correct_MK, alpha_MK)
        return loss, loss_MK, correct_MK, alpha_MK

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_unused: Tensor):  # type: ignore[no-untyped-def, override]
        (grad_MKH,) = ctx.saved_tensors
        if grad_MKH.dtype == torch.float16:  # a loss scale may lie outside its range, the product inside
            return (grad_MKH.float() * grad_loss).to(grad_MKH.dtype), None, None, None, None
        return grad_MKH * grad_loss.to(grad_MKH.dtype), None, None, None, None


def _slope(logits: Tensor, target_head: TargetHead) -> Tensor | float:
    """d logit / d (raw head product): the logit scale, and for cap * tanh(raw / cap) another 1 - (logit / cap)^2."""
    if not target_head.logit_softcap:
        return target_head.logit_scale
    return (1 - (logits / target_head.logit_softcap).square()) * target_head.logit_scale
