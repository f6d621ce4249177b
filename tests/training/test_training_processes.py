"""Runs in processes of their own: ranks agree, failures are told by the rank that failed, kills lose nothing."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.checkpoints.training_run import verify_checkpoint
from specforge_lite.training.dataloader import Dataloader, StepBatches
from specforge_lite.training.failures import BEAT_SECONDS
from specforge_lite.training.loop import Trainer
from tests.fake_engine import Fault
from tests.training_runs import Run, run_ranks, run_script, start_ranks, train, wait

SHARED_SETTINGS: dict[str, dict[str, Any]] = {
    "training": {"batch_size": 1, "total_steps": 10},
    "checkpoint": {"save_interval": 5},
}


def log_of(directory: Path, rank: int = 0) -> str:
    return (directory / f"rank_{rank}.log").read_text()


def same_bytes(left: Path, right: Path) -> bool:
    names = ("draft.safetensors", "optimizer.safetensors", "rng.safetensors")
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


# --------------------------------------------------------------------------------------------------------------- ranks


def several_runs(*runs: Run) -> None:
    """Runs one after the other in the same ranks (each makes and destroys its process group)."""
    for number, run in enumerate(runs):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
        train(run)


def test_two_ranks_train_as_one_does_whatever_the_sharding(tmp_path: Path) -> None:
    """ddp, fsdp2, and a resume of a single process's checkpoint on two sharded ranks."""
    one = Run(tmp_path, "one", {**SHARED_SETTINGS, "training": {"batch_size": 2, "total_steps": 10}})
    train(one)
    ddp = Run(tmp_path, "ddp", SHARED_SETTINGS)
    fsdp = Run(tmp_path, "fsdp", {**SHARED_SETTINGS, "distributed": {"sharding": "fsdp2"}})
    moved = Run(tmp_path, "moved", {**SHARED_SETTINGS, "distributed": {"sharding": "fsdp2"}})
    subprocess.run(["cp", "-r", one.output_dir, moved.output_dir], check=True)
    subprocess.run(["rm", "-r", moved.output_dir / "step_10"], check=True)
    assert run_ranks(2, several_runs, (ddp, fsdp, moved), tmp_path / "log") == [0, 0], log_of(tmp_path / "log")
    assert "resumed on 2 rank(s), saved by 1" in log_of(tmp_path / "log")
    evaluation = next(row for row in one.metrics() if "eval/tau_walk" in row)
    for run in (ddp, fsdp, moved):
        assert run.losses() == pytest.approx(one.losses(), rel=1e-5)
        other = next(row for row in run.metrics() if "eval/tau_walk" in row)
        assert other["eval/accuracy"] == pytest.approx(evaluation["eval/accuracy"])
        assert other["eval/tau_walk"] == pytest.approx(evaluation["eval/tau_walk"])
    # and back: what two sharded ranks saved continues in one process
    back = Run(tmp_path, "fsdp", {"training": {"batch_size": 2, "total_steps": 12}})
    longer = Run(tmp_path, "one", {"training": {"batch_size": 2, "total_steps": 12}})
    train(back)
    train(longer)
    assert back.losses()[-2:] == pytest.approx(longer.losses()[-2:], rel=1e-4)


class ShortDataloader(Dataloader):
    """A loader that ends after three steps."""

    def __init__(self, whole: Dataloader) -> None:
        self.__dict__ = whole.__dict__
        self._left = 3

    def __next__(self) -> StepBatches:
        self._left -= 1
        if self._left < 0:
            raise StopIteration
        return super().__next__()


def end_early(run: Run) -> None:
    """Rank 1 runs out of data after three steps."""

    def change(trainer: Trainer) -> None:
        if os.environ["RANK"] == "1":
            trainer.dataloader = ShortDataloader(trainer.dataloader)

    summary = train(run, change)
    assert (summary.reason, summary.step) == ("out of data", 3)


def test_ranks_with_different_numbers_of_batches_end_together(tmp_path: Path) -> None:
    run = Run(tmp_path, "short", SHARED_SETTINGS)
    assert run_ranks(2, end_early, (run,), tmp_path / "log") == [0, 0], log_of(tmp_path / "log", 1)
    verify_checkpoint(run.output_dir / "step_3")


def fault_on_rank_1(run: Run, kind: str) -> None:
    def change(trainer: Trainer) -> None:
        original = trainer.train_step

        def train_step(batches: Any) -> None:
            if os.environ["RANK"] == "1" and trainer.progress.step == 2:
                time.sleep(3 * BEAT_SECONDS)  # as a step of a real draft takes
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif kind == "hang":
                    time.sleep(600)
                raise ValueError("a bug of rank 1")
            original(batches)

        trainer.train_step = train_step  # type: ignore[method-assign]

    train(run, change)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raise", "rank 0: stopped, because rank 1 failed: ValueError: a bug of rank 1"),
        ("kill", "rank 0: stopped, because a rank ended without an error message .*: rank 1, last seen in step 2"),
        ("hang", "rank 0: stopped after waiting for --dist-timeout: rank 1 hangs in step 2"),
    ],
    ids=["raise", "kill", "hang"],
)
def test_one_bad_rank_stops_the_others_and_is_named(tmp_path: Path, kind: str, message: str) -> None:
    run = Run(tmp_path, kind, {**SHARED_SETTINGS, "distributed": {"dist_timeout": 0.08 if kind == "hang" else 1.0}})
    start = time.monotonic()
    processes = start_ranks(2, fault_on_rank_1, (run, kind), tmp_path / "log")
    processes[0].join(40)
    assert processes[0].exitcode == 1, log_of(tmp_path / "log")
    assert time.monotonic() - start < 40  # a broken connection is noticed at once, a silent rank after the 5 seconds
    if kind == "hang":
        processes[1].kill()
    wait(processes)
    first, second = log_of(tmp_path / "log"), log_of(tmp_path / "log", 1)
    assert re.search(message, first)
    assert "Traceback" not in first
    if kind == "raise":  # the rank with the bug shows it, with its place
        assert "rank 1: Traceback" in second
        assert "ValueError: a bug of rank 1" in second
        assert processes[1].exitcode == 1


