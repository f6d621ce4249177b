"""Numbers of a run: summed on the device step by step, fetched once per `--log-interval`, shown as one line.

A row is one optimizer step, a float64 vector, already summed over micro batches and ranks:

    [ loss | tokens | run_sum | run_rows | loss_sum K | counted K | supervised K | correct K | grad_norm | skipped ]
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.log import format_bytes, format_seconds
from specforge_lite.training.optimizer import OVERFLOW, UpdateResult
from specforge_lite.types import DraftBatch, StepOutput

NUM_SCALARS = 4
COUNTED_AT = 1  # place of `counted` among the per-step vectors

# A step's loss is a spike when it lies this many median absolute deviations, and this factor, above the median.
SPIKE_HISTORY = 200
SPIKE_MIN_HISTORY = 30
SPIKE_DEVIATIONS = 8.0
SPIKE_FACTOR = 1.5


def output_row(output: StepOutput, batch: DraftBatch) -> Tensor:
    """Sums of one micro batch as a float64 vector on its device, without the two values of the update."""
    device = output.loss.device
    scalars = [
        output.loss.detach().double().view(1),
        torch.full((1,), len(batch), dtype=torch.float64, device=device),
        output.run_sum.double().view(1),
        output.run_rows.double().view(1),
    ]
    vectors = (output.loss_sum_K, output.counted_K, output.supervised_K, output.correct_K)
    return torch.cat([*scalars, *(vector.double() for vector in vectors)])


def empty_row(num_steps: int, device: torch.device) -> Tensor:
    """The row of a rank that had no sample."""
    return torch.zeros(NUM_SCALARS + 4 * num_steps, dtype=torch.float64, device=device)


def counted_in(row: Tensor, num_steps: int) -> Tensor:
    """Counted positions of step 0: the divisor of loss and gradients."""
    return row[NUM_SCALARS + COUNTED_AT * num_steps]


@dataclass
class StepRecord:
    """One optimizer step after it was fetched. `loss` is the mean over counted positions; NaN where skipped."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool
    overflow: bool = False  # skipped while the fp16 loss scale is searched


@dataclass
class IntervalSums:
    """Sums over the steps of one log interval, without skipped ones."""

    values: list[float]
    num_steps: int
    records: list[StepRecord]

    def vector(self, index: int) -> list[float]:
        start = NUM_SCALARS + index * self.num_steps
        return self.values[start : start + self.num_steps]


def summarize_sums(values: list[float], num_steps: int) -> dict[str, Any]:
    """Means from sums: per-step loss and accuracy lists, `acc0`, `tau` (1 + mean run of correct steps from step 0)."""
    part = IntervalSums(values, num_steps, [])
    loss_sum, counted, supervised, correct = (part.vector(i) for i in range(4))
    accuracy = [c / max(s, 1) for c, s in zip(correct, supervised)]
    return {
        "step_losses": [total / max(count, 1) for total, count in zip(loss_sum, counted)],
        "accuracies": accuracy,
        "acc0": accuracy[0],
        "tau": 1 + values[2] / max(values[3], 1),
        "supervised_tokens": supervised[0],
    }


