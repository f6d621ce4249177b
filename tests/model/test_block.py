"""Blocks of DFlash and DSpark: which rows see what, which slots count, which anchors are drawn."""

from __future__ import annotations

import pytest
import torch

from specforge_lite.core.errors import ConfigError
from specforge_lite.model.block import BlockDraft
from specforge_lite.model.block_attention import BLOCK_ATTENTION, visible_keys
from specforge_lite.model.block_plan import anchor_candidates, draw_anchors, plan_blocks
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch

CPU = torch.device("cpu")
VOCAB, WIDTH = 50, 16


def make_draft(kind: str, seed: int = 0, **changes: object) -> BlockDraft:
    torch.manual_seed(seed)
    values: dict[str, object] = {
        "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "vocab_size": VOCAB, "draft_vocab_size": VOCAB, "algorithm": kind, "aux_layer_ids": (0, 2),
        "num_hidden_layers": 2, "block_size": 4, "mask_token_id": 49,
    }  # fmt: skip
    if kind == "dspark":
        values |= {"markov_rank": 6, "confidence_head": True}
    config = DraftConfig(**(values | changes))  # type: ignore[arg-type]
    draft = build_draft(config, torch.zeros(VOCAB, dtype=torch.int64), torch.ones(VOCAB, dtype=torch.bool))
    assert isinstance(draft, BlockDraft)
    for parameter in draft.parameters():  # 0.02 would hide errors below the tolerance
        parameter.data.normal_(std=0.3) if parameter.ndim > 1 else parameter.data.uniform_(0.5, 1.5)
    return draft


def make_batch(lengths: list[int], masks: list[str], seed: int = 1) -> DraftBatch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return DraftBatch(
        input_ids_N=torch.randint(0, VOCAB - 1, (total,), generator=generator),
        loss_mask_N=torch.tensor([flag == "x" for flag in "".join(masks)]),
        doc_offsets=offsets,
        aux_NG=torch.randn(total, 2 * WIDTH, generator=generator),
        last_NH=torch.randn(total, WIDTH, generator=generator),
        sample_ids=[f"s{i}" for i in range(len(lengths))],
    )


def make_head(seed: int = 2, **changes: object) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    embed, head = (torch.randn(VOCAB, WIDTH, generator=generator) for _ in range(2))
    return TargetHead(embed, head, torch.ones(WIDTH), 1e-6, **changes)  # type: ignore[arg-type]


def test_the_mask_of_two_blocks_typed_by_hand() -> None:
    """T = 6, anchors 2 and 4, B = 3: the drawing at the top of model/block_plan.py."""
    plan = plan_blocks(torch.ones(6, dtype=torch.bool), [0, 6], torch.tensor([2, 4]), 3, 0)
    assert plan.context_tokens_C.tolist() == [0, 1, 2, 3]
    expected = ["xx..xxx...", "xx..xxx...", "xx..xxx...", "xxxx...xxx", "xxxx...xxx", "xxxx...xxx"]
    seen = visible_keys(plan.every, plan, 4)
    assert ["".join("x" if flag else "." for flag in row) for row in seen.tolist()] == expected
    assert plan.slot_positions_S.tolist() == [2, 3, 4, 4, 5, 6]


