"""Attention of the training-time test, three ways that agree.

At step k a row t sees, in one softmax, the step-0 keys of tokens <= t of its document and, for each later step
j = 1..k, the single key that step j made for the same row t (design of EAGLE-3's training-time test):

    row t, step 2:   [ k0[start] ... k0[t] | k1[t] | k2[t] ]

Letters: R needed rows of this step, N step-0 key rows, H query heads, G key/value heads, d head width,
J = k later keys.

eager           materialised scores and mask; the oracle.
sdpa            flash attention over the step-0 block, the J single keys merged by log-sum-exp; O(R) memory. On a CPU
                with few rows the step-0 block is dense (model/dense_attention.py), which is faster there.
flex_attention  one block mask; torch has no backward for it on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.model.dense_attention import MAX_PROBABILITIES, CpuDense, Step0Block, num_probabilities
from specforge_lite.model.row_plan import Segment, StepRows

# q_RHd, k0_NGd, v0_NGd, later keys [k_RGd ...], later values [v_RGd ...], rows -> o_RHd
TttAttention = Callable[[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], StepRows], Tensor]


def get_attention(name: str, device_type: str = "cpu") -> TttAttention:
    """Return a backend of ATTENTION_BACKENDS; `auto` is flex_attention on CUDA and sdpa elsewhere."""
    if name == "auto":
        name = "flex_attention" if device_type == "cuda" else "sdpa"
    if name not in ATTENTION_BACKENDS:
        raise ConfigError(f"draft_attention_backend: unknown value '{name}'{suggest(name, ATTENTION_BACKENDS)}")
    return ATTENTION_BACKENDS[name]


def attention_dtype(compute_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """bf16 and fp16 on a CPU attend in fp32: the CPU's 16-bit flash backward is slower than that, and less precise."""
    half = compute_dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and device_type == "cpu" else compute_dtype


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
    """Flash attention over step 0 merged with the J single keys; exact, memory O(R + N)."""
    dtype = q_RHd.dtype
    if attention_dtype(dtype, q_RHd.device.type) != dtype:
        q_RHd, k0_NGd, v0_NGd, *later = (x.float() for x in (q_RHd, k0_NGd, v0_NGd, *later_k, *later_v))
        return merged_attention(q_RHd, k0_NGd, v0_NGd, later[: len(later_k)], later[len(later_k) :], rows).to(dtype)
    if q_RHd.shape[0] == 0:
        return q_RHd + 0 * (k0_NGd.sum() + v0_NGd.sum() + sum(x.sum() for x in (*later_k, *later_v)))
    return _Merged.apply(_step0_block(q_RHd, rows), q_RHd, k0_NGd, v0_NGd, *later_k, *later_v)


def _step0_block(q_RHd: Tensor, rows: StepRows) -> Step0Block:
    if q_RHd.is_cuda:
        return CudaFlash(rows.segments)
    few = num_probabilities(rows.segments, q_RHd.shape[1]) <= MAX_PROBABILITIES
    return CpuDense(rows.segments) if few else CpuFlash(rows.segments)


