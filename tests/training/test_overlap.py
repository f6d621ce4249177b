"""The trace of a run shows captures in threads of their own while the training step runs, and where copies happen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_lite.training.dataloader import BatchMaker
from tests.fake_engine import FakeEngine
from tests.training_runs import INFO, Run, make_dataset, make_head, train

Range = tuple[int, float, float]  # thread, start, end in microseconds


def ranges_of(trace: dict[str, Any], name: str) -> list[Range]:
    found = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e["name"] == name]
    return [(e["tid"], e["ts"], e["ts"] + e["dur"]) for e in found]


def overlap(first: Range, second: Range) -> float:
    """Microseconds that both share, in different threads."""
    return max(0.0, min(first[2], second[2]) - max(first[1], second[1])) if first[0] != second[0] else 0.0


def test_captures_run_while_steps_do(tmp_path: Path) -> None:
    settings = {"training": {"total_steps": 8, "batch_size": 4, "profile_start_step": 3, "profile_num_steps": 5}}
    run = Run(tmp_path, settings=settings, latency_s=0.01)
    train(run)
    trace = json.loads((run.output_dir / "trace_rank0.json").read_text())
    captures, steps = ranges_of(trace, "capture"), ranges_of(trace, "training step")
    copies = ranges_of(trace, "copy to device")
    assert len(steps) == len(copies) == 5
    assert captures
    assert {tid for tid, _, _ in steps} == {tid for tid, _, _ in copies}
    assert not {tid for tid, _, _ in captures} & {tid for tid, _, _ in steps}
    shared = sum(overlap(capture, step) for capture in captures for step in steps)
    assert shared > 5_000  # half of one capture's latency at least
    for copy in copies:  # the batch of a step is made when the step asks for it
        assert any(start <= copy[1] and copy[2] <= end for _, start, end in steps)


@pytest.mark.gpu
def test_batches_copied_on_a_stream_of_their_own_are_the_same(tmp_path: Path) -> None:
    """Many in a row, while the device is busy: a batch must neither be read too early nor overwritten too soon."""
    data, engine, device = make_dataset(tmp_path / "data"), FakeEngine(INFO), torch.device("cuda")
    samples = [data[i] for i in range(24)]
    states = engine.capture(samples)
    plain = BatchMaker(make_head(), 3, torch.device("cpu"), torch.float32)
    maker = BatchMaker(make_head().to(device), 3, device, torch.float32)
    busy = torch.randn(4096, 4096, device=device)
    for first in range(20):
        busy = busy @ busy / 64
        batch, expected = (make(samples[first:], states[first:]) for make in (maker, plain))
        sums = batch.aux_NG.sum(1), batch.last_NH.sum(1)
        torch.testing.assert_close(sums[0].cpu(), expected.aux_NG.sum(1))
        torch.testing.assert_close(sums[1].cpu(), expected.last_NH.sum(1))
