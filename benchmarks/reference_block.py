"""A plain DSpark training pass, as published: a fixed number of blocks, padded with blocks that count for nothing,
every slot through every layer and the head, full logits, a materialised mask.

The 1.0 of `bench_training.py --draft dspark`. One document at a time; it shares no code with the package except
parameter names, and is checked against the authors' values in tests/model/test_block_oracle.py.

Letters: T tokens, n blocks, B slots, H width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, embedding, linear, silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [R, heads, d] at integer positions [R]."""
    half = x.shape[-1] // 2
    frequencies = 1 / theta ** (torch.arange(half, device=x.device) / half)
    angles = positions[:, None, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def reference_pass(
    weights: dict[str, Tensor],
    embed_VH: Tensor,
    head_VH: Tensor,
    ids_T: Tensor,
    mask_T: Tensor,
    aux_TG: Tensor,
    last_TH: Tensor,
    anchors_n: Tensor,
    num_blocks: int,
    block_size: int,
    mask_token_id: int,
    heads: tuple[int, int, int],
    theta: float = 10000.0,
    eps: float = 1e-6,
    gamma: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """-> (weighted sum of 0.1 CE + 0.9 L1 + BCE, sum of the weights) of one document. heads: (query, key, width)."""
    num_heads, num_groups, width = heads
    real = len(anchors_n)
    anchors_n = torch.cat([anchors_n, anchors_n.new_zeros(num_blocks - real)])
    labels = anchors_n[:, None] + 1 + torch.arange(block_size, device=ids_T.device)
    inside = labels < len(ids_T)
    labels = labels.clamp(max=len(ids_T) - 1)
    counted = (mask_T[labels] & inside).long().cumprod(1).bool()
    counted[real:] = False
    block_ids = torch.full_like(labels, mask_token_id)
    block_ids[:, 0] = ids_T[anchors_n]
    positions = (anchors_n[:, None] + torch.arange(block_size, device=ids_T.device)).flatten()
    tokens = torch.arange(len(ids_T), device=ids_T.device)
    block_of_slot = torch.arange(num_blocks, device=ids_T.device).repeat_interleave(block_size)
    visible = torch.cat(
        [tokens < anchors_n.repeat_interleave(block_size)[:, None], block_of_slot == block_of_slot[:, None]], 1
    )
    c = rms_norm(linear(aux_TG, weights["fc.weight"]), weights["hidden_norm.weight"], eps)
    h = embedding(block_ids.flatten(), embed_VH)
    num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for index in range(num_layers):
        w = {
            name.removeprefix(f"layers.{index}."): x
            for name, x in weights.items()
            if name.startswith(f"layers.{index}.")
        }
        x = rms_norm(h, w["input_layernorm.weight"], eps)
        q = linear(x, w["self_attn.q_proj.weight"]).unflatten(1, (num_heads, width))
        q = rotate(rms_norm(q, w["self_attn.q_norm.weight"], eps), positions, theta)
        keys, values = [], []
        for rows, at in ((c, tokens), (x, positions)):
            k = linear(rows, w["self_attn.k_proj.weight"]).unflatten(1, (num_groups, width))
            keys.append(rotate(rms_norm(k, w["self_attn.k_norm.weight"], eps), at, theta))
            values.append(linear(rows, w["self_attn.v_proj.weight"]).unflatten(1, (num_groups, width)))
        k, v = (torch.cat(x).repeat_interleave(num_heads // num_groups, 1) for x in (keys, values))
        scores = torch.einsum("rhd,khd->hrk", q, k) / math.sqrt(width)
        attention = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype)
        h = h + linear(torch.einsum("hrk,khd->rhd", attention, v).flatten(1), w["self_attn.o_proj.weight"])
        x = rms_norm(h, w["post_attention_layernorm.weight"], eps)
        gated = silu(linear(x, w["mlp.gate_proj.weight"])) * linear(x, w["mlp.up_proj.weight"])
        h = h + linear(gated, w["mlp.down_proj.weight"])
    h = rms_norm(h, weights["norm.weight"], eps)
    previous = ids_T[(labels - 1).flatten()]
    e = embedding(previous, weights["markov_head.markov_w1.weight"])
    logits = (linear(h, head_VH) + linear(e, weights["markov_head.markov_w2.weight"])).float()
    teacher = linear(last_TH[(labels - 1).flatten()], head_VH).float()
    log_p = logits.log_softmax(-1)
    ce = -log_p.gather(1, ids_T[labels.flatten()][:, None])[:, 0]
    l1 = (log_p.exp() - teacher.softmax(-1)).abs().sum(-1)
    confidence = linear(
        torch.cat([h, e], 1), weights["confidence_head.proj.weight"], weights["confidence_head.proj.bias"]
    )[:, 0].float()
    accepted = (1 - l1 / 2).clamp(0, 1).detach()
    bce = binary_cross_entropy_with_logits(confidence, accepted, reduction="none")
    decay = torch.exp(-torch.arange(block_size, device=ids_T.device) / gamma).expand(num_blocks, -1)
    weight = (decay * counted).flatten()
    return (weight * (0.1 * ce + 0.9 * l1 + bce)).sum(), weight.sum()
