"""Numbers of a run: summed on the device step by step, fetched once per `--log-interval`, shown as one line.

A row is one optimizer step, a float64 vector, already summed over micro batches and ranks:

    [ loss | tokens | run_sum | run_rows | weight | loss_sum K | counted K | supervised K | correct K ]

weight divides loss and gradients: the counted positions of step 0, or what the draft gives instead (`weight_sum`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.log import format_bytes, format_seconds
from specforge_lite.training.optimizer import OVERFLOW
from specforge_lite.types import DraftBatch, StepOutput

NUM_SCALARS, TOKENS_AT, WEIGHT_AT = 5, 1, 4

# A step's loss is a spike when it lies this many median absolute deviations, and this factor, above the median.
SPIKE_HISTORY = 200
SPIKE_MIN_HISTORY = 30
SPIKE_DEVIATIONS = 8.0
SPIKE_FACTOR = 1.5


def output_row(output: StepOutput, batch: DraftBatch) -> Tensor:
    """Sums of one micro batch as a row on its device."""
    device = output.loss.device
    scalars = [
        output.loss.detach().double().view(1),
        torch.full((1,), len(batch), dtype=torch.float64, device=device),
        output.run_sum.double().view(1),
        output.run_rows.double().view(1),
        (output.counted_K[0] if output.weight_sum is None else output.weight_sum).double().view(1),
    ]
    vectors = (output.loss_sum_K, output.counted_K, output.supervised_K, output.correct_K)
    return torch.cat([*scalars, *(vector.double() for vector in vectors)])


def empty_row(num_steps: int, device: torch.device | str) -> Tensor:
    """The row of a rank that had no sample."""
    return torch.zeros(NUM_SCALARS + 4 * num_steps, dtype=torch.float64, device=device)


@dataclass
class PendingStep:
    """One optimizer step whose numbers are still on the device: its row over all ranks, this rank's loss and weight,
    the gradient norm and `UpdateResult.skipped`, one after the other in `values`.

    bad_docs: flags of this rank's samples, True where their hidden states were not finite.
    """

    step: int
    values: Tensor
    bad_docs: list[Tensor]
    sample_ids: list[str]


@dataclass
class StepRecord:
    """One optimizer step on the host: its row, the same on every rank, and this rank's own part of it.

    loss: mean over counted positions; NaN where skipped. verdict: `UpdateResult.skipped`. blamed: this rank's samples
    behind a bad step: those whose hidden states were not finite, else, if this rank's own loss was not, all of them.
    """

    step: int
    row: list[float]
    loss: float
    grad_norm: float
    verdict: float
    local_loss: float
    sample_ids: list[str]
    blamed: list[str]

    @property
    def skipped(self) -> bool:
        return self.verdict != 0

    @property
    def overflow(self) -> bool:
        """Skipped while the fp16 loss scale is searched."""
        return self.verdict == OVERFLOW


def fetch(pending: list[PendingStep]) -> list[StepRecord]:
    """Copy steps to the host; this waits for the device."""
    if not pending:
        return []
    rows = torch.stack([step.values for step in pending]).tolist()
    flags = [flag for step in pending for flag in step.bad_docs]
    bad = iter(torch.cat(flags).tolist() if flags else [])
    records = []
    for step, (*row, local_loss, local_weight, grad_norm, verdict) in zip(pending, rows):
        loss = math.nan if verdict else row[0] / max(1.0, row[WEIGHT_AT])
        broken = [sample_id for sample_id in step.sample_ids if next(bad)]
        blamed = broken or ([] if math.isfinite(local_loss) else step.sample_ids)
        own_loss = local_loss / max(1.0, local_weight)
        records.append(StepRecord(step.step, row, loss, grad_norm, verdict, own_loss, step.sample_ids, blamed))
    return records


def interval_metrics(records: list[StepRecord], num_steps: int) -> dict[str, Any]:
    """Mean loss and gradient norm of steps that were not skipped, and `summarize_sums` of their rows."""
    return {
        "loss": statistics.fmean(record.loss for record in records),
        **summarize_sums([sum(column) for column in zip(*(record.row for record in records))], num_steps),
        "grad_norm": statistics.fmean(record.grad_norm for record in records),
    }


def summarize_sums(values: list[float], num_steps: int) -> dict[str, Any]:
    """Means from sums: per-step loss and accuracy lists, `acc0`, `tau` (1 + mean run of correct steps from step 0)."""
    loss_sum, counted, supervised, correct = (
        values[i : i + num_steps] for i in range(NUM_SCALARS, len(values), num_steps)
    )
    accuracy = [c / max(s, 1) for c, s in zip(correct, supervised)]
    return {
        "step_losses": [total / max(count, 1) for total, count in zip(loss_sum, counted)],
        "accuracies": accuracy,
        "acc0": accuracy[0],
        "tau": 1 + values[2] / max(values[3], 1),
        "supervised_tokens": supervised[0],
    }


class SpikeDetector:
    """Robust outlier test on the losses of the last steps."""

    def __init__(self) -> None:
        self._history: deque[float] = deque(maxlen=SPIKE_HISTORY)

    def is_spike(self, loss: float) -> bool:
        """Judge one loss and remember it; nothing is a spike until enough steps were seen."""
        threshold = float("inf")
        if len(self._history) >= SPIKE_MIN_HISTORY:
            middle = statistics.median(self._history)
            deviation = statistics.median(abs(x - middle) for x in self._history)
            threshold = max(SPIKE_FACTOR * middle, middle + SPIKE_DEVIATIONS * deviation)
        self._history.append(loss)
        return loss > threshold


class Clock:
    """Wall time of an interval, and how much of it was spent waiting for hidden states."""

    def __init__(self) -> None:
        self._started, self._waited_before = time.perf_counter(), 0.0

    def interval(self, waited: float) -> tuple[float, float]:
        """(seconds, share of them waited) since the last call; `waited`: the prefetcher's running total."""
        seconds = time.perf_counter() - self._started
        share = min(1.0, (waited - self._waited_before) / seconds) if seconds > 0 else 0.0
        self._started, self._waited_before = self._started + seconds, waited
        return seconds, share


