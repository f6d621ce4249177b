"""The EAGLE-3 training step against the plain reference, in fp64: losses, counts and every gradient."""

from __future__ import annotations

import pytest
import torch

from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.eagle3_reference import ReferenceConfig, reference_loss
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.row_plan import plan_rows
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch

VOCAB, DRAFT_VOCAB, HIDDEN, STEPS = 50, 20, 16, 4
# Every kind of mask that makes rows differ: 1 = supervised.
MASKS = {
    "dense": "1" * 14,
    "one span": "00000111111100",
    "long prompt": "00000000000011",
    "gaps": "01011010110101",
    "several turns": "00111000110011",
    "one-token answer": "00000001000000",
    "first tokens only": "11000000000000",
    "none": "0" * 14,
    "two tokens": "11",
    "three tokens": "011",
}


def make_draft(norm_output: bool = False, fc_norm: bool = False, draft_vocab: int = DRAFT_VOCAB):
    config = DraftConfig(
        hidden_size=HIDDEN, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        vocab_size=VOCAB, draft_vocab_size=draft_vocab, norm_output=norm_output, fc_norm=fc_norm,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    draft = build_draft(config, ids - torch.arange(len(ids)), t2d)
    init_random(draft, seed=3)
    for parameter in draft.parameters():  # large enough that attention and SwiGLU are not linear
        torch.manual_seed(parameter.numel())
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return draft.double()


def make_target_head(seed: int = 5) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return TargetHead(rand(VOCAB, HIDDEN), rand(VOCAB, HIDDEN), torch.ones(HIDDEN), 1e-5)


def make_batch(masks: list[str], seed: int = 7) -> DraftBatch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(mask) for mask in masks)
    offsets = [0]
    for mask in masks:
        offsets.append(offsets[-1] + len(mask))
    return DraftBatch(
        input_ids_N=torch.randint(VOCAB, (total,), generator=generator),
        loss_mask_N=torch.tensor([c == "1" for mask in masks for c in mask]),
        doc_offsets=offsets,
        aux_NG=torch.randn(total, 3 * HIDDEN, generator=generator, dtype=torch.float64),
        last_NH=torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64),
    )


def run_reference(draft, head: TargetHead, batch: DraftBatch, num_steps: int):
    config = draft.config
    reference = ReferenceConfig(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps,
        config.rope_theta, config.norm_output, config.fc_norm,
    )  # fmt: skip
    weights = dict(draft.named_parameters())
    total, sums = torch.zeros((), dtype=torch.float64), []
    for start, stop in zip(batch.doc_offsets[:-1], batch.doc_offsets[1:]):
        part = slice(start, stop)
        loss, *per_step = reference_loss(
            weights, reference, batch.input_ids_N[part], batch.loss_mask_N[part], batch.aux_NG[part],
            batch.last_NH[part], head.embed_VH, head.lm_head_VH, draft.d2t, draft.t2d, num_steps,
        )  # fmt: skip
        total = total + loss
        sums.append(torch.stack([x.double() for x in per_step]))
    return total, torch.stack(sums).sum(0)


def gradients(draft, loss) -> dict[str, torch.Tensor]:
    draft.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in draft.named_parameters()}


