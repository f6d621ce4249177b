"""LK losses, in place of the soft cross-entropy (`--loss lk`, `lk_alpha`).

They train for the chance that speculative sampling keeps a drafted token; p is the target's distribution over its FULL
vocabulary (over the draft's it sums to at most 1), q the draft's:

    alpha    = sum over the draft vocabulary of min(p, q)        the chance that the token is kept
    TV       = 1 - alpha                                         total variation, where the vocabularies are the same
    lk_alpha = -log alpha                                        its gradient is that of TV, times 1 / alpha
    lk       = lambda * KL + (1 - lambda) * TV                   lambda = exp(-3 alpha), a constant for the gradient
    KL       = sum of r log(r / q),  r = p renormalised over the draft vocabulary (CE less r's entropy)

TV alone barely moves a draft that agrees nowhere yet (its gradient is of the order of q); lk begins as KL there.
Source: "LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding", arXiv 2602.23881. There lambda comes
from the mean alpha of a step's batch; here from each position's own, so that the loss stays a sum over positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_DECAY = 3.0
# alpha below this is held there in 1 / alpha and in the logarithm: fp32 sums of 1e5 terms are no better.
SMALLEST_ALPHA = 1e-6


def lk_pass(
    logits_mKV: Tensor, teacher_mV: Tensor, teacher_id_m: Tensor, teacher_lse_m: Tensor, loss_name: str
) -> tuple[Tensor, Tensor]:
    """Overwrite logits by d loss / d logits; -> (loss [m, K], hit [m, K]), in fp32 or wider.

    teacher_mV: the target's logits over the draft vocabulary. teacher_lse_m: their logsumexp over the full one.
    """
    accumulate = torch.promote_types(logits_mKV.dtype, torch.float32)
    wide_mKV, wide_teacher_mV = logits_mKV.to(accumulate), teacher_mV.to(accumulate)
    own_logit_mK = wide_mKV.gather(-1, teacher_id_m[:, None, None].expand(-1, wide_mKV.shape[1], 1)).squeeze(-1)
    hit_mK = own_logit_mK >= wide_mKV.amax(-1)
    lse_mK = torch.logsumexp(wide_mKV, -1)
    q_mKV = (wide_mKV - lse_mK.unsqueeze(-1)).exp()
    p_m1V = (wide_teacher_mV - teacher_lse_m.to(accumulate).unsqueeze(-1)).exp().unsqueeze(1)
    below_mKV = q_mKV < p_m1V
    kept_mKV = torch.where(below_mKV, q_mKV, 0)
    alpha_mK = torch.minimum(q_mKV, p_m1V).sum(-1)
    # d alpha / d logit_v = q_v (1[q_v < p_v] - sum of q where q < p)
    alpha_slope_mKV = kept_mKV - q_mKV * kept_mKV.sum(-1, keepdim=True)
    if loss_name == "lk_alpha":
        safe_mK = alpha_mK.clamp(min=SMALLEST_ALPHA)
        logits_mKV.copy_(-alpha_slope_mKV / safe_mK.unsqueeze(-1))
        return -safe_mK.log(), hit_mK
    log_r_mV = torch.log_softmax(wide_teacher_mV, -1)
    r_m1V = log_r_mV.exp().unsqueeze(1)
    entropy_m1 = -(log_r_mV.exp() * log_r_mV).sum(-1, keepdim=True)
    kl_mK = lse_mK - (r_m1V * wide_mKV).sum(-1) - entropy_m1
    weight_mK = (-KL_DECAY * alpha_mK).exp()
    weight_mK1 = weight_mK.unsqueeze(-1)
    logits_mKV.copy_(weight_mK1 * (q_mKV - r_m1V) - (1 - weight_mK1) * alpha_slope_mKV)
    return weight_mK * kl_mK + (1 - weight_mK) * (1 - alpha_mK), hit_mK
