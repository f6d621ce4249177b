"""A plain EAGLE-1 forward pass, as published: every row at every step, full logits, materialised attention.

The oracle of tests/model/test_eagle1.py. One document of T tokens at a time; beyond step 0 the rows read their
own output, as decoding does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_lite.model.eagle3_reference import ReferenceConfig, rms_norm, rope, shift_left


def reference_states(
    weights: dict[str, Tensor],
    config: ReferenceConfig,
    input_ids_T: Tensor,
    states_TH: Tensor,
    embed_VH: Tensor,
    num_steps: int,
) -> list[Tensor]:
    """Predicted states f' [T, H] of every step; row t of step k is the guess at the state of token t + 1 + k."""
    w, heads, kv_heads = weights, config.num_attention_heads, config.num_key_value_heads
    length, head_dim = len(input_ids_T), config.head_dim
    positions = torch.arange(length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs = []
    state_TH = states_TH
    for k in range(num_steps):
        embeds = embed_VH[shift_left(input_ids_T, 1 + k)]
        x = torch.cat([embeds, state_TH], -1) @ w["fc.weight"].T

        def project(name: str, count: int, x: Tensor = x) -> Tensor:
            weight = w[f"layers.0.self_attn.{name}_proj.weight"]
            return (x @ weight.T).view(length, count, head_dim).transpose(0, 1)

        q = rope(project("q", heads), positions + k, config.rope_theta)
        repeat = heads // kv_heads
        keys.append(rope(project("k", kv_heads), positions + k, config.rope_theta).repeat_interleave(repeat, 0))
        values.append(project("v", kv_heads).repeat_interleave(repeat, 0))
        scores = [((q @ keys[0].transpose(1, 2)) / head_dim**0.5).masked_fill(~causal, float("-inf"))]
        scores += [((q * key).sum(-1, keepdim=True)) / head_dim**0.5 for key in keys[1:]]
        probabilities = torch.cat(scores, -1).softmax(-1)
        out = probabilities[..., :length] @ values[0]
        for j in range(1, k + 1):
            out = out + probabilities[..., length + j - 1 : length + j] * values[j]
        x = x + out.transpose(0, 1).reshape(length, -1) @ w["layers.0.self_attn.o_proj.weight"].T
        y = rms_norm(x, w["layers.0.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = y @ w["layers.0.mlp.gate_proj.weight"].T, y @ w["layers.0.mlp.up_proj.weight"].T
        state_TH = x + (F.silu(gate) * up) @ w["layers.0.mlp.down_proj.weight"].T
        outputs.append(state_TH)
    return outputs


def reference_eagle1_loss(
    outputs: list[Tensor],
    loss_mask_T: Tensor,
    states_TH: Tensor,
    head_VH: Tensor,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    v_weight: float = 1.0,
    p_weight: float = 0.1,
    step_decay: float = 0.8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (weighted total; per step [K]: cross-entropy sum, counted rows, correct rows)."""
    length = len(loss_mask_T)

    def logits_of(states: Tensor) -> Tensor:
        raw = states @ head_VH.T * logit_scale
        return raw if logit_softcap is None else logit_softcap * torch.tanh(raw / logit_softcap)

    total = states_TH.new_zeros(())
    loss_K, counted_K, correct_K = [], [], []
    for k, predicted in enumerate(outputs):
        counted = shift_left(loss_mask_T, 2 + k) & (torch.arange(length) + 2 + k < length)
        true = shift_left(states_TH, 1 + k)
        value_T = F.smooth_l1_loss(predicted, true, reduction="none").mean(-1)
        teacher, logits = logits_of(true), logits_of(predicted)
        token_T = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        total = total + step_decay**k * (v_weight * value_T + p_weight * token_T)[counted].sum()
        loss_K.append(token_T[counted].sum().detach())
        counted_K.append(counted.sum())
        correct_K.append((logits.argmax(-1) == teacher.argmax(-1))[counted].sum())
    return total, torch.stack(loss_K), torch.stack(counted_K), torch.stack(correct_K)
