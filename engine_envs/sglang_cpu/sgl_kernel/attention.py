"""Attention over the paged KV pool, as torch.ops.sgl_kernel.{decode,extend}_attention_cpu.

B requests, E new tokens of a request, L tokens of a request so far, H query heads, K key-value heads, D head size.
"""

import torch
import torch.nn.functional as F


def _attend(q_BEHD, k_BLKD, v_BLKD, mask_BEL, scale, logit_cap):
    q, k, v = q_BEHD.transpose(1, 2), k_BLKD.transpose(1, 2), v_BLKD.transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    if logit_cap and logit_cap > 0:
        k, v = k.repeat_interleave(groups, 1).float(), v.repeat_interleave(groups, 1).float()
        scores = logit_cap * torch.tanh(q.float() @ k.transpose(-1, -2) * scale / logit_cap)
        out = (scores.masked_fill(~mask_BEL[:, None], float("-inf")).softmax(-1) @ v).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BEL[:, None], scale=scale, enable_gqa=groups > 1)
    return out.transpose(1, 2)


def _require(condition, what):
    if not condition:
        raise NotImplementedError(f"the CPU stand-in for sgl_kernel has no attention with {what}")


def decode_attention(
    q, k_pool, v_pool, k_scale, v_scale, out, k, v, slots, attn_logits, req_to_token, req_indices, seq_lens,
    scale, logit_cap, is_cross, window, encoder_lens, sinks=None,
):  # fmt: skip
    """One new token per request; k and v (None: already stored) are put into the pool at `slots` first."""
    _require(not is_cross, "an encoder")
    _require(sinks is None, "sinks")
    if k is not None:
        k_pool[slots] = k.view(-1, *k_pool.shape[1:]).to(k_pool.dtype)
        v_pool[slots] = v.view(-1, *v_pool.shape[1:]).to(v_pool.dtype)
    longest = int(seq_lens.max())
    position = torch.arange(longest)[None]
    visible = position < seq_lens[:, None]
    if window > 0:
        visible = visible & (position >= seq_lens[:, None] - window)
    found = req_to_token[req_indices.long(), :longest].long().masked_fill(~visible, 0)
    keys, values = k_pool[found].to(q.dtype), v_pool[found].to(q.dtype)
    out.copy_(_attend(q[:, None], keys, values, visible[:, None], scale, logit_cap)[:, 0])


def extend_attention(
    q, k, v, out, k_pool, v_pool, k_scale, v_scale, req_to_token, req_indices, seq_lens, extend_lens, extend_start,
    longest_extend, scale, logit_cap, is_cross, window, encoder_lens, sinks, tree_mask, is_causal,
):  # fmt: skip
    """Several new tokens per request, already stored in the pool. tree_mask [B, E, E] replaces causality among the
    new tokens of a draft tree."""
    _require(not is_cross, "an encoder")
    _require(sinks is None, "sinks")
    batch, most, longest = seq_lens.numel(), int(longest_extend), int(seq_lens.max())
    new = torch.arange(most)[None]
    is_query = new < extend_lens[:, None]
    query = (extend_start.long()[:, None] + new).clamp_(max=q.shape[0] - 1)
    prefix = (seq_lens - extend_lens).long()
    position = torch.arange(longest)
    stored = position[None] < seq_lens[:, None]
    found = req_to_token[req_indices.long(), :longest].long().masked_fill(~stored, 0)
    mask = stored[:, None].expand(batch, most, longest)
    query_position = (prefix[:, None] + new)[..., None]
    if is_causal:
        mask = mask & (position[None, None] <= query_position)
    if window > 0:
        mask = mask & (position[None, None] > query_position - window)
    if tree_mask is not None:
        mask = mask.clone()
        trees = tree_mask.view(-1)[: batch * most * most].view(batch, most, most)
        for request, first in enumerate(prefix.tolist()):
            mask[request, :, first : first + most] = trees[request]
    mask = mask | ~is_query[..., None]  # rows of padding attend to something, so that they stay finite
    result = _attend(q[query], k_pool[found].to(q.dtype), v_pool[found].to(q.dtype), mask, scale, logit_cap)
    out[query[is_query]] = result[is_query]
