"""fp16 training: the loss scale's rules, overflows that are skipped and not counted, checkpoints, ds_config.json."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_lite.checkpoints.compat.deepspeed import translate
from specforge_lite.core.errors import TrainingError
from specforge_lite.model.draft import TTTSettings
from specforge_lite.training.fp16 import LossScaler
from specforge_lite.training.optimizer import NOT_FINITE, OVERFLOW, DraftOptimizer
from specforge_lite.training.settings import OptimizerSection, TrainingSection
from tests.fake_engine import Fault
from tests.model import test_eagle1, test_eagle3
from tests.training.test_training_processes import log_of, several_runs
from tests.training.test_training_runs import assert_same_checkpoint, stop_after
from tests.training_runs import Run, run_ranks, train, weights

FP16 = {"training": {"precision": "float16", "total_steps": 8}, "optimizer": {"initial_scale_power": 8}}
HUGE = {"training": {"precision": "fp16", "total_steps": 12}, "optimizer": {"initial_scale_power": 18}}


class PlainScaler:
    """DeepSpeed's DynamicLossScaler as its documentation tells it, with Python numbers: the oracle."""

    def __init__(self, scale: float, window: int, hysteresis: int, smallest: float) -> None:
        self.scale, self.window, self.hysteresis, self.smallest = scale, window, hysteresis, smallest
        self.left, self.iteration, self.last_overflow = hysteresis, 0, -1

    def update(self, overflow: bool) -> None:
        if overflow:
            if self.left == 1:
                self.scale = max(self.scale / 2, self.smallest)
            else:
                self.left -= 1
            self.last_overflow = self.iteration
        elif (self.iteration - self.last_overflow) % self.window == 0:
            self.left = self.hysteresis
            self.scale *= 2
        self.iteration += 1


@pytest.mark.parametrize(("window", "hysteresis", "smallest"), [(4, 2, 1.0), (3, 1, 16.0), (7, 3, 0.25)])
def test_the_scale_follows_deepspeeds_rules(window: int, hysteresis: int, smallest: float) -> None:
    config = OptimizerSection(
        initial_scale_power=6,
        loss_scale_window=window,
        loss_scale_hysteresis=hysteresis,
        min_loss_scale=smallest,
    )
    scaler, plain = LossScaler(config, "cpu"), PlainScaler(64.0, window, hysteresis, smallest)
    generator = random.Random(window)
    scales = set()
    for _ in range(300):
        overflow = generator.random() < 0.25
        scaler.update(torch.tensor(overflow))
        plain.update(overflow)
        assert scaler.scale.item() == plain.scale
        scales.add(plain.scale)
    assert len(scales) > 3
    copy = LossScaler(config, "cpu")
    copy.load_state(scaler.state())
    assert copy.state() == scaler.state()


def test_a_fixed_scale_stays_and_its_overflows_count_as_failures() -> None:
    scaler = LossScaler(OptimizerSection(loss_scale=128), "cpu")
    scaler.update(torch.tensor(True))
    assert scaler.state()["loss_scale"] == 128
    assert not scaler.can_fall()


def test_the_update_is_that_of_the_unscaled_gradient_and_overflows_change_nothing() -> None:
    config = OptimizerSection(learning_rate=0.1, initial_scale_power=10, warmup_steps=0, loss_scale_hysteresis=1)
    weight, twin = torch.ones(3, 4), torch.ones(3, 4)
    scaled = DraftOptimizer({"w": weight}, config, 5, LossScaler(config, "cpu"))
    plain = DraftOptimizer({"w": twin}, config, 5)
    gradient, count, loss = torch.linspace(-1, 1, 12).view(3, 4), torch.tensor(4.0), torch.tensor(2.0)

    def update(optimizer: DraftOptimizer, tensor: torch.Tensor, scale: float, loss: torch.Tensor) -> Any:
        tensor.grad = gradient * scale
        return optimizer.step(0, count, loss, tensor.grad.square().sum())

    results = update(scaled, weight, 1024.0, loss), update(plain, twin, 1.0, loss)
    torch.testing.assert_close(weight, twin)
    torch.testing.assert_close(results[0].grad_norm, results[1].grad_norm)
    before = weight.clone()
    assert update(scaled, weight, float("inf"), loss).skipped.item() == OVERFLOW
    assert scaled.scaler is not None
    assert scaled.scaler.scale.item() == 512
    assert update(scaled, weight, 1.0, torch.tensor(torch.nan)).skipped.item() == NOT_FINITE
    assert scaled.scaler.scale.item() == 512  # a broken loss is not the scale's fault
    assert torch.equal(weight, before)
    assert update(plain, twin, float("inf"), loss).skipped.item() == NOT_FINITE


