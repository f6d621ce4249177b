"""AdamW with 8-bit moments: close to fp32 AdamW, a quarter of the memory, saved and loaded like it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specforge_lite.checkpoints.training_run import SavedState
from specforge_lite.model.draft import DraftConfig
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.training.checkpoint import Resume, load_tensors, save_checkpoint
from specforge_lite.training.distributed import World
from specforge_lite.training.optimizer import DraftOptimizer
from specforge_lite.training.parallel import ReplicatedDraft
from specforge_lite.training.settings import OptimizerSection
from tests.training.test_training_processes import log_of, several_runs
from tests.training_runs import Run, run_ranks, train

pytestmark = pytest.mark.adam8bit
ONE = World(0, 1, torch.device("cpu"), 60.0)
SETTINGS = {"learning_rate": 0.01, "warmup_steps": 0, "lr_schedule": "constant", "weight_decay": 0.1}


def make_pair(optim: str, shape: tuple[int, int] = (64, 128)) -> tuple[dict[str, torch.Tensor], DraftOptimizer]:
    torch.manual_seed(0)
    parameters = {"matrix": torch.nn.Parameter(torch.randn(shape)), "vector": torch.nn.Parameter(torch.randn(8))}
    config = OptimizerSection.model_validate({**SETTINGS, "optim": optim})
    return dict(parameters), DraftOptimizer(dict(parameters), config, total_steps=50)


def update(optimizer: DraftOptimizer, step: int, bad: bool = False) -> float:
    """One step on gradients that depend on the step only; summed over 7 positions."""
    generator = torch.Generator().manual_seed(step)
    squares = torch.zeros(())
    for parameter in optimizer.parameters.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = 7 * (0.3 * noise + parameter.detach())
        squares = squares + parameter.grad.square().sum()
    count, loss = torch.tensor(7.0), torch.tensor(float("nan") if bad else 1.0)
    return optimizer.step(step, count, loss, squares).skipped.item()


def test_updates_are_close_to_those_of_fp32_moments() -> None:
    (ours, eight), (plain, full) = make_pair("adamw_8bit"), make_pair("adamw")
    start = plain["matrix"].detach().clone()
    for step in range(25):
        assert update(eight, step) == update(full, step) == 0
    moved, error = (plain["matrix"] - start).abs().mean(), (plain["matrix"] - ours["matrix"]).abs().mean()
    assert moved > 0.1
    assert error < 0.03 * moved
    assert error > 0  # it is another optimizer
    torch.testing.assert_close(ours["vector"], plain["vector"], rtol=1e-4, atol=1e-5)  # small tensors stay fp32


def test_state_takes_a_quarter_of_the_memory() -> None:
    _, optimizer = make_pair("adamw_8bit", (256, 512))
    state = optimizer.state_tensors()["matrix"]
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    kept = sum(x.codes.nbytes + x.scale.nbytes + x.qmap.nbytes for x in moments)  # type: ignore[attr-defined]
    assert kept < 0.27 * 8 * 256 * 512
    assert all(type(x) is torch.Tensor for x in optimizer.saved_tensors()["matrix"].values())


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    parameters, optimizer = make_pair("adamw_8bit")
    update(optimizer, 0)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    states = {name: {k: v.clone() for k, v in s.items()} for name, s in optimizer.saved_tensors().items()}
    assert update(optimizer, 1, bad=True) == 1
    for name in before:
        assert torch.equal(parameters[name], before[name])
        assert all(torch.equal(optimizer.saved_tensors()[name][k], v) for k, v in states[name].items())


def make_training(optim: str) -> tuple[ReplicatedDraft, DraftOptimizer]:
    config = DraftConfig(64, 128, 4, 2, 200, 100)
    t2d = torch.zeros(200, dtype=torch.bool)
    t2d[:100] = True
    draft = build_draft(config, torch.zeros(100, dtype=torch.int64), t2d)
    init_random(draft)
    parallel = ReplicatedDraft(draft, ONE)
    return parallel, DraftOptimizer(
        parallel.parameters, OptimizerSection.model_validate({**SETTINGS, "optim": optim}), 9
    )


@pytest.mark.parametrize("other", ["adamw", "adamw_8bit"])
def test_checkpoints_move_between_both(tmp_path: Path, other: str) -> None:
    parallel, optimizer = make_training("adamw_8bit")
    for step in range(3):
        update(optimizer, step)
    state = SavedState(3, {}, {}, 1)
    documents = {"draft_config.json": parallel.draft.config.to_dict()}
    path = save_checkpoint(tmp_path, state, parallel, optimizer, ONE, documents, None)
    loaded, reader = make_training(other)
    tensors = load_file(path / "draft.safetensors") | load_file(path / "optimizer.safetensors")
    steps = {name: float(tensors[f"step.{name}"]) for name in loaded.parameters}
    load_tensors(Resume(path, state, steps, tensors=tensors), loaded, reader, ONE)
    saved, found = optimizer.saved_tensors(), reader.saved_tensors()
    for name, moments in saved.items():
        assert torch.equal(loaded.parameters[name], parallel.parameters[name])
        assert found[name]["step"].item() == 3
        for kind in ("exp_avg", "exp_avg_sq"):  # blocks are quantised anew: up to a step of their scale
            largest = moments[kind].abs().max()
            assert (found[name][kind] - moments[kind]).abs().max() <= (0.02 if other == "adamw_8bit" else 0) * largest


def test_runs_with_8_bit_moments_train(tmp_path: Path) -> None:
    """On one rank, and sharded over two."""
    settings = {"optimizer": {"optim": "adamw_8bit"}}
    plain, one = Run(tmp_path, "plain"), Run(tmp_path, "one", settings)
    train(plain)
    train(one)
    assert one.losses() == pytest.approx(plain.losses(), rel=1e-3)
    sharded = settings | {"distributed": {"sharding": "fsdp2"}, "training": {"batch_size": 1}}
    two = Run(tmp_path, "two", sharded)
    assert run_ranks(2, several_runs, (two,), tmp_path / "log") == [0, 0], log_of(tmp_path / "log")
    assert two.losses() == pytest.approx(plain.losses(), rel=1e-3)
