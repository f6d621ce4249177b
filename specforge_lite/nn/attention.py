"""Attention of the training-time test, three ways that agree.

At step k a row t sees, in one softmax, the step-0 keys of tokens <= t of its document and, for each later step
j = 1..k, the single key that step j made for the same row t (design of EAGLE-3's training-time test):

    row t, step 2:   [ k0[start] ... k0[t] | k1[t] | k2[t] ]

Letters: R needed rows of this step, N step-0 key rows, H query heads, G key/value heads, d head width,
J = k later keys.

eager           materialised scores and mask; the oracle.
sdpa            flash attention over the step-0 block, the J single keys merged by log-sum-exp; O(R) memory.
flex_attention  one block mask; torch has no backward for it on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from specforge_lite.errors import ConfigError, suggest
from specforge_lite.nn.rows import Segment, StepRows

# q_RHd, k0_NGd, v0_NGd, later keys [k_RGd ...], later values [v_RGd ...], rows -> o_RHd
TttAttention = Callable[[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], StepRows], Tensor]


def get_attention(name: str, device_type: str = "cpu") -> TttAttention:
    """Return a backend of ATTENTION_BACKENDS; `auto` is flex_attention on CUDA and sdpa elsewhere."""
    if name == "auto":
        name = "flex_attention" if device_type == "cuda" else "sdpa"
    if name not in ATTENTION_BACKENDS:
        raise ConfigError(f"draft_attention_backend: unknown value '{name}'{suggest(name, ATTENTION_BACKENDS)}")
    return ATTENTION_BACKENDS[name]


# ---------------------------------------------------------------------------------------------------------------- eager


def visible_step0(rows: StepRows, num_keys: int) -> Tensor:
    """bool [R, N]: step-0 keys that each needed row sees (same document, not after the row)."""
    document_start = torch.zeros(len(rows.key_rows), dtype=torch.int64)
    for segment in rows.segments:
        document_start[segment.compact_start : segment.compact_stop] = segment.key_start
    document_start = document_start.to(rows.key_rows.device)
    keys = torch.arange(num_keys, device=rows.key_rows.device)
    return (keys[None] <= rows.key_rows[:, None]) & (keys[None] >= document_start[:, None])


def eager_attention(
    q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, later_k: list[Tensor], later_v: list[Tensor], rows: StepRows
) -> Tensor:
    """The oracle: every score exists, masked ones are minus infinity, one softmax."""
    group = q_RHd.shape[1] // k0_NGd.shape[1]
    scale = 1 / math.sqrt(q_RHd.shape[2])
    expand = lambda x: x.repeat_interleave(group, dim=1)  # noqa: E731  (query head h reads key head h // group)
    scores = [torch.einsum("rhd,nhd->hrn", q_RHd, expand(k0_NGd)) * scale]
    scores[0] = scores[0].masked_fill(~visible_step0(rows, len(k0_NGd)), float("-inf"))
    scores += [(torch.einsum("rhd,rhd->hr", q_RHd, expand(k)) * scale).unsqueeze(-1) for k in later_k]
    probabilities = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.promote_types(q_RHd.dtype, torch.float32))
    probabilities = probabilities.to(q_RHd.dtype)
    out_RHd = torch.einsum("hrn,nhd->rhd", probabilities[..., : len(k0_NGd)], expand(v0_NGd))
    for j, value in enumerate(later_v):
        out_RHd = out_RHd + probabilities[..., len(k0_NGd) + j].T.unsqueeze(-1) * expand(value)
    return out_RHd


# --------------------------------------------------------------------------------------------------------- merged flash


def merged_attention(
    q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, later_k: list[Tensor], later_v: list[Tensor], rows: StepRows
) -> Tensor:
    """Flash attention over step 0 merged with the J single keys; exact, memory O(R + N).

    bf16 on a CPU runs in fp32 here: the CPU's bf16 flash backward is slower than its fp32 one, and less precise.
    """
    if q_RHd.dtype == torch.bfloat16 and not q_RHd.is_cuda:
        wide = [x.float() for x in (q_RHd, k0_NGd, v0_NGd, *later_k, *later_v)]
        split = 3 + len(later_k)
        return merged_attention(wide[0], wide[1], wide[2], wide[3:split], wide[split:], rows).to(q_RHd.dtype)
    if q_RHd.shape[0] == 0:
        return q_RHd + 0 * (k0_NGd.sum() + v0_NGd.sum() + sum(x.sum() for x in (*later_k, *later_v)))
    return _Merged.apply(rows.segments, q_RHd, k0_NGd, v0_NGd, *later_k, *later_v)


class _Merged(torch.autograd.Function):
    """o = sum over blocks of o_b exp(lse_b - z), z = logsumexp of all lse and single scores.

    Backward hands the merged o and z to the flash backward: it recomputes P = exp(S - z), which is then the true
    probability of each step-0 key, and its row sums of do * o are the true ones. The single keys are done by hand.
    """

    @staticmethod
    def forward(ctx, segments: list[Segment], q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, *later: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        num_later = len(later) // 2
        scale = 1 / math.sqrt(q_RHd.shape[2])
        heads = q_RHd.shape[1]
        out_RHd = torch.empty_like(q_RHd)
        accumulate = torch.promote_types(q_RHd.dtype, torch.float32)
        z_RH = torch.empty(q_RHd.shape[:2], dtype=accumulate, device=q_RHd.device)
        for segment in segments:
            q = _segment_rows(q_RHd, segment)
            out, lse = _flash_segment(q, k0_NGd, v0_NGd, segment)
            _unpad(out_RHd, out, segment)
            _unpad(z_RH, lse, segment)
        if num_later:
            keys_RJGd = torch.stack(later[:num_later], dim=1)
            values_RJGd = torch.stack(later[num_later:], dim=1)
            scores_RHJ = _single_scores(q_RHd, keys_RJGd, scale).to(accumulate)
            lse0_RH = z_RH
            z_RH = torch.logsumexp(torch.cat([lse0_RH.unsqueeze(-1), scores_RHJ], dim=-1), dim=-1)
            weights_RHJ = (scores_RHJ - z_RH.unsqueeze(-1)).exp().to(q_RHd.dtype)
            out_RHd.mul_((lse0_RH - z_RH).exp().unsqueeze(-1).to(q_RHd.dtype))
            out_RHd += _weighted_values(weights_RHJ, values_RJGd, heads)
        ctx.segments, ctx.num_later = segments, num_later
        ctx.save_for_backward(q_RHd, k0_NGd, v0_NGd, out_RHd, z_RH, *later)
        return out_RHd

    @staticmethod
    def backward(ctx, grad_RHd: Tensor):  # type: ignore[no-untyped-def, override]
        q_RHd, k0_NGd, v0_NGd, out_RHd, z_RH, *later = ctx.saved_tensors
        num_later, scale = ctx.num_later, 1 / math.sqrt(q_RHd.shape[2])
        groups = k0_NGd.shape[1]
        grad_RHd = grad_RHd.contiguous()
        dq_RHd = torch.empty_like(q_RHd)
        dk0_NGd, dv0_NGd = torch.zeros_like(k0_NGd), torch.zeros_like(v0_NGd)
        for segment in ctx.segments:
            _flash_segment_backward(
                [_segment_rows(x, segment) for x in (grad_RHd, q_RHd, out_RHd)],
                _segment_rows(z_RH, segment, fill=float("inf")),
                (k0_NGd, v0_NGd),
                (dq_RHd, dk0_NGd, dv0_NGd),
                segment,
            )
        later_grads: list[Tensor] = []
        if num_later:
            keys_RJGd = torch.stack(later[:num_later], dim=1)
            values_RJGd = torch.stack(later[num_later:], dim=1)
            shape = (len(q_RHd), groups, -1, q_RHd.shape[2])
            q_RGgd, grad_RGgd = q_RHd.view(shape), grad_RHd.view(shape)
            scores_RHJ = _single_scores(q_RHd, keys_RJGd, scale).to(z_RH.dtype)
            p_RHJ = (scores_RHJ - z_RH.unsqueeze(-1)).exp()
            delta_RH1 = (grad_RHd * out_RHd).sum(-1, keepdim=True, dtype=z_RH.dtype)
            dp_RHJ = _single_scores(grad_RHd, values_RJGd, 1.0).to(z_RH.dtype)
            ds_RHJ = (p_RHJ * (dp_RHJ - delta_RH1) * scale).to(q_RHd.dtype)
            dq_RHd += _weighted_values(ds_RHJ, keys_RJGd, q_RHd.shape[1])
            ds_RGgJ = ds_RHJ.view(*q_RGgd.shape[:3], num_later)
            p_RGgJ = p_RHJ.to(q_RHd.dtype).view(*q_RGgd.shape[:3], num_later)
            dk_RGJd = ds_RGgJ.transpose(-1, -2) @ q_RGgd
            dv_RGJd = p_RGgJ.transpose(-1, -2) @ grad_RGgd
            later_grads = [*dk_RGJd.unbind(2), *dv_RGJd.unbind(2)]
        return None, dq_RHd, dk0_NGd, dv0_NGd, *later_grads


def _single_scores(q_RHd: Tensor, keys_RJGd: Tensor, scale: float) -> Tensor:
    """Dot product of every query head with the J keys of its own row -> [R, H, J]."""
    rows, num_keys, groups, width = keys_RJGd.shape
    q_RGgd = q_RHd.view(rows, groups, -1, width)
    return (q_RGgd @ keys_RJGd.permute(0, 2, 3, 1)).reshape(rows, -1, num_keys) * scale


def _weighted_values(weights_RHJ: Tensor, values_RJGd: Tensor, heads: int) -> Tensor:
    rows, num_keys, groups, width = values_RJGd.shape
    weights_RGgJ = weights_RHJ.view(rows, groups, heads // groups, num_keys)
    return (weights_RGgJ @ values_RJGd.transpose(1, 2)).view(rows, heads, width)


def _segment_rows(x: Tensor, segment: Segment, fill: float = 0.0) -> Tensor:
    """Rows of a segment as one contiguous token range; holes are `fill` and their results are thrown away."""
    rows = x[segment.compact_start : segment.compact_stop]
    if segment.index is None:
        return rows
    padded = x.new_full((segment.stop - segment.start, *x.shape[1:]), fill)
    padded[segment.index.to(x.device)] = rows
    return padded


def _unpad(target: Tensor, rows: Tensor, segment: Segment) -> None:
    target[segment.compact_start : segment.compact_stop] = (
        rows if segment.index is None else rows[segment.index.to(rows.device)]
    )


def _heads_first(x_THd: Tensor, groups: int) -> Tensor:
    """[T, G * g, d] -> [g, G, T, d] view: the g query heads that share a key head become a batch, so that keys and
    values need no copy per query head (they are expanded with stride 0)."""
    tokens, heads, width = x_THd.shape
    return x_THd.view(tokens, groups, heads // groups, width).permute(2, 1, 0, 3)


def _tokens_first(x_gGTd: Tensor) -> Tensor:
    group, groups, tokens = x_gGTd.shape[:3]
    return x_gGTd.permute(2, 1, 0, *range(3, x_gGTd.ndim)).reshape(tokens, groups * group, *x_gGTd.shape[3:])


def _blocks(segment: Segment) -> list[tuple[int, int, bool]]:
    """(first key, last key + 1, causal) of the two blocks a segment sees: all tokens before it, and itself."""
    before = [(segment.key_start, segment.start, False)] if segment.start > segment.key_start else []
    return [*before, (segment.start, segment.stop, True)]


def _flash_segment(q_THd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """-> (out [T, H, d], lse [T, H] fp32)."""
    if q_THd.is_cuda:
        return _cuda_flash(q_THd, k0_NGd, v0_NGd, segment)
    groups = k0_NGd.shape[1]
    q = _heads_first(q_THd, groups)
    parts = []
    for first, stop, causal in _blocks(segment):
        k, v = (x[first:stop].transpose(0, 1).expand(q.shape[0], -1, -1, -1) for x in (k0_NGd, v0_NGd))
        parts.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal))
    out, lse = parts[-1]
    if len(parts) == 2:
        (out_before, lse_before), (out_own, lse_own) = parts
        lse = torch.logaddexp(lse_before, lse_own)
        weight = lambda part: (part - lse).exp().unsqueeze(-1).to(out.dtype)  # noqa: E731
        out = out_before * weight(lse_before) + out_own * weight(lse_own)
    return _tokens_first(out), _tokens_first(lse)


def _flash_segment_backward(
    grad_q_out: list[Tensor], z_TH: Tensor, keys: tuple[Tensor, Tensor], grads: tuple[Tensor, ...], segment: Segment
) -> None:
    """Add the step-0 part of the gradient to (dq, dk0, dv0); dq rows of the segment are overwritten."""
    grad_THd, q_THd, out_THd = grad_q_out
    dq_RHd, dk0_NGd, dv0_NGd = grads
    if q_THd.is_cuda:
        dq, dk, dv = _cuda_flash_backward(grad_THd, q_THd, out_THd, z_TH, keys, segment)
        _unpad(dq_RHd, dq, segment)
        dk0_NGd[segment.key_start : segment.stop] += dk
        dv0_NGd[segment.key_start : segment.stop] += dv
        return
    groups = keys[0].shape[1]
    grad, q, out = (_heads_first(x, groups) for x in (grad_THd, q_THd, out_THd))
    z = z_TH.view(len(z_TH), groups, -1).permute(2, 1, 0)
    dq_total: Tensor | None = None
    for first, stop, causal in _blocks(segment):
        k, v = (x[first:stop].transpose(0, 1).expand(q.shape[0], -1, -1, -1) for x in keys)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, z, 0.0, causal
        )
        dq_total = dq if dq_total is None else dq_total + dq
        dk0_NGd[first:stop] += dk.sum(0).transpose(0, 1)
        dv0_NGd[first:stop] += dv.sum(0).transpose(0, 1)
    assert dq_total is not None
    _unpad(dq_RHd, _tokens_first(dq_total), segment)


def _cuda_flash(q_THd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 aligns a causal mask to the bottom right, which is what a span at the end of its keys needs."""
    k, v = (x[segment.key_start : segment.stop] for x in (k0_NGd, v0_NGd))
    q_offsets, k_offsets = _cuda_offsets(q_THd, k)
    out, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
        q_THd, k, v, q_offsets, k_offsets, len(q_THd), len(k), 0.0, True, False
    )
    return out, lse.T.contiguous()