class MetricBuffer:
    """Rows of the steps since the last fetch, on the device, and the sample ids they were made from, on the host."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._rows: list[Tensor] = []
        self._local: list[Tensor] = []
        self._bad_docs: list[list[Tensor]] = []
        self._sample_ids: list[list[str]] = []
        self._steps: list[int] = []

    def add(
        self, step: int, row: Tensor, local_row: Tensor, update: UpdateResult, bad_docs: list[Tensor], ids: list[str]
    ) -> None:
        """Remember one step. `row`: over all ranks; `local_row`: of this rank; `bad_docs`: a flag per sample."""
        device = row.device
        tail = torch.stack([update.grad_norm.to(device).double(), update.skipped.to(device).double()])
        self._rows.append(torch.cat([row, tail]))
        self._local.append(torch.stack([local_row[0], counted_in(local_row, self.num_steps)]))
        self._bad_docs.append(bad_docs)
        self._sample_ids.append(ids)
        self._steps.append(step)

    def __len__(self) -> int:
        return len(self._steps)

    def fetch(self) -> Fetched:
        """Copy everything to the host (this waits for the device) and start anew."""
        rows = torch.stack(self._rows).cpu()
        local = torch.stack(self._local).cpu()
        flags = [flag for docs in self._bad_docs for flag in docs]
        bad = iter(torch.cat(flags).tolist() if flags else [])
        bad_docs = [[next(bad) for _ in ids] for ids in self._sample_ids]
        fetched = Fetched(self.num_steps, self._steps, rows, local, self._sample_ids, bad_docs)
        self.__init__(self.num_steps)  # type: ignore[misc]
        return fetched


@dataclass
class Fetched:
    """Host copies of a log interval. rows [steps, 4+4K+2], local [steps, 2] (loss and counted of this rank)."""

    num_steps: int
    steps: list[int]
    rows: Tensor
    local: Tensor
    sample_ids: list[list[str]]
    bad_docs: list[list[bool]]

    @property
    def records(self) -> list[StepRecord]:
        """One per step, the same on every rank."""
        found = []
        for step, row in zip(self.steps, self.rows):
            skipped = bool(row[-1])
            count = max(1.0, float(counted_in(row, self.num_steps)))
            loss, overflow = float("nan") if skipped else float(row[0]) / count, float(row[-1]) == OVERFLOW
            found.append(StepRecord(step, loss, float(row[-2]), skipped, overflow))
        return found

    def sums(self) -> IntervalSums:
        """Add up the steps that were not skipped."""
        good = self.rows[self.rows[:, -1] == 0][:, :-2]
        return IntervalSums(good.sum(0).tolist(), self.num_steps, self.records)

    def tokens(self) -> float:
        """Tokens of all steps, skipped ones included."""
        return float(self.rows[:, 1].nan_to_num().sum())

    def blame(self, index: int) -> list[str]:
        """This rank's samples behind a bad step: those whose hidden states were not finite, else, if this rank's own
        loss was not finite, all of its samples; else none."""
        ids, flags = self.sample_ids[index], self.bad_docs[index]
        guilty = [sample_id for sample_id, bad in zip(ids, flags) if bad]
        if guilty:
            return guilty
        return [] if bool(torch.isfinite(self.local[index, 0])) else ids

    def local_loss(self, index: int) -> float:
        """Mean loss of this rank's own samples in a step."""
        return float(self.local[index, 0]) / max(1.0, float(self.local[index, 1]))


class SpikeDetector:
    """Robust outlier test on the losses of the last steps."""

    def __init__(self) -> None:
        self._history: deque[float] = deque(maxlen=SPIKE_HISTORY)

    def is_spike(self, loss: float) -> bool:
        """Judge one loss and remember it."""
        spike = loss > self.threshold()
        self._history.append(loss)
        return spike

    def threshold(self) -> float:
        """Losses above this are spikes; infinite until enough steps were seen."""
        if len(self._history) < SPIKE_MIN_HISTORY:
            return float("inf")
        middle = statistics.median(self._history)
        deviation = statistics.median(abs(x - middle) for x in self._history)
        return max(SPIKE_FACTOR * middle, middle + SPIKE_DEVIATIONS * deviation)


@dataclass
class Clock:
    """Wall time of an interval, and how much of it was spent waiting for hidden states."""

    started: float = field(default_factory=time.perf_counter)
    waited_before: float = 0.0

    def interval(self, waited: float) -> tuple[float, float]:
        """(seconds, share of them waited) since the last call; `waited`: the prefetcher's running total."""
        now = time.perf_counter()
        seconds, share = now - self.started, 0.0
        if seconds > 0:
            share = min(1.0, (waited - self.waited_before) / seconds)
        self.started, self.waited_before = now, waited
        return seconds, share


def memory_bytes(device: torch.device) -> int:
    """Peak memory: of the allocator on CUDA, else the resident set of this process now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def step_line(step: int, total_steps: int, metrics: dict[str, Any]) -> str:
    """`step 120/800 loss 3.41 acc0 0.52 tau 2.3 tok/s 812 wait 3% mem 1.9G eta 12m`, plus what is out of order."""
    line = (
        f"step {step}/{total_steps} loss {metrics['loss']:.4g} acc0 {metrics['acc0']:.3f} tau {metrics['tau']:.2f}"
        f" tok/s {metrics['tokens_per_second']:.0f} wait {100 * metrics['wait_share']:.0f}%"
        f" mem {format_bytes(metrics['memory_bytes'])} eta {format_seconds(metrics['eta_seconds'])}"
    )
    if "loss_scale" in metrics:
        line += f" scale {metrics['loss_scale']:g}"
    if "packing_efficiency" in metrics:
        line += f" packed {100 * metrics['packing_efficiency']:.0f}%"
    if metrics["skipped_samples"]:
        line += f" skipped {metrics['skipped_samples']}"
    if metrics["nonfinite_steps"]:
        line += f" non-finite {metrics['nonfinite_steps']}"
    return line + (f" {metrics['engine']}" if metrics.get("engine") else "")