# --------------------------------------------------------------------------------------------------------------- kills


def slow_run(tmp_path: Path, name: str, **faults: Fault) -> Run:
    settings = {"training": {"total_steps": 24}, "checkpoint": {"save_interval": 3, "save_total_limit": 2}}
    return Run(tmp_path, name, settings, latency_s=0.01, faults=faults)


def wait_for_step(run: Run, step: int, process: Any) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.is_alive():
        if checkpoint_steps(run) and max(checkpoint_steps(run)) >= step:
            return
        time.sleep(0.002)


def checkpoint_steps(run: Run) -> list[int]:
    return [int(path.name.split("_")[1]) for path in run.output_dir.glob("step_*")]


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = slow_run(tmp_path, "whole")
    train(whole)
    killed = slow_run(tmp_path, "killed")
    generator = random.Random(3)
    for step in (3, 9, 15):
        process = start_ranks(1, train, (killed,), tmp_path / "log")[0]
        wait_for_step(killed, step, process)
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert run_ranks(1, train, (killed,), tmp_path / "log") == [0], log_of(tmp_path / "log")
    assert same_bytes(whole.output_dir / "step_24", killed.output_dir / "step_24")
    assert killed.losses() == whole.losses()
    assert sorted(p.name for p in killed.output_dir.glob("*step_*")) == ["step_21", "step_24"]
    assert json.loads((killed.output_dir / "exit_summary.json").read_text())["restarts"] == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_current_step_and_exits(tmp_path: Path, number: int, code: int) -> None:
    run = slow_run(tmp_path, "run")
    process = start_ranks(1, train, (run,), tmp_path / "log")[0]
    wait_for_step(run, 3, process)
    os.kill(process.pid or 0, signal.SIGUSR1)  # a stack dump on the way, harmless
    os.kill(process.pid or 0, number)
    assert wait([process]) == [code]
    summary = json.loads((run.output_dir / "exit_summary.json").read_text())
    assert summary["reason"] == f"stopped by {signal.Signals(number).name}"
    assert summary["last_checkpoint"] == str(run.output_dir / f"step_{summary['step']}")
    verify_checkpoint(run.output_dir / f"step_{summary['step']}")
    assert "most recent call first" in log_of(tmp_path / "log")
    assert json.loads((run.output_dir / "heartbeat.json").read_text())["step"] == summary["step"]


def limited(run: Run, num_bytes: int) -> None:
    """Writes beyond `num_bytes` per file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(run)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, settings={"training": {"total_steps": 3}})
    train(run)
    longer = Run(tmp_path, settings={"training": {"total_steps": 6}})
    assert run_ranks(1, limited, (longer, 20_000), tmp_path / "log") == [1]
    assert re.search(r"CheckpointError: .*step_6: not saved: ", log_of(tmp_path / "log"))
    assert [path.name for path in run.output_dir.glob("*step_*")] == ["step_3"]
    verify_checkpoint(run.output_dir / "step_3")
    train(longer)


# -------------------------------------------------------------------------------------------------------------- script


def test_the_script_trains_on_the_tiny_target_and_continues(tmp_path: Path, tiny_target: Path) -> None:
    rows = [
        {
            "id": f"r{i}",
            "conversations": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * i}],
        }
        for i in range(1, 9)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--target-model-path", str(tiny_target), "--target-backend", "hf", "--train-data-path", str(data),
        "--eval-data-path", str(data), "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "out"),
        "--max-length", "64", "--ttt-length", "3", "--log-interval", "1", "--profile-start-step", "2",
        "--profile-num-steps", "1",
    ]  # fmt: skip
    script = partial(run_script, "scripts/train_eagle3_online.py", directory=tmp_path)
    first = script([*flags, "--total-steps", "3"], WANDB_API_KEY="s3cret" * 7)
    assert first.returncode == 0, first.stderr
    assert re.search(r"step 3/3 loss [\d.]+ acc0 [\d.]+ tau [\d.]+ tok/s \d+ wait \d+% mem \w+ eta 0s", first.stdout)
    second = script([*flags, "--num-epochs", "1"])
    assert second.returncode == 0, second.stderr
    assert "resuming with other settings: num_epochs None -> 1, total_steps 3 -> None" in second.stdout
    assert "ended: finished at step 8/8" in second.stdout
    checkpoint = tmp_path / "out" / "step_8"
    verify_checkpoint(checkpoint)
    provenance = json.loads((checkpoint / "provenance.json").read_text())
    assert provenance["command"][0] == "train_eagle3_online.py"
    assert "s3cret" not in "".join(p.read_text() for p in checkpoint.glob("*.json"))
    assert json.loads((tmp_path / "out" / "trace_rank0.json").read_text())["traceEvents"]

    wrong = script([*flags, "--total-steps", "9", "--draft-vocab-size", "100"])
    assert wrong.returncode == 2
    last_line = wrong.stderr.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert "draft.draft_vocab_size was 4096, this run has 100" in last_line


def test_config_mistakes_end_the_script_with_code_2(tmp_path: Path) -> None:
    result = run_script("scripts/train_eagle3_online.py", ["--batch-size", "0", "--trian-data-path", "x"], tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for part in ("--trian-data-path: unknown flag", "target_model_path: required", "output_dir: required"):
        assert part in result.stderr