def _cuda_flash_backward(
    grad: Tensor, q_THd: Tensor, out: Tensor, z_TH: Tensor, keys: tuple[Tensor, Tensor], segment: Segment
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (x[segment.key_start : segment.stop] for x in keys)
    q_offsets, k_offsets = _cuda_offsets(q_THd, k)
    seed = torch.zeros(2, dtype=torch.uint64, device=q_THd.device)
    unused = torch.empty(0, dtype=torch.uint64, device=q_THd.device)
    lse = z_TH.T.contiguous().float()
    return torch.ops.aten._flash_attention_backward(
        grad, q_THd, k, v, out, lse, q_offsets, k_offsets, len(q_THd), len(k), 0.0, True, seed, unused
    )


def _cuda_offsets(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    make = lambda length: torch.tensor([0, length], dtype=torch.int32, device=q.device)  # noqa: E731
    return make(len(q)), make(len(k))


# ----------------------------------------------------------------------------------------------------------------- flex


def flex_attention(
    q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, later_k: list[Tensor], later_v: list[Tensor], rows: StepRows
) -> Tensor:
    """torch's flex_attention with one mask: a step-0 key by position and document, a later key by its own row."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as torch_flex

    num_rows, num_keys = len(q_RHd), len(k0_NGd)
    if num_rows == 0:
        return merged_attention(q_RHd, k0_NGd, v0_NGd, later_k, later_v, rows)
    document_start = torch.zeros(num_rows, dtype=torch.int64)
    for segment in rows.segments:
        document_start[segment.compact_start : segment.compact_stop] = segment.key_start
    document_start, key_row = document_start.to(q_RHd.device), rows.key_rows

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        step0 = (key < num_keys) & (key <= key_row[row]) & (key >= document_start[row])
        return step0 | ((key >= num_keys) & ((key - num_keys) % num_rows == row))

    total = num_keys + num_rows * len(later_k)
    block_mask = create_block_mask(visible, None, None, num_rows, total, device=q_RHd.device)
    k_GTd, v_GTd = (torch.cat(parts).transpose(0, 1) for parts in ([k0_NGd, *later_k], [v0_NGd, *later_v]))
    kernel: Callable[..., Tensor] = _compiled_flex(torch_flex) if q_RHd.is_cuda else torch_flex  # type: ignore[assignment]
    out = kernel(
        q_RHd.transpose(0, 1)[None],
        k_GTd[None],
        v_GTd[None],
        block_mask=block_mask,
        enable_gqa=q_RHd.shape[1] != k0_NGd.shape[1],
    )
    return out[0].transpose(0, 1)


_COMPILED: dict[str, Callable[..., Tensor]] = {}


def _compiled_flex(torch_flex: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if "flex" not in _COMPILED:
        _COMPILED["flex"] = torch.compile(torch_flex, dynamic=True)
    return _COMPILED["flex"]


ATTENTION_BACKENDS: dict[str, TttAttention] = {
    "eager": eager_attention,
    "sdpa": merged_attention,
    "flex_attention": flex_attention,
}