def memory_bytes(device: torch.device) -> int:
    """Peak memory: of the allocator on CUDA, else the resident set of this process now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def of_end(step: int, end: int | None) -> str:
    """`120/800`, or `120` of a run without an end."""
    return f"{step}" if end is None else f"{step}/{end}"


def step_line(step: int, end: int | None, metrics: dict[str, Any]) -> str:
    """`step 120/800 loss 3.41 acc0 0.52 tau 2.3 tok/s 812 wait 3% mem 1.9G eta 12m`, plus what is out of order."""
    line = (
        f"step {of_end(step, end)} loss {metrics['loss']:.4g} acc0 {metrics['acc0']:.3f} tau {metrics['tau']:.2f}"
        f" tok/s {metrics['tokens_per_second']:.0f} wait {100 * metrics['wait_share']:.0f}%"
        f" mem {format_bytes(metrics['memory_bytes'])}"
    )
    if "eta_seconds" in metrics:
        line += f" eta {format_seconds(metrics['eta_seconds'])}"
    if "rows" in metrics:
        line += f" rows {metrics['rows']:,} ({format_bytes(metrics['bytes_behind'])} behind)"
    if "loss_scale" in metrics:
        line += f" scale {metrics['loss_scale']:g}"
    if "packing_efficiency" in metrics:
        line += f" packed {100 * metrics['packing_efficiency']:.0f}%"
    if metrics["skipped_samples"]:
        line += f" skipped {metrics['skipped_samples']}"
    if metrics["nonfinite_steps"]:
        line += f" non-finite {metrics['nonfinite_steps']}"
    return line + (f" {metrics['engine']}" if metrics.get("engine") else "")
