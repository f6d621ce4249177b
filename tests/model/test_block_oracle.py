"""DFlash and DSpark against values computed with the authors' own code (tests/model/dspark)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.reference_block import reference_pass
from specforge_lite.model.block import BlockDraft
from specforge_lite.model.block_attention import visible_keys
from specforge_lite.model.block_plan import plan_blocks
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch

DATA = Path(__file__).parent / "dspark"
CASES = ["plain", "two_turns", "mask_hole", "block_at_end", "padding", "dflash"]
CPU = torch.device("cpu")


class AnchorLayoutWithoutHeads(BlockDraft):
    """DeepSpec's "dflash" oracle has the anchor layout, cross-entropy only: not a kind of ours, the same code."""

    first_slot = 0  # type: ignore[assignment]


def draft_config(name: str) -> DraftConfig:
    values = json.loads((DATA / name).read_text())
    return DraftConfig(
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        vocab_size=values["vocab_size"],
        draft_vocab_size=values["vocab_size"],
        algorithm="dspark" if values["markov_rank"] else "dflash",
        rms_norm_eps=values["rms_norm_eps"],
        rope_theta=values["rope_parameters"]["rope_theta"],
        max_position_embeddings=values["max_position_embeddings"],
        aux_layer_ids=tuple(values["target_layer_ids"]),
        num_hidden_layers=values["num_hidden_layers"],
        block_size=values["block_size"],
        mask_token_id=values["mask_token_id"],
        markov_rank=values["markov_rank"],
        confidence_head=values["enable_confidence_head"],
    )


def load_case(name: str) -> tuple[BlockDraft, TargetHead, DraftBatch, Tensor, dict[str, Any], dict[str, Tensor]]:
    facts = json.loads((DATA / f"case_{name}.json").read_text())
    tensors = load_file(DATA / f"case_{name}.safetensors")
    weights = load_file(DATA / facts["weights"])
    vanilla = "vanilla" in facts["weights"]
    config = draft_config("config_vanilla.json" if vanilla else "config_none.json")
    size = config.vocab_size
    kind = BlockDraft if vanilla else AnchorLayoutWithoutHeads
    draft = kind(config, torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool))
    embed, head = weights.pop("embed_tokens.weight"), weights.pop("lm_head.weight")
    missing = draft.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"d2t", "t2d"}
    target_head = TargetHead(embed, head, torch.ones(embed.shape[1]), 1e-6)
    rows, length = tensors["input_ids"].shape
    batch = DraftBatch(
        input_ids_N=tensors["input_ids"].flatten(),
        loss_mask_N=tensors["loss_mask"].flatten().bool(),
        doc_offsets=list(range(0, rows * length + 1, length)),
        aux_NG=tensors["target_hidden_states"].flatten(0, 1),
        last_NH=tensors["target_last_hidden_states"].flatten(0, 1),
        sample_ids=[str(row) for row in range(rows)],
    )
    keep = tensors["block_keep_mask"]
    anchors_n = (tensors["anchors"] + length * torch.arange(rows)[:, None])[keep]
    return draft, target_head, batch, anchors_n, facts, tensors


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_the_authors(name: str, backend: str) -> None:
    draft, head, batch, anchors_n, facts, tensors = load_case(name)
    plan = plan_blocks(batch.loss_mask_N, batch.doc_offsets, anchors_n, draft.config.block_size, draft.first_slot)
    output = draft.forward_plan(batch, head, TTTSettings(attention_backend=backend), plan, CPU)
    assert output.weight_sum is not None
    loss = output.loss / (output.weight_sum + 1e-6)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(facts["loss"], rel=1e-5)
    assert float(output.weight_sum) == pytest.approx(facts["terms"]["ce_loss_den"], rel=1e-6)
    assert output.counted_K.tolist() == facts["counted"]
    for parameter_name, parameter in draft.named_parameters():
        expected = tensors[f"grad.{parameter_name}"]
        assert parameter.grad is not None, parameter_name
        error = (parameter.grad - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        assert float(error) < 1e-5, (parameter_name, float(error))


@pytest.mark.parametrize("name", CASES)
def test_masks_equal_the_authors(name: str) -> None:
    draft, _, batch, anchors_n, _, tensors = load_case(name)
    size = draft.config.block_size
    plan = plan_blocks(batch.loss_mask_N, batch.doc_offsets, anchors_n, size, draft.first_slot)
    keep = tensors["block_keep_mask"]
    assert torch.equal(plan.counted_nP, tensors["eval_mask"][keep])
    ours = visible_keys(plan.every, plan, len(plan.context_tokens_C))
    length = tensors["input_ids"].shape[1]
    theirs = tensors["attention_mask"]  # [row, slots of the row, tokens + slots of the row]
    num_context = len(plan.context_tokens_C)
    kept_blocks = keep.nonzero().tolist()  # (row, place of the block in the row)
    for block, (row, place) in enumerate(kept_blocks):
        for slot in range(size):
            context_mask, own_mask = theirs[row, place * size + slot].split([length, theirs.shape[2] - length])
            seen = plan.context_tokens_C[ours[block * size + slot, :num_context]]
            assert torch.equal(seen, context_mask.nonzero().squeeze(1) + row * length)
            assert own_mask.nonzero().squeeze(1).tolist() == list(range(place * size, (place + 1) * size))


def test_statistics_equal_the_authors() -> None:
    draft, head, batch, anchors_n, facts, _ = load_case("two_turns")
    plan = plan_blocks(batch.loss_mask_N, batch.doc_offsets, anchors_n, draft.config.block_size, draft.first_slot)
    output = draft.forward_plan(batch, head, TTTSettings(collect_rows=True), plan, CPU)
    assert output.alpha_sum_K is not None
    for k in range(draft.config.block_size):
        total, count = facts["metrics"][f"train/accept_rate@{k}"]
        assert float(output.alpha_sum_K[k]) == pytest.approx(total, rel=1e-5)
        assert float(output.counted_K[k]) == count


@pytest.mark.parametrize("name", ["plain", "two_turns", "mask_hole", "block_at_end"])
def test_the_plain_reference_of_the_benchmark_equals_the_authors(name: str) -> None:
    draft, head, batch, anchors_n, facts, tensors = load_case(name)
    weights = {n: p.detach().clone().requires_grad_() for n, p in draft.named_parameters()}
    config = draft.config
    loss, weight = reference_pass(
        weights, head.embed_VH, head.lm_head_VH, batch.input_ids_N, batch.loss_mask_N, batch.aux_NG, batch.last_NH,
        anchors_n, 6, config.block_size, int(config.mask_token_id or 0),
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
    )  # fmt: skip
    (loss / (weight + 1e-6)).backward()
    assert float(loss.detach() / weight) == pytest.approx(facts["loss"], rel=1e-5)
    for parameter_name, parameter in weights.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, tensors[f"grad.{parameter_name}"], rtol=1e-4, atol=1e-5)
