"""LK losses: values typed by hand, gradients against autograd in fp64, the chunked pass against a plain oracle."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import parse_config
from specforge_lite.model import losses
from specforge_lite.model.draft import TTTSettings
from specforge_lite.model.lk_loss import lk_pass
from specforge_lite.model.losses import Teacher, chunked_cross_entropy
from specforge_lite.training.eagle1 import Eagle1Config
from specforge_lite.training.settings import TrainConfig
from tests.model.test_eagle3 import MASKS, STEPS, make_batch, make_draft, make_target_head

FULL, DRAFT = 12, 7


def plain_lk(logits: Tensor, teacher: Tensor, lse: Tensor, name: str) -> Tensor:
    """The definition, for autograd. logits [..., V], teacher logits [..., V], lse [...] over the full vocabulary."""
    q = torch.softmax(logits, -1)
    p = (teacher - lse.unsqueeze(-1)).exp()
    alpha = torch.minimum(p, q).sum(-1)
    if name == "lk_alpha":
        return -alpha.log()
    r = torch.softmax(teacher, -1)
    kl = (r * (r.log() - torch.log_softmax(logits, -1))).sum(-1)
    weight = (-3 * alpha).exp().detach()
    return weight * kl + (1 - weight) * (1 - alpha)


def random_case(tokens: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(draft logits [m, K, V], the target's over the draft vocabulary [m, V], over the full one: lse [m], ids [m])."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(tokens, FULL, generator=generator, dtype=torch.float64) * 2
    logits = torch.randn(tokens, steps, DRAFT, generator=generator, dtype=torch.float64) * 2
    return logits, full[:, :DRAFT].clone(), torch.logsumexp(full, -1), full[:, :DRAFT].argmax(-1)


def test_values_typed_by_hand() -> None:
    # target: 0.7 and 0.2 on the two draft tokens, 0.1 on one outside; the draft says half and half
    teacher, lse = torch.tensor([[0.7, 0.2]]).log(), torch.zeros(1)
    alpha = 0.5 + 0.2
    kl = 7 / 9 * math.log((7 / 9) / 0.5) + 2 / 9 * math.log((2 / 9) / 0.5)
    weight = math.exp(-3 * 0.7)
    expected = {"lk_alpha": -math.log(alpha), "lk": weight * kl + (1 - weight) * 0.3}
    # only the first token is below the target's: d alpha / d z = (0.5 * (1 - 0.5), -0.5 * 0.5)
    slopes = {"lk_alpha": -0.25 / alpha, "lk": weight * (0.5 - 7 / 9) - (1 - weight) * 0.25}
    for name in ("lk", "lk_alpha"):
        logits = torch.zeros(1, 1, 2)
        loss, hit = lk_pass(logits, teacher, torch.tensor([0]), lse, name)
        assert loss.item() == pytest.approx(expected[name], rel=1e-6)
        torch.testing.assert_close(logits[0, 0], torch.tensor([slopes[name], -slopes[name]]))
        assert bool(hit)


@pytest.mark.parametrize("name", ["lk", "lk_alpha"])
def test_pass_equals_autograd_of_the_definition(name: str) -> None:
    logits, teacher, lse, ids = random_case(9, 3)
    wanted_in = logits.clone().requires_grad_()
    wanted = plain_lk(wanted_in, teacher[:, None], lse[:, None], name)
    wanted.sum().backward()
    loss, hit = lk_pass(logits_copy := logits.clone(), teacher, ids, lse, name)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(logits_copy, wanted_in.grad, rtol=1e-10, atol=1e-13)
    assert torch.equal(hit, logits.argmax(-1) == ids[:, None])


class _Pass(torch.autograd.Function):
    """The pass as autograd sees it. lambda of lk is a constant for the gradient: finite differences know only -log."""

    @staticmethod
    def forward(ctx, logits: Tensor, teacher: Tensor, ids: Tensor, lse: Tensor) -> Tensor:
        gradient = logits.clone()
        loss, _ = lk_pass(gradient, teacher, ids, lse, "lk_alpha")
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        return ctx.saved_tensors[0] * grad_loss.unsqueeze(-1), None, None, None


def test_pass_by_gradcheck() -> None:
    logits, teacher, lse, ids = random_case(5, 2)
    assert torch.autograd.gradcheck(_Pass.apply, (logits.requires_grad_(), teacher, ids, lse))


@pytest.mark.parametrize("name", ["lk", "lk_alpha"])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 20])
def test_chunked_loss_equals_autograd_of_the_definition(
    name: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(losses, "CPU_PASS_ELEMENTS", chunk_elements)
    torch.manual_seed(1)
    _, teacher, lse, ids = random_case(6, 2)
    hidden = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(DRAFT, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, 2, dtype=torch.float64)
    weight[3, 1] = 0

    def chunked(hidden: Tensor, head: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, weight, Teacher(teacher, ids, ids, lse), head, name)[0]

    def plain(hidden: Tensor, head: Tensor) -> Tensor:
        return (plain_lk(hidden @ head.T, teacher[:, None], lse[:, None], name) * weight).sum()

    both = [(f(hidden, head), torch.autograd.grad(f(hidden, head), (hidden, head))) for f in (chunked, plain)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["lk", "lk_alpha"])
def test_training_step_through_the_draft(name: str) -> None:
    """The same gradients as autograd gets from the head's inputs and the plain definition; other sums unchanged."""
    draft, head = make_draft(), make_target_head()
    batch = make_batch([MASKS["gaps"], MASKS["several turns"]])
    output = draft(batch, head, TTTSettings(num_steps=STEPS, loss=name, collect_rows=True))
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}
    seen: list[Tensor] = []

    def plain_loss(*call):
        head_in, weight, teacher, head_weight, _, _ = call
        teacher_logits, _, lse = teacher.chunk(slice(None), want_lse=True)
        loss = plain_lk(head_in @ head_weight.T, teacher_logits[:, None], lse[:, None], name)
        seen.append(loss)
        return (loss * weight).sum(), loss.detach(), torch.zeros_like(weight, dtype=torch.bool)

    draft.zero_grad()
    from specforge_lite.model import eagle3

    original, eagle3.chunked_cross_entropy = eagle3.chunked_cross_entropy, plain_loss
    try:
        plain = draft(batch, head, TTTSettings(num_steps=STEPS, loss=name, collect_rows=True))
    finally:
        eagle3.chunked_cross_entropy = original
    plain.loss.backward()
    assert len(seen) == 1
    assert len(grads) > 10
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-10, atol=0)
    for parameter_name, parameter in draft.named_parameters():
        torch.testing.assert_close(grads[parameter_name], parameter.grad, rtol=1e-8, atol=1e-12, msg=parameter_name)
    reference = draft(batch, head, TTTSettings(num_steps=STEPS, collect_rows=True))
    torch.testing.assert_close(output.correct_K, reference.correct_K, rtol=0, atol=0)
    torch.testing.assert_close(output.alpha_sum_K, reference.alpha_sum_K)
    if name == "lk_alpha":  # Jensen: the mean of -log alpha is at least -log of the mean
        mean = output.alpha_sum_K / output.counted_K
        assert bool((output.loss_sum_K / output.counted_K >= -mean.log() - 1e-6).all())


