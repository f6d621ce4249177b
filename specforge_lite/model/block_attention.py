"""Attention of a block draft: every slot sees the context before its anchor and the slots of its own block.

Letters: R query rows, C context keys, S slot keys, n blocks, B slots of a block, H query heads, G key heads, d width.

eager           all scores and the whole mask; the oracle.
sdpa            one masked attention a document and BLOCKS_PER_CALL blocks: memory is the mask of one call.
flex_attention  one call; the mask is a function of four integers a row. torch has no backward for it on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specforge_lite.model.block_plan import BlockPlan, QueryRows
from specforge_lite.model.device import attention_dtype, choose_attention
from specforge_lite.model.flex import run_flex

# q_RHd, context k and v [C, G, d], own k and v [S, G, d], rows, plan -> o_RHd
BlockAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, QueryRows, BlockPlan], Tensor]


def visible_keys(rows: QueryRows, plan: BlockPlan, num_context: int) -> Tensor:
    """bool [R, C + S]: what each row sees."""
    device = rows.block_R.device
    context, slots = torch.arange(num_context, device=device), torch.arange(len(plan.slot_positions_S), device=device)
    start_R1, stop_R1 = plan.key_start_n[rows.block_R, None], plan.key_stop_n[rows.block_R, None]
    own = slots // plan.block_size == rows.block_R[:, None]
    return torch.cat([(context >= start_R1) & (context < stop_R1), own], 1)


def eager_attention(
    q_RHd: Tensor, k_CGd: Tensor, v_CGd: Tensor, k_SGd: Tensor, v_SGd: Tensor, rows: QueryRows, plan: BlockPlan
) -> Tensor:
    """The oracle: every score exists, masked ones are minus infinity, one softmax."""
    group = q_RHd.shape[1] // k_CGd.shape[1]
    keys, values = (torch.cat(x).repeat_interleave(group, dim=1) for x in ((k_CGd, k_SGd), (v_CGd, v_SGd)))
    scores = torch.einsum("rhd,khd->hrk", q_RHd, keys) / math.sqrt(q_RHd.shape[2])
    scores = scores.masked_fill(~visible_keys(rows, plan, len(k_CGd)), float("-inf"))
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return torch.einsum("hrk,khd->rhd", probabilities, values)


def masked_attention(
    q_RHd: Tensor, k_CGd: Tensor, v_CGd: Tensor, k_SGd: Tensor, v_SGd: Tensor, rows: QueryRows, plan: BlockPlan
) -> Tensor:
    """One call of torch's attention for the blocks of each `plan.calls`; exact, memory O(R + C)."""
    dtype = q_RHd.dtype
    if attention_dtype(dtype, q_RHd.device.type) != dtype:
        q, k, v, k_own, v_own = (x.float() for x in (q_RHd, k_CGd, v_CGd, k_SGd, v_SGd))
        return masked_attention(q, k, v, k_own, v_own, rows, plan).to(dtype)
    if not len(q_RHd):
        return q_RHd + 0 * (k_CGd.sum() + v_CGd.sum() + k_SGd.sum() + v_SGd.sum())
    size = plan.block_size
    outputs = []
    for call in plan.calls:
        first, stop = rows.bounds[call.first], rows.bounds[call.stop]
        own = slice(call.first * size, call.stop * size)
        places = torch.arange(call.key_start, call.key_stop, device=q_RHd.device)
        block_R1 = rows.block_R[first:stop, None]
        slot_blocks = torch.arange(own.start, own.stop, device=q_RHd.device) // size
        mask = torch.cat([places < plan.key_stop_n[block_R1], slot_blocks == block_R1], 1)
        keys = torch.cat([k_CGd[call.key_start : call.key_stop], k_SGd[own]])
        values = torch.cat([v_CGd[call.key_start : call.key_stop], v_SGd[own]])
        outputs.append(_grouped(q_RHd[first:stop], keys, values, mask))
    return torch.cat(outputs)


def _grouped(q_RHd: Tensor, k_KGd: Tensor, v_KGd: Tensor, mask_RK: Tensor) -> Tensor:
    """Masked attention; the query heads that share a key head are rows of it, so that no key is copied."""
    groups = k_KGd.shape[1]
    q = q_RHd.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, g, R, d]
    share = q.shape[1]
    out = scaled_dot_product_attention(
        q.flatten(1, 2)[None], k_KGd.transpose(0, 1)[None], v_KGd.transpose(0, 1)[None], mask_RK.repeat(share, 1)
    )
    return out[0].unflatten(1, (share, -1)).permute(2, 0, 1, 3).flatten(1, 2)


def flex_attention(
    q_RHd: Tensor, k_CGd: Tensor, v_CGd: Tensor, k_SGd: Tensor, v_SGd: Tensor, rows: QueryRows, plan: BlockPlan
) -> Tensor:
    """One call for all documents and blocks."""
    if not len(q_RHd) or rows.kernel is None:
        return masked_attention(q_RHd, k_CGd, v_CGd, k_SGd, v_SGd, rows, plan)
    block_R, start_n, stop_n = rows.block_R, plan.key_start_n, plan.key_stop_n
    num_context, block_size = rows.kernel.sizes

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        block = block_R[row]
        own = (key >= num_context) & ((key - num_context) // block_size == block)
        return own | ((key >= start_n[block]) & (key < stop_n[block]))

    keys, values = torch.cat([k_CGd, k_SGd]), torch.cat([v_CGd, v_SGd])
    return run_flex(q_RHd, keys, values, visible, rows.kernel, q_RHd.is_cuda)


BLOCK_ATTENTION: dict[str, BlockAttention] = {
    "eager": eager_attention,
    "sdpa": masked_attention,
    "flex_attention": flex_attention,
}


def choose_block_attention(name: str, device_type: str) -> str:
    """The backend that `--draft-attention-backend` means on this machine; flex_attention that has to run backward on a
    CPU becomes sdpa, whose masked attention takes any dtype and width on a GPU."""
    if name == "flex_attention" and device_type == "cpu" and not torch.is_grad_enabled():
        return name
    return name if name == "sdpa" else choose_attention(name, device_type)
