"""Long runs: memory, file handles, live objects and time per step stay flat over 20,000 training steps, and 100,000
prompts are regenerated in bounded memory. Both belong to `make stress`; a short run of the first is in `make test`.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.training.loop import Trainer
from tests.training_runs import Run, start_ranks, train, wait

ROOT = Path(__file__).resolve().parents[2]
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Sample:
    """One look at the process. cpu_seconds: of all its threads since the last look, per step."""

    step: int
    rss_bytes: int
    handles: int
    threads: int
    objects: int
    cpu_seconds: float


class Watch:
    """Looks at the own process every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples: list[Sample] = []
        self._cpu = time.process_time()

    def __call__(self, step: int) -> None:
        if step % self.every:
            return
        now = time.process_time()
        gc.collect()
        with open("/proc/self/statm") as file:
            rss = int(file.read().split()[1]) * PAGE_BYTES
        per_step = (now - self._cpu) / self.every
        objects = len(gc.get_objects())
        handles = len(os.listdir("/proc/self/fd"))
        self.samples.append(Sample(step, rss, handles, threading.active_count(), objects, per_step))
        self._cpu = time.process_time()


def watched(run: Run, every: int, report: Path) -> None:
    """Train, and write what was seen to `report`."""
    watch = Watch(every)

    def change(trainer: Trainer) -> None:
        original = trainer.train_step

        def train_step(batches: Any) -> None:
            original(batches)
            watch(trainer.progress.step)

        trainer.train_step = train_step  # type: ignore[method-assign]

    summary = train(run, change)
    assert summary.reason == "finished"
    report.write_text(json.dumps([asdict(sample) for sample in watch.samples]))


def run_watched(tmp_path: Path, steps: int, every: int, timeout_s: float) -> list[Sample]:
    """A run with evaluations, checkpoints, skipped samples and a log file, as long runs have them."""
    settings: dict[str, dict[str, Any]] = {
        "training": {"total_steps": steps, "batch_size": 2, "ttt_length": 2, "eval_interval": max(1, steps // 10)},
        "checkpoint": {"save_interval": max(1, steps // 20), "save_total_limit": 2},
        "logging": {"log_interval": 10, "log_file": str(tmp_path / "log.jsonl")},
        "distributed": {"dist_timeout": 20.0},
    }
    run = Run(tmp_path, settings=settings)
    report = tmp_path / "report.json"
    started = time.monotonic()
    codes = wait(start_ranks(1, watched, (run, every, report), tmp_path / "log"), timeout_s)
    assert codes == [0], (tmp_path / "log" / "rank_0.log").read_text()[-3000:]
    assert time.monotonic() - started < timeout_s
    return [Sample(**values) for values in json.loads(report.read_text())]


def median(samples: list[Sample], name: str) -> float:
    return statistics.median(getattr(sample, name) for sample in samples)


def test_handles_threads_and_objects_stay_flat_over_a_short_run(tmp_path: Path) -> None:
    samples = run_watched(tmp_path, 360, 30, 120)
    early, late = samples[4:8], samples[8:]
    assert max(s.handles for s in late) <= max(s.handles for s in early)
    assert max(s.threads for s in late) <= max(s.threads for s in early)
    assert median(late, "objects") < 1.01 * median(early, "objects")


@pytest.mark.stress
@pytest.mark.timeout(1500)
def test_twenty_thousand_steps_stay_flat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = run_watched(tmp_path, 20_000, 200, 1400)
    early, late = samples[10:20], samples[-10:]  # warm-up: the first 2,000 steps
    growth = median(late, "rss_bytes") / median(early, "rss_bytes") - 1
    # The fastest 200 steps of each quarter: other programs on the machine make steps slower, never faster.
    first, last = (min(s.cpu_seconds for s in part) for part in (samples[10:35], samples[-25:]))
    pace = last / first - 1
    objects = median(late, "objects") / median(early, "objects") - 1
    with capsys.disabled():
        print(
            f"\n20,000 steps: memory {median(early, 'rss_bytes') / 2**20:.1f} MiB {growth:+.2%},"
            f" handles {max(s.handles for s in early)} -> {max(s.handles for s in late)}, objects {objects:+.2%},"
            f" CPU per step {1000 * first:.2f} ms {pace:+.1%}"
        )
    assert growth < 0.01
    assert objects < 0.01
    assert max(s.handles for s in samples[20:]) <= max(s.handles for s in early)
    assert max(s.threads for s in samples[20:]) <= max(s.threads for s in early)
    assert pace < 0.1


@pytest.mark.stress
@pytest.mark.timeout(1500)
def test_a_hundred_thousand_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """512 in flight against a server with latency and errors: bounded memory, nothing lost or doubled, within 10% of
    the ideal time (benchmarks/bench_regeneration.py checks all four and fails otherwise)."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_regeneration.py"), "--num-prompts", "100000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, cwd=ROOT)
    with capsys.disabled():
        print("\n" + done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]
