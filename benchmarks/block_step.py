"""The DSpark step of `bench_training.py --draft dspark`: ours, the plain one, and the products no step can avoid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference_block import reference_pass
from specforge_lite.model.block import BlockDraft
from specforge_lite.model.block_plan import anchor_candidates, plan_blocks
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.initialize import init_random
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch

NUM_AUX, NUM_LAYERS, BLOCK_SIZE, NUM_ANCHORS, MARKOV_RANK = 5, 5, 7, 512, 64


def block_inputs(shape: Any, supervised: float) -> tuple[DraftBatch, TargetHead]:
    """One supervised span at the end of each document of `shape.length` tokens."""
    generator = torch.Generator().manual_seed(0)
    total = shape.batch * shape.length
    rand = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    embed, lm_head = rand(shape.vocab, shape.hidden), rand(shape.vocab, shape.hidden) / shape.hidden**0.5
    mask = torch.zeros(shape.batch, shape.length, dtype=torch.bool)
    mask[:, shape.length - round(shape.length * supervised) :] = True
    ids = torch.randint(shape.vocab - 1, (total,), generator=generator)
    batch = DraftBatch(
        input_ids_N=ids,
        loss_mask_N=mask.flatten(),
        doc_offsets=list(range(0, total + 1, shape.length)),
        aux_NG=rand(total, NUM_AUX * shape.hidden),
        last_NH=lm_head[ids.roll(-1)] * 8 + 0.2 * rand(total, shape.hidden),
        sample_ids=[str(i) for i in range(shape.batch)],
    )
    return batch, TargetHead(embed, lm_head, torch.ones(shape.hidden), 1e-6)


def block_draft(shape: Any) -> BlockDraft:
    config = DraftConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, draft_vocab_size=shape.vocab, algorithm="dspark",
        rms_norm_eps=1e-6, aux_layer_ids=tuple(range(NUM_AUX)), num_hidden_layers=NUM_LAYERS, block_size=BLOCK_SIZE,
        mask_token_id=shape.vocab - 1, markov_rank=MARKOV_RANK, confidence_head=True,
    )  # fmt: skip
    draft = BlockDraft(config, torch.zeros(shape.vocab, dtype=torch.int64), torch.ones(shape.vocab, dtype=torch.bool))
    init_random(draft)
    return draft


def make_block_step(
    kind: str, supervised: float, backend: str, dtype: torch.dtype | None, shape: Any, device: str
) -> Callable[[], float]:
    """A function that runs one training step and returns its loss. kind: `reference`, or ours."""
    batch, head = block_inputs(shape, supervised)
    draft = block_draft(shape).to(device)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4, fused=True)
    batch, head = batch.to(device, dtype), head.to(device, dtype)
    settings = TTTSettings(attention_backend=backend, compute_dtype=dtype, num_anchors=NUM_ANCHORS)
    config = draft.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def reference() -> tuple[Tensor, Tensor]:
        weights, terms = dict(draft.named_parameters()), []
        for start, stop in zip(batch.doc_offsets, batch.doc_offsets[1:]):
            rows = slice(start, stop)
            mask = batch.loss_mask_N[rows]
            anchors = anchor_candidates(mask.cpu(), [0, stop - start])[:NUM_ANCHORS].to(device)
            terms.append(
                reference_pass(
                    weights, head.embed_VH, head.lm_head_VH, batch.input_ids_N[rows], mask, batch.aux_NG[rows],
                    batch.last_NH[rows], anchors, NUM_ANCHORS, BLOCK_SIZE, shape.vocab - 1, heads,
                )
            )  # fmt: skip
        return torch.stack([loss for loss, _ in terms]).sum(), torch.stack([weight for _, weight in terms]).sum()

    def ours() -> tuple[Tensor, Tensor]:
        output = draft(batch, head, settings)
        assert output.weight_sum is not None
        return output.loss, output.weight_sum

    forward = reference if kind == "reference" else ours

    def step() -> float:
        loss, weight = forward()
        loss.backward()
        optimizer.grad_scale = weight.float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach() / weight) if device == "cpu" else 0.0

    return step


def block_gemms(shape: Any, supervised: float) -> list[tuple[str, int, int, int, int]]:
    """(name, rows, inner, columns, passes) of every matrix product the step cannot avoid; 3 passes are fwd + 2 bwd."""
    batch, _ = block_inputs(shape, supervised)
    anchors = anchor_candidates(batch.loss_mask_N, batch.doc_offsets)
    plan = plan_blocks(batch.loss_mask_N, batch.doc_offsets, anchors, BLOCK_SIZE, 0)
    width, head_dim = shape.hidden, shape.hidden // shape.heads
    context, slots, counted = len(plan.context_tokens_C), len(plan.slot_positions_S), len(plan.counted_slots_R)
    labels, kv = len(plan.labels_U), 2 * shape.kv_heads * head_dim
    seen = int((plan.key_stop_n - plan.key_start_n + BLOCK_SIZE).sum()) * BLOCK_SIZE  # (slot, key) pairs of a layer
    gemms = [
        ("fc", context, NUM_AUX * width, width, 2),
        ("teacher", labels, width, shape.vocab, 1),
        ("Markov bias", labels, MARKOV_RANK, shape.vocab, 3),
        ("head", counted, width, shape.vocab, 2),  # frozen: no gradient of the weight
    ]
    for index in range(NUM_LAYERS):
        rows = counted if index == NUM_LAYERS - 1 else slots
        gemms += [
            (f"context k and v, layer {index}", context, width, kv, 3),
            (f"block k and v, layer {index}", slots, width, kv, 3),
            (f"q and o, layer {index}", rows, width, 2 * width, 3),
            (f"gate and up, layer {index}", rows, width, 2 * shape.ffn, 3),
            (f"down, layer {index}", rows, shape.ffn, width, 3),
            (f"attention, layer {index}", rows, head_dim, max(1, seen // max(slots, 1)) * shape.heads, 7),
        ]
    return [g for g in gemms if g[1]]
