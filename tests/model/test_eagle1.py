"""The EAGLE-1 training step against the plain reference, in fp64: losses, counts and every gradient; its alignment
against values typed by hand; its noise; its memory."""

from __future__ import annotations

import pytest
import torch

from specforge_lite.core.errors import ConfigError
from specforge_lite.model import losses
from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.eagle1 import state_noise
from specforge_lite.model.eagle3_reference import ReferenceConfig
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.row_plan import plan_rows
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch
from tests.model.reference_eagle1 import reference_eagle1_loss, reference_states

VOCAB, HIDDEN = 50, 16
MASKS = {
    "dense": "1" * 14,
    "long prompt": "00000000000011",
    "gaps": "01011010110101",
    "several turns": "00111000110011",
    "first tokens only": "11000000000000",
    "none": "0" * 14,
    "two tokens": "11",
    "three tokens": "011",
}
QUIET = TTTSettings(num_steps=1, noise=0.0)


def make_draft(**changes) -> Draft:
    values = {
        "hidden_size": HIDDEN, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 6, "vocab_size": VOCAB, "draft_vocab_size": VOCAB, "algorithm": "eagle1", **changes,
    }  # fmt: skip
    config = DraftConfig(**values)
    size = config.draft_vocab_size
    t2d = torch.arange(config.vocab_size) < size
    draft = build_draft(config, torch.zeros(size, dtype=torch.int64), t2d)
    init_random(draft, seed=3)
    for parameter in draft.parameters():  # large enough that attention and SwiGLU are not linear
        torch.manual_seed(parameter.numel())
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return draft.double()


def make_target_head(logit_scale: float = 1.0, softcap: float | None = None) -> TargetHead:
    generator = torch.Generator().manual_seed(5)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    embed, head = rand(VOCAB, HIDDEN), rand(VOCAB, HIDDEN)
    return TargetHead(embed, head, torch.ones(HIDDEN), 1e-5, logit_scale=logit_scale, logit_softcap=softcap)


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
        aux_NG=torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64),
        last_NH=torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64),
    )


def run_reference(draft: Draft, head: TargetHead, batch: DraftBatch, ttt: TTTSettings):
    config = draft.config
    reference = ReferenceConfig(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps, config.rope_theta
    )
    weights = dict(draft.named_parameters())
    total, sums = torch.zeros((), dtype=torch.float64), []
    for start, stop in zip(batch.doc_offsets[:-1], batch.doc_offsets[1:]):
        part = slice(start, stop)
        outputs = reference_states(
            weights, reference, batch.input_ids_N[part], batch.last_NH[part], head.embed_VH, ttt.num_steps
        )
        loss, *per_step = reference_eagle1_loss(
            outputs, batch.loss_mask_N[part], batch.last_NH[part], head.lm_head_VH, head.logit_scale,
            head.logit_softcap, ttt.v_weight, ttt.p_weight, ttt.step_decay,
        )  # fmt: skip
        total = total + loss
        sums.append(torch.stack([x.double() for x in per_step]))
    return total, torch.stack(sums).sum(0)


def gradients(draft: Draft, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    draft.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in draft.named_parameters()}