def test_a_block_sees_its_own_document_only_and_positions_start_anew() -> None:
    plan = plan_blocks(torch.ones(7, dtype=torch.bool), [0, 3, 7], torch.tensor([1, 5]), 2, 0)
    assert plan.context_tokens_C.tolist() == [0, 3, 4]
    assert plan.context_positions_C.tolist() == [0, 0, 1]
    seen = ["".join("x" if flag else "." for flag in row) for row in visible_keys(plan.every, plan, 3).tolist()]
    assert seen == ["x..xx..", "x..xx..", ".xx..xx", ".xx..xx"]
    assert plan.slot_positions_S.tolist() == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("dspark", ["xx..", "x..."]), ("dflash", [".xx.", ".x.."])],
)
def test_slots_count_while_labels_are_supervised_and_exist(kind: str, expected: list[str]) -> None:
    """Mask ..xxx.xx, anchors 2 (labels 3, 4; 5 is not supervised) and 6 (label 7; then the document ends)."""
    mask = torch.tensor([flag == "x" for flag in "..xxx.xx"])
    first_slot = int(kind == "dflash")
    plan = plan_blocks(mask, [0, 8], torch.tensor([2, 6]), 4, first_slot)
    slots = torch.zeros(8, dtype=torch.bool)
    slots[plan.counted_slots_R] = True
    assert ["".join("x" if flag else "." for flag in row) for row in slots.view(2, 4).tolist()] == expected
    assert plan.labels_U.tolist() == [3, 4, 7]


def test_candidates_need_the_anchor_and_its_label() -> None:
    mask = torch.tensor([flag == "x" for flag in ".xx.xxxx"])
    assert anchor_candidates(mask, [0, 6, 8]).tolist() == [1, 4, 6]  # 5 | 6 is a border, 2 and 7 have no label


def test_draws_depend_on_seed_epoch_and_sample_only() -> None:
    batch = make_batch([40, 40], ["x" * 40, "x" * 40])
    mask, offsets = batch.loss_mask_N, batch.doc_offsets
    together = draw_anchors(mask, offsets, ["a", "b"], 8, 7, 3)
    alone = draw_anchors(mask[40:], [0, 40], ["b"], 8, 7, 3)
    assert together[8:].tolist() == (alone + 40).tolist()
    assert together.tolist() == sorted(set(together.tolist()))
    assert len(together) == 16
    assert draw_anchors(mask, offsets, ["a", "b"], 8, 7, 4).tolist() != together.tolist()
    assert draw_anchors(mask, offsets, ["a", "b"], 8, 8, 3).tolist() != together.tolist()
    assert len(draw_anchors(mask, offsets, ["a", "b"], 64, 7, 3)) == 78


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
@pytest.mark.parametrize("settings", [{}, {"logit_scale": 0.5, "logit_softcap": 3.0}])
def test_gradients_equal_autograd_of_the_plain_formula(kind: str, settings: dict[str, float]) -> None:
    """fp64: the loss written down with autograd over whole logits, through scale and soft cap."""
    draft, head = make_draft(kind).double(), make_head(**settings).to("cpu", torch.float64)
    batch = make_batch([17, 12], [".....xxxxxxxxxxxx", "..xxxx.xxxx."]).to("cpu", torch.float64)
    anchors = anchor_candidates(batch.loss_mask_N, batch.doc_offsets)
    plan = plan_blocks(batch.loss_mask_N, batch.doc_offsets, anchors, 4, draft.first_slot)
    ttt = TTTSettings(attention_backend="eager")
    output = draft.forward_plan(batch, head, ttt, plan, CPU)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    h = draft._blocks(batch, head, ttt, plan, "eager", torch.float64)
    labels = plan.labels_U[plan.label_places_R]
    previous = batch.input_ids_N[labels - 1]
    logits = head.logits(h)
    if kind == "dspark":
        bias = draft.markov_bias(previous)
        assert bias is not None
        logits = logits + bias
    ce = torch.nn.functional.cross_entropy(logits, batch.input_ids_N[labels], reduction="none")
    terms = ce
    if kind == "dspark":
        l1 = (logits.softmax(-1) - head.logits(batch.last_NH[labels - 1]).softmax(-1)).abs().sum(-1)
        confidence = draft.confidence(h, previous)
        assert confidence is not None
        bce = torch.nn.functional.binary_cross_entropy_with_logits(
            confidence, (1 - l1 / 2).clamp(0, 1).detach(), reduction="none"
        )
        terms = 0.1 * ce + 0.9 * l1 + bce
    weights = torch.exp(-plan.prediction_R.double() / 4)
    loss = (weights * terms).sum()
    loss.backward()
    assert float(output.loss) == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_packing_backends_and_checkpointing_change_nothing(kind: str) -> None:
    draft, head = make_draft(kind), make_head()
    lengths, masks = [23, 150, 9], [".....xxxxxxxxxxxxxx.xxx", "." * 10 + "x" * 140, "....xxxxx"]
    packed = make_batch(lengths, masks)
    total = draft(packed, head, TTTSettings(attention_backend="eager"))
    total.loss.backward()
    grads = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    losses, weights = [], []
    for index, (start, stop) in enumerate(zip(packed.doc_offsets, packed.doc_offsets[1:])):
        one = DraftBatch(
            packed.input_ids_N[start:stop], packed.loss_mask_N[start:stop], [0, stop - start],
            packed.aux_NG[start:stop], packed.last_NH[start:stop], [packed.sample_ids[index]],
        )  # fmt: skip
        output = draft(one, head, TTTSettings(attention_backend="sdpa", activation_checkpointing=True))
        output.loss.backward()
        losses.append(float(output.loss))
        weights.append(float(output.weight_sum))
    assert sum(losses) == pytest.approx(float(total.loss), rel=2e-6)
    assert sum(weights) == pytest.approx(float(total.weight_sum), rel=1e-6)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=2e-4, atol=1e-4, msg=name)  # sums in fp32
    assert set(BLOCK_ATTENTION) >= {"eager", "sdpa"}


