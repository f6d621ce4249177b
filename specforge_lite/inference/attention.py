"""Attention of decoding: masked attention of grouped heads without copies of keys and values, and no cuDNN plans.

Letters: B rows, H query heads, G key/value heads, Q queries, K keys, d head width.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

GROUPED = "specforge_grouped"
# On Hopper and Blackwell torch prefers cuDNN in 16 bits, which builds a plan for every new key length (up to 0.4 s
# each), and here every pass has a new one.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Keep scaled_dot_product_attention away from cuDNN inside; nothing on other devices than CUDA."""
    return sdpa_kernel(_KERNELS) if device.type == "cuda" else contextlib.nullcontext()


def grouped_attention(
    q_BHQd: Tensor, k_BGKd: Tensor, v_BGKd: Tensor, mask_B1QK: Tensor | None, causal: bool, scale: float | None = None
) -> Tensor:
    """[B, H, Q, d]. With a mask no kernel shares keys among the heads of a group but the one that copies them for each;
    so the queries of a group become rows of one head."""
    groups = q_BHQd.shape[1] // k_BGKd.shape[1]
    if mask_B1QK is None or groups == 1:
        return scaled_dot_product_attention(
            q_BHQd, k_BGKd, v_BGKd, attn_mask=mask_B1QK, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    rows = q_BHQd.unflatten(1, (-1, groups)).flatten(2, 3)
    out = scaled_dot_product_attention(rows, k_BGKd, v_BGKd, attn_mask=mask_B1QK.repeat(1, 1, groups, 1), scale=scale)
    return out.unflatten(2, (groups, -1)).flatten(1, 2)


def share_keys_of_groups(model: Any) -> None:
    """Let a model that runs transformers' `sdpa` use `grouped_attention` for the additive masks of trees; for all else
    (no mask, transformers' own bool masks) it calls `sdpa` as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        ours = attention_mask is not None and attention_mask.is_floating_point() and attention_mask.shape[1] == 1
        if not ours or options.get("position_bias") is not None or options.get("softcap") is not None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        out = grouped_attention(query, key, value, attention_mask, False, options.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(GROUPED, attend)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)
