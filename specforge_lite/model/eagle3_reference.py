"""A plain EAGLE-3 training step, as published: every row at every step, full logits, materialised attention.

Read this first; `model/eagle3.py` computes the same faster. It is the oracle of tests/model/test_eagle3.py and the 1.0
of benchmarks/bench_training.py. One document of T tokens at a time; it shares no code with the rest of the package
except parameter names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ReferenceConfig:
    """Shape of the draft; `norm_output` and `fc_norm` are EAGLE-3.1's."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    norm_output: bool = False
    fc_norm: bool = False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x_HTd: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    half = x_HTd.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) * 2 / x_HTd.shape[-1])
    angles = positions_T[:, None].float() * frequencies
    cos, sin = (f(torch.cat([angles, angles], -1)).to(x_HTd.dtype) for f in (torch.cos, torch.sin))
    rotated = torch.cat([-x_HTd[..., half:], x_HTd[..., :half]], -1)
    return x_HTd * cos + rotated * sin


def shift_left(x: Tensor, by: int) -> Tensor:
    """Row t becomes row t + by; the tail is zero (False)."""
    return torch.cat([x[by:], x.new_zeros(min(by, len(x)), *x.shape[1:])])


def reference_loss(
    weights: dict[str, Tensor],
    config: ReferenceConfig,
    input_ids_T: Tensor,
    loss_mask_T: Tensor,
    aux_TG: Tensor,
    last_TH: Tensor,
    embed_VH: Tensor,
    target_head_VH: Tensor,
    d2t_Vd: Tensor,
    t2d_V: Tensor,
    num_steps: int,
    step_decay: float = 0.8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (sum over steps and counted rows of 0.8^k CE; per step [K]: loss sum, counted rows, correct rows)."""
    w, eps, heads, kv_heads = weights, config.rms_norm_eps, config.num_attention_heads, config.num_key_value_heads
    length, head_dim = len(input_ids_T), config.head_dim
    target_logits_TV = last_TH @ target_head_VH.T
    if config.fc_norm:
        parts = aux_TG.chunk(3, -1)
        aux_TG = torch.cat([rms_norm(p, w[f"fc_norm.{i}.weight"], eps) for i, p in enumerate(parts)], -1)
    state_TD = aux_TG @ w["fc.weight"].T
    positions = torch.arange(length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    keys, values = [], []
    total = state_TD.new_zeros(())
    loss_K, counted_K, correct_K = [], [], []
    for k in range(num_steps):
        embeds = embed_VH[shift_left(input_ids_T, 1 + k)]
        x = torch.cat(
            [
                rms_norm(embeds, w["midlayer.input_layernorm.weight"], eps),
                rms_norm(state_TD, w["midlayer.hidden_norm.weight"], eps),
            ],
            -1,
        )

        def project(name: str, count: int, x: Tensor = x) -> Tensor:
            return (x @ w[f"midlayer.self_attn.{name}_proj.weight"].T).view(length, count, head_dim).transpose(0, 1)

        q = rope(project("q", heads), positions + k, config.rope_theta)
        repeat = heads // kv_heads
        keys.append(rope(project("k", kv_heads), positions + k, config.rope_theta).repeat_interleave(repeat, 0))
        values.append(project("v", kv_heads).repeat_interleave(repeat, 0))
        scores = [(q @ keys[0].transpose(1, 2)) / head_dim**0.5]
        scores[0] = scores[0].masked_fill(~causal, float("-inf"))
        scores += [((q * key).sum(-1, keepdim=True)) / head_dim**0.5 for key in keys[1:]]
        probabilities = torch.cat(scores, -1).softmax(-1)
        out = probabilities[..., :length] @ values[0]
        for j in range(1, k + 1):
            out = out + probabilities[..., length + j - 1 : length + j] * values[j]
        state_TD = state_TD + out.transpose(0, 1).reshape(length, -1) @ w["midlayer.self_attn.o_proj.weight"].T
        y = rms_norm(state_TD, w["midlayer.post_attention_layernorm.weight"], eps)
        gate, up = y @ w["midlayer.mlp.gate_proj.weight"].T, y @ w["midlayer.mlp.up_proj.weight"].T
        state_TD = state_TD + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
        normed = rms_norm(state_TD, w["norm.weight"], eps)
        logits = normed @ w["lm_head.weight"].T
        if config.norm_output:
            state_TD = normed

        # row t predicts token t + 2 + k; its teacher is the target's output at t + 1 + k
        exists = positions + 2 + k < length
        teacher_TV = shift_left(target_logits_TV, 1 + k)
        top_T = teacher_TV.argmax(-1)
        counted = shift_left(loss_mask_T, 2 + k) & exists & t2d_V[top_T]
        teacher = teacher_TV[:, t2d_V].softmax(-1)
        loss_T = -(teacher * logits.log_softmax(-1)).sum(-1)
        step_loss = torch.where(counted, loss_T, 0).sum()
        prediction = logits.argmax(-1)
        loss_K.append(step_loss.detach())
        counted_K.append(counted.sum())
        correct_K.append((counted & (prediction + d2t_Vd[prediction] == top_T)).sum())
        total = total + step_decay**k * step_loss
    return total, torch.stack(loss_K), torch.stack(counted_K), torch.stack(correct_K)