def assert_same(draft: Draft, head: TargetHead, batch: DraftBatch, ttt: TTTSettings) -> None:
    expected_loss, expected = run_reference(draft, head, batch, ttt)
    expected_grads = gradients(draft, expected_loss)
    output = draft(batch, head, ttt)
    torch.testing.assert_close(output.loss.detach(), expected_loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss_sum_K.double(), expected[0], rtol=1e-6, atol=1e-6)
    assert output.counted_K.tolist() == output.supervised_K.tolist() == expected[1].tolist()
    assert output.correct_K.tolist() == expected[2].tolist()
    actual = gradients(draft, output.loss)
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, f"{name} received no gradient"
        scale = max(1.0, expected_grads[name].abs().max().item())
        torch.testing.assert_close(actual[name], expected_grads[name], rtol=1e-10, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
def test_step_equals_reference(mask: str, backend: str) -> None:
    ttt = TTTSettings(num_steps=1, noise=0.0, attention_backend=backend)
    assert_same(make_draft(), make_target_head(), make_batch([MASKS[mask]]), ttt)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_several_steps_over_packed_documents_equal_the_reference(checkpointing: bool) -> None:
    ttt = TTTSettings(num_steps=4, noise=0.0, v_weight=0.7, p_weight=0.3, activation_checkpointing=checkpointing)
    assert_same(make_draft(), make_target_head(), make_batch(list(MASKS.values())), ttt)


@pytest.mark.parametrize(("logit_scale", "softcap"), [(0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_scaled_and_capped_heads(logit_scale: float, softcap: float | None) -> None:
    head = make_target_head(logit_scale, softcap)
    assert_same(make_draft(), head, make_batch([MASKS["gaps"], MASKS["dense"]]), TTTSettings(num_steps=2, noise=0.0))


def test_alignment_typed_by_hand() -> None:
    """A draft that returns its own input state: row t of step 0 then predicts f_t where f_{t+1} is wanted.

        token      0   1   2   3   4      states f = 10, 20, 30, 40, 50 in every coordinate; tokens 3 and 4 supervised
        row t                  1   2      row 1 predicts token 3 (learns f_2), row 2 predicts token 4 (learns f_3)

    SmoothL1(f_t, f_{t+1}) = |10| - 0.5 = 9.5 for both rows.
    """
    draft, batch = make_draft(), make_batch(["00011"])
    for parameter in draft.parameters():
        parameter.data.zero_()
    draft.get_parameter("fc.weight").data[:, HIDDEN:] = torch.eye(HIDDEN)
    batch.last_NH = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0], dtype=torch.float64)[:, None].expand(5, HIDDEN)
    output = draft(batch, make_target_head(), TTTSettings(num_steps=1, noise=0.0, p_weight=0.0))
    assert output.loss.item() == pytest.approx(19.0, abs=1e-12)
    assert output.counted_K.tolist() == [2.0]
    two_steps = TTTSettings(num_steps=2, noise=0.0, p_weight=0.0, step_decay=1.0, collect_rows=True)
    output = draft(batch, make_target_head(), two_steps)
    # step 1 of row t predicts token t + 3 and learns f_{t+2}: rows 0 and 1, |20| - 0.5 each
    assert output.supervised_NK.T.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    assert output.loss.item() == pytest.approx(19.0 + 39.0, abs=1e-12)


def test_row_t_reads_the_embedding_of_the_next_token() -> None:
    """fc = [identity ; 0]: the predicted state of row t is e(x_{t+1})."""
    draft, batch, head = make_draft(), make_batch(["00001"]), make_target_head()
    for parameter in draft.parameters():
        parameter.data.zero_()
    draft.get_parameter("fc.weight").data[:, :HIDDEN] = torch.eye(HIDDEN)
    output = draft(batch, head, TTTSettings(num_steps=1, noise=0.0, p_weight=0.0))
    guess, wanted = head.embed_VH[batch.input_ids_N[3]], batch.last_NH[3]  # row 2 predicts token 4
    expected = torch.nn.functional.smooth_l1_loss(guess, wanted)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_eagle_alignment_uses_the_mask_of_the_row() -> None:
    draft, head, batch = make_draft(), make_target_head(), make_batch(["0001100000"])
    rows = {}
    for name in ("ours", "eagle"):
        output = draft(batch, head, TTTSettings(num_steps=1, loss_mask_alignment=name, collect_rows=True))
        rows[name] = output.supervised_NK[:, 0].nonzero().flatten().tolist()
    assert rows == {"ours": [1, 2], "eagle": [3, 4]}


def test_noise_is_uniform_of_eagles_width_and_only_in_training() -> None:
    batch = make_batch(["0" + "1" * 63, "0" + "1" * 255])
    plan = plan_rows(torch.arange(320) % 64 > 1, batch.doc_offsets, 1)
    state = torch.zeros(len(plan.key_tokens), 400)
    torch.manual_seed(0)
    noise = state_noise(state, plan.key_doc_lengths, 0.2)
    for tokens, rows in ((64, noise[plan.key_tokens < 64]), (256, noise[plan.key_tokens >= 64])):
        half_width = 0.2 * 512 / tokens / 2
        assert half_width * 0.99 < rows.max() <= half_width
        assert -half_width <= rows.min() < -half_width * 0.99
        assert rows.std().item() == pytest.approx(half_width / 3**0.5, rel=0.02)

    draft, head = make_draft(), make_target_head()
    noisy = TTTSettings(num_steps=1)
    losses_seen = {draft(batch, head, noisy).loss.item() for _ in range(3)}
    assert len(losses_seen) == 3
    torch.manual_seed(1)
    first = draft(batch, head, noisy).loss.item()
    torch.manual_seed(1)
    assert draft(batch, head, noisy).loss.item() == first
    quiet = draft(batch, head, QUIET).loss.item()
    evaluated = TTTSettings(num_steps=1, collect_rows=True)
    assert draft(batch, head, evaluated).loss.item() == quiet
    assert draft.eval()(batch, head, noisy).loss.item() == quiet


def test_decoding_steps_equal_training_rows() -> None:
    """`first_state`, `step` and `logits` reproduce what row 3 predicted at steps 0 and 1 of the training pass."""
    draft, head, batch = make_draft().eval(), make_target_head(), make_batch(["0" * 5 + "1" + "0" * 2])
    draft.use_target_head(head)
    ids = batch.input_ids_N

    def causal(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    kept: list[torch.Tensor] = []

    def chain(q, k, v):  # step 1: keys of step 0, rows 0..3, and its own
        keys, values = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    def first(q, k, v):
        kept.extend((k, v))
        return causal(q, k, v)

    with torch.no_grad():
        state = draft.first_state(batch.last_NH[:4])[None]
        state, head_input = draft.step(state, head.embed(ids[1:5])[None], torch.arange(4)[None], first)
        q0 = draft.logits(head_input[0, 3]).softmax(-1)
        state, head_input = draft.step(state[:, 3:], head.embed(ids[5:6])[None], torch.tensor([[4]]), chain)
        q1 = draft.logits(head_input[0, 0]).softmax(-1)
    expected = []
    for q, row in ((q0, 4), (q1, 5)):
        p = head.logits(batch.last_NH[row]).softmax(-1)
        expected.append(torch.minimum(p, q).sum().item())
    alphas = []
    for mask in ("00000100", "00000010"):
        batch.loss_mask_N = torch.tensor([c == "1" for c in mask])
        output = draft(batch, head, TTTSettings(num_steps=2, collect_rows=True))
        alphas.append(output.alpha_sum_K.tolist())
    assert alphas[0][0] == pytest.approx(expected[0], rel=1e-6)  # row 3, step 0 predicts token 5
    assert alphas[1][1] == pytest.approx(expected[1], rel=1e-6)  # row 3, step 1 predicts token 6


def test_full_vocabulary_logits_are_never_all_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, head, batch = make_draft(), make_target_head(0.5, 4.0), make_batch(list(MASKS.values()))
    whole = draft(batch, head, TTTSettings(num_steps=2, noise=0.0))
    whole_grads = gradients(draft, whole.loss)
    seen: list[int] = []
    original = TargetHead.scale_logits

    def counting(self, raw):
        seen.append(raw.numel())
        return original(self, raw)

    monkeypatch.setattr(TargetHead, "scale_logits", counting)
    monkeypatch.setattr(losses, "CPU_CHUNK_ELEMENTS", 1)
    chunked = draft(batch, head, TTTSettings(num_steps=2, noise=0.0))
    assert max(seen) == 4 * 2 * VOCAB  # four tokens, two steps
    torch.testing.assert_close(whole.loss, chunked.loss, rtol=1e-13, atol=0)
    for name, gradient in gradients(draft, chunked.loss).items():
        torch.testing.assert_close(gradient, whole_grads[name], rtol=1e-10, atol=1e-10)


def test_shapes_that_cannot_be_an_eagle1_draft() -> None:
    with pytest.raises(ConfigError, match="hidden_size 8 != target_hidden_size 16"):
        make_draft(hidden_size=8, target_hidden_size=16)
    with pytest.raises(ConfigError, match="draft_vocab_size 20 != vocab_size 50"):
        make_draft(draft_vocab_size=20)
    with pytest.raises(ConfigError, match="no head of its own"):
        make_draft().logits(torch.zeros(1, HIDDEN))


def test_the_target_head_is_not_a_parameter() -> None:
    draft = make_draft()
    before = set(draft.state_dict())
    draft.use_target_head(make_target_head())
    assert set(draft.state_dict()) == before
    assert {n for n, _ in draft.named_parameters()} == {
        "fc.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight", "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "layers.0.post_attention_layernorm.weight",
    }  # fmt: skip