def assert_same(draft, head, batch, backend: str, num_steps: int = STEPS, checkpointing: bool = False) -> None:
    expected_loss, expected = run_reference(draft, head, batch, num_steps)
    if expected_loss.requires_grad:
        expected_grads = gradients(draft, expected_loss)
    settings = TTTSettings(num_steps=num_steps, attention_backend=backend, activation_checkpointing=checkpointing)
    output = draft(batch, head, settings)
    torch.testing.assert_close(output.loss.detach(), expected_loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss_sum_K.double(), expected[0], rtol=1e-6, atol=1e-6)
    assert output.counted_K.tolist() == expected[1].tolist()
    assert output.correct_K.tolist() == expected[2].tolist()
    actual = gradients(draft, output.loss)
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, f"{name} received no gradient"
        torch.testing.assert_close(actual[name], expected_grads[name], rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("mask", MASKS)
def test_step_equals_reference(mask: str) -> None:
    assert_same(make_draft(), make_target_head(), make_batch([MASKS[mask]]), "sdpa")


def test_one_step_reads_no_memory_that_was_never_written() -> None:
    """With K = 1 the weight gradients of q and of k, v are formed apart; new memory is filled with NaN here."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert_same(make_draft(), make_target_head(), make_batch([MASKS["gaps"]]), "sdpa", num_steps=1)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mask", MASKS)
def test_step_with_eager_attention_equals_reference(mask: str) -> None:
    assert_same(make_draft(), make_target_head(), make_batch([MASKS[mask]]), "eager")


@pytest.mark.parametrize("norm_output", [False, True])
@pytest.mark.parametrize("fc_norm", [False, True])
def test_packed_documents_equal_the_reference_one_by_one(norm_output: bool, fc_norm: bool) -> None:
    batch = make_batch(list(MASKS.values()))
    assert_same(make_draft(norm_output, fc_norm), make_target_head(), batch, "sdpa", num_steps=7)


def test_activation_checkpointing_gives_every_parameter_the_same_gradient() -> None:
    batch = make_batch([MASKS["gaps"], MASKS["several turns"]])
    assert_same(make_draft(), make_target_head(), batch, "sdpa", checkpointing=True)


def test_long_gaps_are_cut_into_segments_and_short_ones_bridged() -> None:
    mask = "0" * 5 + "1" * 3 + "0" * 60 + "1" + "0" * 20 + "11" + "0" * 10
    batch = make_batch([mask, mask])
    plan = plan_rows(batch.loss_mask_N, batch.doc_offsets, 2)
    rows_of = [(s.start, s.stop, s.compact_stop - s.compact_start) for s in plan.steps[0].segments[:2]]
    assert rows_of == [(2, 6, 4), (65, 89, 5)]
    assert_same(make_draft(), make_target_head(), batch, "sdpa")


def test_flex_attention_forward_equals_eager() -> None:
    draft, head = make_draft(), make_target_head()
    batch = make_batch([MASKS["gaps"], MASKS["one span"]])
    with torch.no_grad():
        losses = [
            draft(batch, head, TTTSettings(num_steps=3, attention_backend=b)).loss for b in ("eager", "flex_attention")
        ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


def test_needed_rows_typed_by_hand() -> None:
    """Document of 10 tokens, tokens 6, 7, 8 counted, K = 3; a second document shifted by 10 without any."""
    counted = torch.zeros(20, dtype=torch.bool)
    counted[[6, 7, 8]] = True
    plan = plan_rows(counted, [0, 10, 20], 3)
    assert plan.key_tokens.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert [s.row_tokens.tolist() for s in plan.steps] == [[2, 3, 4, 5, 6], [2, 3, 4, 5], [2, 3, 4]]
    assert [s.position_ids.tolist() for s in plan.steps] == [[2, 3, 4, 5, 6], [3, 4, 5, 6], [4, 5, 6]]
    # places of rows u - 2 - k among the needed rows of all steps (5, 4 and 3 of them), one token a line
    assert plan.head_places_MK.tolist() == [[2, 5 + 1, 9 + 0], [3, 5 + 2, 9 + 1], [4, 5 + 3, 9 + 2]]
    assert plan.head_rows_MK.tolist() == [[4, 3, 2], [5, 4, 3], [6, 5, 4]]
    # embeddings: x_{t+1+k}; key rows read tokens 1..7, later steps at most 7 (= 5 + 1 + 1)
    assert plan.embed_tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_rows_before_a_document_do_not_exist() -> None:
    """Token 2 of the second document is predicted at step 0 only: at step 1 its row would be of the first document."""
    counted = torch.zeros(8, dtype=torch.bool)
    counted[6] = True  # token 2 of the document 4..7
    plan = plan_rows(counted, [0, 4, 8], 3)
    assert plan.head_places_MK.tolist() == [[0, -1, -1]]
    assert [s.row_tokens.tolist() for s in plan.steps] == [[4], [], []]


def test_eagle_alignment_uses_the_mask_of_the_row() -> None:
    """`eagle`: row t is supervised by m_t at step 0, so predicted token u by m_(u-2)."""
    head, batch = make_target_head(), make_batch(["0001100000"])
    all_in_vocab = make_draft(draft_vocab=VOCAB)
    outputs = {
        name: all_in_vocab(batch, head, TTTSettings(num_steps=2, loss_mask_alignment=name, collect_rows=True))
        for name in ("ours", "eagle")
    }
    rows = {name: output.supervised_NK[:, 0].nonzero().flatten().tolist() for name, output in outputs.items()}
    assert rows == {"ours": [1, 2], "eagle": [3, 4]}
    step_1 = {name: output.supervised_NK[:, 1].nonzero().flatten().tolist() for name, output in outputs.items()}
    assert step_1 == {"ours": [0, 1], "eagle": [2, 3]}


def test_runs_are_counted_per_row() -> None:
    draft, head, batch = make_draft(draft_vocab=VOCAB), make_target_head(), make_batch(["1" * 12, "1" * 9])
    output = draft(batch, head, TTTSettings(num_steps=3, collect_rows=True))
    runs = 0
    for row in range(21):
        if not output.supervised_NK[row, 0]:
            continue
        for k in range(3):
            if not output.correct_NK[row, k]:
                break
            runs += 1
    assert output.run_sum.item() == runs
    assert output.run_rows.item() == (12 - 2) + (9 - 2)
    assert output.supervised_NK.sum().item() == output.supervised_K.sum().item()


def test_loss_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from specforge_lite.model import losses

    draft, head, batch = make_draft(), make_target_head(), make_batch(list(MASKS.values()))
    whole = draft(batch, head, TTTSettings(num_steps=STEPS)).loss
    monkeypatch.setattr(losses, "CPU_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(losses, "CPU_PASS_ELEMENTS", 1)
    chunked = draft(batch, head, TTTSettings(num_steps=STEPS)).loss
    torch.testing.assert_close(whole, chunked, rtol=1e-13, atol=0)


def test_a_draft_of_another_width_carries_its_own_embeddings() -> None:
    config = DraftConfig(
        hidden_size=8, target_hidden_size=HIDDEN, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCAB, draft_vocab_size=VOCAB,
    )  # fmt: skip
    draft = build_draft(config, torch.zeros(VOCAB, dtype=torch.int64), torch.ones(VOCAB, dtype=torch.bool)).double()
    output = draft(make_batch(["1" * 10]), make_target_head(), TTTSettings(num_steps=2))
    output.loss.backward()
    assert draft.fc.weight.shape == (8, 3 * HIDDEN)
    assert draft.embed_tokens.weight.grad is None
    assert "embed_tokens.weight" in draft.state_dict()


def test_sampling_acceptance_is_the_overlap_with_the_full_distribution() -> None:
    """alpha = sum_v min(p_v, q_v), p over the FULL vocabulary; recomputed here from a decode of row 3, step 0."""
    draft, head, batch = make_draft(), make_target_head(), make_batch(["0" * 5 + "1" + "0" * 3])
    output = draft(batch, head, TTTSettings(num_steps=1, collect_rows=True))
    p = head.logits(batch.last_NH[4]).softmax(-1)
    with torch.no_grad():
        embeds = head.embed(batch.input_ids_N[1:5])[None]

        def causal(q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        state = draft.first_state(batch.aux_NG[:4])[None]
        _, head_input = draft.step(state, embeds, torch.arange(4)[None], causal)
        q = draft.logits(head_input[0, 3]).softmax(-1)
    expected = torch.minimum(p[draft.target_ids], q).sum() if draft.t2d[p.argmax()] else torch.zeros(())
    torch.testing.assert_close(output.alpha_sum_K[0].double(), expected.double(), rtol=1e-6, atol=1e-7)


def test_packed_and_unpacked_batches_give_the_same_loss_and_gradients() -> None:
    """Ten documents in one row against ten passes of one document each, fp64, 1e-12."""
    draft, head, packed = make_draft(fc_norm=True), make_target_head(), make_batch(list(MASKS.values()))
    settings = TTTSettings(num_steps=7)
    loss = draft(packed, head, settings).loss
    expected = gradients(draft, loss)
    draft.zero_grad()
    total = 0.0
    for start, stop in zip(packed.doc_offsets[:-1], packed.doc_offsets[1:]):
        part = slice(start, stop)
        alone = DraftBatch(
            packed.input_ids_N[part], packed.loss_mask_N[part], [0, stop - start], packed.aux_NG[part],
            packed.last_NH[part],
        )  # fmt: skip
        output = draft(alone, head, settings)
        output.loss.backward()
        total += output.loss.item()
    assert total == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in draft.named_parameters():
        error = (parameter.grad - expected[name]).abs().max()
        assert error <= 1e-12 * max(1.0, expected[name].abs().max().item()), name