class _Merged(torch.autograd.Function):
    """o = sum over blocks of o_b exp(lse_b - z), z = logsumexp of all lse and single scores.

    Backward hands the merged o and z to the flash backward: it recomputes P = exp(S - z), which is then the true
    probability of each step-0 key, and its row sums of do * o are the true ones. The single keys are done by hand.
    """

    @staticmethod
    def forward(ctx, block: Step0Block, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor, *later: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        num_later = len(later) // 2
        out_RHd, z_RH, kept = block.forward(q_RHd, k0_NGd, v0_NGd)
        probabilities: list[Tensor] = []
        if num_later:
            out_RHd, z_RH, probabilities = merge_single_keys(q_RHd, out_RHd, z_RH, later[:num_later], later[num_later:])
        ctx.block, ctx.num_later, ctx.num_kept = block, num_later, len(kept)
        ctx.save_for_backward(q_RHd, k0_NGd, v0_NGd, out_RHd, z_RH, *kept, *later, *probabilities)
        return out_RHd

    @staticmethod
    def backward(ctx, grad_RHd: Tensor):  # type: ignore[no-untyped-def, override]
        q_RHd, k0_NGd, v0_NGd, out_RHd, z_RH, *rest = ctx.saved_tensors
        kept, rest = rest[: ctx.num_kept], rest[ctx.num_kept :]
        later, probabilities = rest[: 2 * ctx.num_later], rest[2 * ctx.num_later :]
        dq_RHd, dk0_NGd, dv0_NGd = ctx.block.backward(grad_RHd, q_RHd, k0_NGd, v0_NGd, out_RHd, z_RH, kept)
        later_grads: list[Tensor] = []
        if ctx.num_later:
            keys, values = later[: ctx.num_later], later[ctx.num_later :]
            later_grads = single_keys_backward(grad_RHd, q_RHd, out_RHd, probabilities, keys, values, dq_RHd)
        return None, dq_RHd, dk0_NGd, dv0_NGd, *later_grads


def merge_single_keys(
    q_RHd: Tensor, out0_RHd: Tensor, lse0_RH: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Join the attention over step 0 (its output and log-sum-exp) with the J single keys of each row.

    -> (output, logsumexp of all scores, probability [R, G, g] of each single key). One key at a time: every row has its
    own, so there is no matrix product in it, and plain sums are faster than R tiny ones.
    """
    q_RGgd, groups = _by_group(q_RHd, keys[0].shape[1]).to(lse0_RH.dtype), keys[0].shape[1]
    scale = 1 / math.sqrt(q_RHd.shape[2])
    lse0_RGg = lse0_RH.unflatten(1, (groups, -1))
    scores = [(q_RGgd * key.unsqueeze(2)).sum(-1).mul_(scale) for key in keys]
    z_RGg = torch.logsumexp(torch.stack([lse0_RGg, *scores]), 0)
    probabilities = [(score - z_RGg).exp_() for score in scores]
    out_RGgd = _by_group(out0_RHd, groups) * (lse0_RGg - z_RGg).exp_().unsqueeze(-1)
    for probability, value in zip(probabilities, values):
        out_RGgd.addcmul_(probability.unsqueeze(-1), value.unsqueeze(2))
    return out_RGgd.to(q_RHd.dtype).view(out0_RHd.shape), z_RGg.flatten(1), probabilities


def single_keys_backward(
    grad_RHd: Tensor,
    q_RHd: Tensor,
    out_RHd: Tensor,
    probabilities: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    dq_RHd: Tensor,
) -> list[Tensor]:
    """Add the single keys' part to dq; -> gradients of the keys, then of the values."""
    groups, scale, wide = keys[0].shape[1], 1 / math.sqrt(q_RHd.shape[2]), probabilities[0].dtype
    q_RGgd, grad_RGgd = (_by_group(x, groups).to(wide) for x in (q_RHd, grad_RHd))
    delta_RGg = (grad_RGgd * _by_group(out_RHd, groups)).sum(-1)
    dq_RGgd = _by_group(dq_RHd, groups)
    key_grads, value_grads = [], []
    for probability, key, value in zip(probabilities, keys, values):
        d_score = (grad_RGgd * value.unsqueeze(2)).sum(-1).sub_(delta_RGg).mul_(probability).mul_(scale).unsqueeze(-1)
        dq_RGgd += d_score * key.unsqueeze(2)
        key_grads.append((d_score * q_RGgd).sum(2).to(key.dtype))
        value_grads.append((probability.unsqueeze(-1) * grad_RGgd).sum(2).to(value.dtype))
    return [*key_grads, *value_grads]


def _by_group(x_RHd: Tensor, groups: int) -> Tensor:
    """[R, H, d] -> [R, G, g, d]: the g query heads that share a key head."""
    return x_RHd.unflatten(1, (groups, -1))


class CpuFlash:
    """aten's flash kernel for CPUs. Its causal mask starts at the top left, so a span is two calls: all tokens before
    it, and itself, joined by their log-sum-exp."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        out_RHd = torch.empty_like(q_RHd, memory_format=torch.contiguous_format)
        z_RH = torch.empty(q_RHd.shape[:2], dtype=torch.promote_types(q_RHd.dtype, torch.float32))
        for segment in self._segments:
            q = _heads_first(_segment_rows(q_RHd, segment), k0_NGd.shape[1])
            parts = []
            for first, stop, causal in _blocks(segment):
                k, v = (_keys_first(x[first:stop], len(q)) for x in (k0_NGd, v0_NGd))
                parts.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal))
            out, lse = parts[-1]
            if len(parts) == 2:
                (out_before, lse_before), (out_own, lse_own) = parts
                lse = torch.logaddexp(lse_before, lse_own)
                out = out_before * (lse_before - lse).exp_().unsqueeze(-1)
                out.addcmul_(out_own, (lse_own - lse).exp_().unsqueeze(-1))
            _unpad(out_RHd, _tokens_first(out), segment)
            _unpad(z_RH, _tokens_first(lse), segment)
        return out_RHd, z_RH, []

    def backward(
        self,
        grad_RHd: Tensor,
        q_RHd: Tensor,
        k0_NGd: Tensor,
        v0_NGd: Tensor,
        out_RHd: Tensor,
        z_RH: Tensor,
        kept: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = k0_NGd.shape[1]
        dq_RHd = torch.empty_like(q_RHd, memory_format=torch.contiguous_format)
        dk0_NGd, dv0_NGd = torch.zeros_like(k0_NGd), torch.zeros_like(v0_NGd)
        for segment in self._segments:
            grad, q, out = (_heads_first(_segment_rows(x, segment), groups) for x in (grad_RHd, q_RHd, out_RHd))
            z_TH = _segment_rows(z_RH, segment, fill=float("inf"))
            z = z_TH.view(len(z_TH), groups, -1).permute(2, 1, 0)
            dq_total: Tensor | None = None
            for first, stop, causal in _blocks(segment):
                k, v = (_keys_first(x[first:stop], len(q)) for x in (k0_NGd, v0_NGd))
                dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, q, k, v, out, z, 0.0, causal
                )
                dq_total = dq if dq_total is None else dq_total.add_(dq)
                dk0_NGd[first:stop] += dk.sum(0).transpose(0, 1)
                dv0_NGd[first:stop] += dv.sum(0).transpose(0, 1)
            assert dq_total is not None
            _unpad(dq_RHd, _tokens_first(dq_total), segment)
        return dq_RHd, dk0_NGd, dv0_NGd


def _heads_first(x_THd: Tensor, groups: int) -> Tensor:
    """[T, G * g, d] -> [g, G, T, d] view: the g query heads that share a key head become a batch, so that keys and
    values need no copy per query head (they are expanded with stride 0)."""
    return x_THd.unflatten(1, (groups, -1)).permute(2, 1, 0, 3)


def _keys_first(x_TGd: Tensor, batch: int) -> Tensor:
    return x_TGd.transpose(0, 1).expand(batch, -1, -1, -1)


def _tokens_first(x_gGTd: Tensor) -> Tensor:
    return x_gGTd.permute(2, 1, 0, *range(3, x_gGTd.ndim)).flatten(1, 2)


def _blocks(segment: Segment) -> list[tuple[int, int, bool]]:
    """(first key, last key + 1, causal) of the two blocks a segment sees: all tokens before it, and itself."""
    before = [(segment.key_start, segment.start, False)] if segment.start > segment.key_start else []
    return [*before, (segment.start, segment.stop, True)]


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


class CudaFlash:
    """aten's FlashAttention-2, one call per segment. It aligns a causal mask to the bottom right, which is what a span
    of rows at the end of its keys needs."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments

    def forward(self, q_RHd: Tensor, k0_NGd: Tensor, v0_NGd: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        out_RHd = torch.empty_like(q_RHd, memory_format=torch.contiguous_format)
        z_RH = torch.empty(q_RHd.shape[:2], dtype=torch.float32, device=q_RHd.device)
        for segment in self._segments:
            q_THd = _segment_rows(q_RHd, segment)
            k, v = (x[segment.key_start : segment.stop] for x in (k0_NGd, v0_NGd))
            out, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
                q_THd, k, v, *_cuda_offsets(q_THd, k), len(q_THd), len(k), 0.0, True, False
            )
            _unpad(out_RHd, out, segment)
            _unpad(z_RH, lse.T, segment)
        return out_RHd, z_RH, []

    def backward(
        self,
        grad_RHd: Tensor,
        q_RHd: Tensor,
        k0_NGd: Tensor,
        v0_NGd: Tensor,
        out_RHd: Tensor,
        z_RH: Tensor,
        kept: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq_RHd = torch.empty_like(q_RHd, memory_format=torch.contiguous_format)
        dk0_NGd, dv0_NGd = torch.zeros_like(k0_NGd), torch.zeros_like(v0_NGd)
        seed = torch.zeros(2, dtype=torch.uint64, device=q_RHd.device)
        unused = torch.empty(0, dtype=torch.uint64, device=q_RHd.device)
        for segment in self._segments:
            grad, q, out = (_segment_rows(x, segment).contiguous() for x in (grad_RHd, q_RHd, out_RHd))
            keys = slice(segment.key_start, segment.stop)
            lse = _segment_rows(z_RH, segment, fill=float("inf")).T.contiguous()
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                grad, q, k0_NGd[keys], v0_NGd[keys], out, lse, *_cuda_offsets(q, k0_NGd[keys]),
                len(q), keys.stop - keys.start, 0.0, True, seed, unused,
            )  # fmt: skip
            _unpad(dq_RHd, dq, segment)
            dk0_NGd[keys] += dk
            dv0_NGd[keys] += dv
        return dq_RHd, dk0_NGd, dv0_NGd


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
