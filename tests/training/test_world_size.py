"""Several processes: 2 to 4 ranks over gloo end together, name the rank that fails, and continue each other's runs."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.checkpoints.training_run import verify_checkpoint
from specforge_lite.training.dataloader import Dataloader, StepBatches
from specforge_lite.training.loop import Trainer
from tests.training_runs import Run, run_ranks, start_ranks, train, wait

FIRST_STEPS, LAST_STEP = 6, 56
SAMPLES_PER_STEP = 4


def settings(world_size: int, steps: int) -> dict[str, dict[str, Any]]:
    """The same samples in every step, whatever the number of ranks."""
    return {
        "training": {"batch_size": SAMPLES_PER_STEP // world_size, "total_steps": steps},
        "optimizer": {"lr_schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-3},
        "distributed": {"dist_timeout": 1.0},
    }


def log_of(directory: Path, rank: int = 0) -> str:
    return (directory / f"rank_{rank}.log").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`start`: what one process trained, and `one`, `longer`: what it went on to."""
    root = tmp_path_factory.mktemp("alone")
    before = ""
    for name, steps in (("start", FIRST_STEPS), ("one", LAST_STEP), ("longer", LAST_STEP + 4)):
        if before:
            shutil.copytree(root / before, root / name)
        train(Run(root, name, settings(1, steps)))
        before = name
    return root


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_resume_on_another_world_size_gives_the_same_losses_over_50_steps(
    alone: Path, tmp_path: Path, world_size: int
) -> None:
    """One process trains, `world_size` ranks continue; and back. fp32 sums in another order, nothing else."""
    one, longer = Run(alone, "one"), Run(alone, "longer")
    many = Run(tmp_path, "many", settings(world_size, LAST_STEP))
    shutil.copytree(alone / "start", many.output_dir)
    assert run_ranks(world_size, train, (many,), tmp_path / "log") == [0] * world_size, log_of(tmp_path / "log")
    assert f"resumed on {world_size} rank(s), saved by 1" in log_of(tmp_path / "log")
    assert len(one.losses()) == LAST_STEP
    assert one.losses()[-1] < 0.9 * one.losses()[0]  # something was learnt, so the comparison means something
    assert many.losses() == pytest.approx(one.losses(), rel=2e-5)
    # and back: what several ranks saved continues in one process
    back = Run(tmp_path, "many", settings(1, LAST_STEP + 4))
    train(back)
    assert back.losses()[-4:] == pytest.approx(longer.losses()[-4:], rel=2e-5)


class ShortDataloader(Dataloader):
    """A loader that ends after some steps."""

    def __init__(self, whole: Dataloader, steps: int) -> None:
        self.__dict__ = whole.__dict__
        self._left = steps

    def __next__(self) -> StepBatches:
        self._left -= 1
        if self._left < 0:
            raise StopIteration
        return super().__next__()


def uneven(run: Run) -> None:
    """Rank r runs out of data after 9 - 2 r steps."""

    def change(trainer: Trainer) -> None:
        trainer.dataloader = ShortDataloader(trainer.dataloader, 9 - 2 * int(os.environ["RANK"]))

    summary = train(run, change)
    assert (summary.reason, summary.step) == ("out of data", 3)


def test_four_ranks_with_different_numbers_of_batches_end_together(tmp_path: Path) -> None:
    run = Run(tmp_path, "uneven", settings(4, 20))
    assert run_ranks(4, uneven, (run,), tmp_path / "log") == [0] * 4, log_of(tmp_path / "log", 3)
    verify_checkpoint(run.output_dir / "step_3")


def one_raises(run: Run) -> None:
    def change(trainer: Trainer) -> None:
        original = trainer.train_step

        def train_step(batches: Any) -> None:
            if os.environ["RANK"] == "2" and trainer.progress.step == 2:
                raise ValueError("a bug of rank 2")
            original(batches)

        trainer.train_step = train_step  # type: ignore[method-assign]

    train(run, change)


def test_one_of_four_ranks_raises_and_all_others_say_so(tmp_path: Path) -> None:
    run = Run(tmp_path, "raise", settings(4, 20))
    start = time.monotonic()
    codes = wait(start_ranks(4, one_raises, (run,), tmp_path / "log"))
    assert codes == [1] * 4
    assert time.monotonic() - start < 60 * run.config().distributed.dist_timeout
    logs = [log_of(tmp_path / "log", rank) for rank in range(4)]
    assert "rank 2: Traceback" in logs[2]
    assert "ValueError: a bug of rank 2" in logs[2]
    for rank in (0, 1, 3):
        assert re.search(f"rank {rank}: stopped, because rank 2 failed: ValueError: a bug of rank 2", logs[rank])
        assert "Traceback" not in logs[rank]