def test_acceptance_rises_above_what_cross_entropy_finds() -> None:
    """A head too narrow to be right: with lk_alpha the mean of alpha ends higher than with cross-entropy."""
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(64, FULL, generator=generator) * 3
    teacher, lse, ids = full[:, :DRAFT].contiguous(), torch.logsumexp(full, -1), full[:, :DRAFT].argmax(-1)
    hidden = torch.randn(64, 1, 6, generator=generator)
    weight = torch.full((64, 1), 1 / 64)

    def mean_alpha(loss_name: str) -> float:
        head = torch.zeros(DRAFT, 6, requires_grad=True)
        optimizer = torch.optim.Adam([head], lr=0.1)
        for _ in range(120):
            optimizer.zero_grad()
            loss, *_ = chunked_cross_entropy(hidden, weight, Teacher(teacher, ids, ids, lse), head, loss_name)
            loss.backward()
            optimizer.step()
        q = torch.softmax(hidden[:, 0] @ head.detach().T, -1)
        return float(torch.minimum(q, (teacher - lse[:, None]).exp()).sum(-1).mean())

    assert mean_alpha("lk_alpha") > mean_alpha("ce") + 0.01


def test_an_alpha_of_nothing_gives_a_finite_loss() -> None:
    logits = torch.tensor([[[0.0, 400.0]]])
    loss, _ = lk_pass(logits, torch.tensor([[0.0, -400.0]]), torch.tensor([0]), torch.zeros(1), "lk_alpha")
    assert loss.item() == pytest.approx(-math.log(1e-6), rel=1e-4)
    assert bool(logits.isfinite().all())


def test_flag_and_its_mistakes(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    common = ["--target-model-path", "m", "--train-data-path", str(data), "--output-dir", str(tmp_path / "run")]
    assert parse_config(TrainConfig, [*common, "--loss", "lk"]).training.loss == "lk"
    with pytest.raises(ConfigError, match=r"--loss: unknown value 'kl'.*known: ce, lk, lk_alpha"):
        parse_config(TrainConfig, [*common, "--loss", "kl"])
    with pytest.raises(ConfigError, match="--loss lk: EAGLE-1 has its own two losses"):
        parse_config(Eagle1Config, [*common, "--loss", "lk"])
    with pytest.raises(ConfigError, match="loss: unknown value 'lk_alfa'; did you mean 'lk_alpha'"):
        TTTSettings(loss="lk_alfa")