@pytest.mark.parametrize(("kind", "num_steps"), [(test_eagle1, 1), (test_eagle3, 3)], ids=["eagle1", "eagle3"])
def test_scaled_fp16_gradients_are_those_of_fp64_and_unscaled_ones_vanish(kind: Any, num_steps: int) -> None:
    """The scale itself, 2**17, lies outside of fp16; what it multiplies does not."""
    draft, head, batch = kind.make_draft(), kind.make_target_head(), kind.make_batch(["0" * 20 + "1" * 30, "0001100"])
    settings = TTTSettings(num_steps=num_steps, attention_backend="sdpa", noise=0.0)
    small = 2.0**-20
    (draft(batch, head, settings).loss * small).backward()
    expected = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.float()
    half_batch, half_head = batch.to("cpu", torch.float16), head.to("cpu", torch.float16)
    half = replace(settings, compute_dtype=torch.float16)

    def worst_error(scale: float) -> float:
        draft.zero_grad(set_to_none=True)
        (draft(half_batch, half_head, half).loss * small * scale).backward()
        found = {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        assert found.keys() == expected.keys()
        return max(float((found[n].double() / scale - e).norm() / e.norm()) for n, e in expected.items())

    assert worst_error(2.0**17) < 0.03
    assert worst_error(1.0) > 2 * worst_error(2.0**17)


def test_fp16_trains_like_fp32(tmp_path: Path) -> None:
    plain = Run(tmp_path, "fp32", {"training": {"total_steps": 8}})
    train(plain)
    half = Run(tmp_path, "fp16", FP16)
    train(half)
    assert half.losses() == pytest.approx(plain.losses(), rel=0.01)
    assert half.metrics()[0]["loss_scale"] == 256
    tensors = weights(half.output_dir / "step_8")
    assert all(t.dtype == torch.float32 for n, t in tensors.items() if n.endswith("weight"))


def test_overflows_are_skipped_and_not_counted_as_bad_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run(tmp_path, settings=HUGE | {"training": {**HUGE["training"], "nonfinite_budget": 0}})
    summary = train(run)
    assert summary.nonfinite_steps == 0
    skipped = capsys.readouterr().out.count("gradient overflow in fp16, step skipped")
    assert 1 < skipped < 12
    assert len(run.losses()) == 12 - skipped
    last = json.loads((run.output_dir / "step_12" / "state.json").read_text())["counters"]
    assert last["loss_scale"] == 2.0 ** (18 - skipped + 1)  # the first overflow is forgiven (--hysteresis 2)
    assert all(torch.isfinite(t.float()).all() for t in weights(run.output_dir / "step_12").values())


def test_bad_samples_still_count(tmp_path: Path) -> None:
    faults = {f"s{i}": Fault("nan") for i in range(24)}
    run = Run(tmp_path, settings=FP16 | {"training": {**FP16["training"], "nonfinite_budget": 2}}, faults=faults)
    with pytest.raises(TrainingError, match="3 steps had a NaN or infinite loss"):
        train(run)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch-")]  # a failed run leaves none behind


def test_overflow_at_the_smallest_scale_ends_the_run(tmp_path: Path) -> None:
    settings = {
        "training": {"precision": "fp16", "total_steps": 12, "nonfinite_budget": 1},
        "optimizer": {"initial_scale_power": 24, "min_loss_scale": 2.0**24},
    }
    with pytest.raises(TrainingError, match="2 steps had a NaN or infinite loss or gradient"):
        train(Run(tmp_path, settings=settings))


def test_a_stopped_fp16_run_continues_bit_for_bit_with_its_scale(tmp_path: Path) -> None:
    whole, parts = Run(tmp_path, "whole", HUGE), Run(tmp_path, "parts", HUGE)
    train(whole)
    with pytest.raises(SystemExit):
        train(parts, stop_after(3))  # in the middle of the search
    train(parts)
    assert_same_checkpoint(whole.output_dir / "step_12", parts.output_dir / "step_12")
    states = [json.loads((run.output_dir / "step_12" / "state.json").read_text()) for run in (whole, parts)]
    for name in ("loss_scale", "loss_scale_steps", "loss_scale_hysteresis"):
        assert states[0]["counters"][name] == states[1]["counters"][name]


def test_fp16_on_two_sharded_ranks(tmp_path: Path) -> None:
    one = Run(tmp_path, "one", HUGE)
    train(one)
    per_rank = {**HUGE["training"], "batch_size": 1}
    two = Run(tmp_path, "two", HUGE | {"training": per_rank, "distributed": {"sharding": "fsdp2"}})
    ddp = Run(tmp_path, "ddp", HUGE | {"training": per_rank})
    assert run_ranks(2, several_runs, (two, ddp), tmp_path / "log") == [0, 0], log_of(tmp_path / "log")
    assert "gradient overflow in fp16" in log_of(tmp_path / "log")
    assert len(one.losses()) > 4
    for run in (two, ddp):
        assert run.losses()[-3:] == pytest.approx(one.losses()[-3:], rel=0.02)


def test_precision_is_understood_by_torchs_names() -> None:
    assert TrainingSection(precision="float16").precision == "fp16"
    assert TrainingSection(precision="bfloat16").precision == "bf16"
    with pytest.raises(ValueError, match="fp16"):
        TrainingSection(precision="fp8")


def test_deepspeeds_fp16_keys() -> None:
    section = {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 500, "hysteresis": 3,
        "min_loss_scale": 0.5,
    }  # fmt: skip
    settings, unused = translate({"fp16": section})
    assert settings["training"] == {"precision": "fp16"}
    optimizer = OptimizerSection(**settings["optimizer"])
    assert (optimizer.initial_scale_power, optimizer.loss_scale_window) == (12, 500)
    assert (optimizer.loss_scale_hysteresis, optimizer.min_loss_scale, optimizer.loss_scale) == (3, 0.5, 0)
    assert unused == []
    settings, unused = translate({"fp16": {**section, "enabled": "auto"}, "bf16": {"enabled": True}})
    assert settings == {"training": {"precision": "bf16"}}
    assert "fp16.initial_scale_power" in unused