@torch.no_grad()
def test_flex_attention_sees_the_same_keys() -> None:
    """Several blocks of 128 rows and keys, wholly and partly visible, documents of many sizes; torch's own reference of
    flex_attention, which knows the block mask."""
    draft, head = make_draft("dspark"), make_head()
    batch = make_batch([400, 9, 150], ["." * 40 + "x" * 360, "...xxxxxx", "." * 30 + "xxxxx....." * 12])
    eager = draft(batch, head, TTTSettings(attention_backend="eager", collect_rows=True))
    flex = draft(batch, head, TTTSettings(attention_backend="flex_attention", collect_rows=True))
    assert float(flex.loss) == pytest.approx(float(eager.loss), rel=2e-6)
    torch.testing.assert_close(flex.loss_sum_K, eager.loss_sum_K, rtol=2e-6, atol=1e-5)
    anchors = anchor_candidates(batch.loss_mask_N, batch.doc_offsets)
    plan = plan_blocks(batch.loss_mask_N, batch.doc_offsets, anchors, 4, 0)
    kernel = plan.to(CPU, with_flex_masks=True).every.kernel
    assert kernel is not None
    assert int(kernel.full_kv_counts.sum()) > 0


def test_a_batch_without_an_anchor_gives_zero_and_no_error() -> None:
    draft = make_draft("dspark")
    output = draft(make_batch([6], ["....x."]), make_head(), TTTSettings(attention_backend="sdpa"))
    output.loss.backward()
    assert float(output.loss) == 0
    assert float(output.weight_sum) == 0
    assert all(p.grad is None or not p.grad.any() for p in draft.parameters())


def test_bf16_compute_is_near_fp32() -> None:
    draft, head = make_draft("dspark"), make_head()
    batch = make_batch([40], ["......" + "x" * 34])
    exact = draft(batch, head, TTTSettings())
    rough = draft(
        batch.to("cpu", torch.bfloat16), head.to("cpu", torch.bfloat16), TTTSettings(compute_dtype=torch.bfloat16)
    )
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dspark", {"mask_token_id": None}, "mask_token_id: expected an unused id"),
        ("dspark", {"mask_token_id": 50}, "0..49, found 50"),
        ("dspark", {"block_size": 1}, "block_size: expected at least 2, found 1"),
        ("dspark", {"target_hidden_size": 32}, "as wide as the target"),
        ("dflash", {"markov_rank": 4}, "a dflash draft has neither"),
    ],
)
def test_shapes_that_no_engine_serves_are_refused(kind: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_draft(kind, **changes)
