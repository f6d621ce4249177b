"""Numbers of a run: summed on the device step by step, fetched once per `--log-interval`, shown as one line.

A row is one optimizer step, a float64 vector, already summed over micro batches and ranks:

    [ loss | tokens | run_sum | run_rows | weight | loss_sum K | counted K | supervised K | correct K ]

weight divides loss and gradients: the counted positions of step 0, or what the draft gives instead (`weight_sum`).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.log import format_bytes, format_seconds
from specforge_lite.training.optimizer import OVERFLOW, UpdateResult
from specforge_lite.types import DraftBatch, StepOutput

NUM_SCALARS = 5
WEIGHT_AT = 4

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


def empty_row(num_steps: int, device: torch.device) -> Tensor:
    """The row of a rank that had no sample."""
    return torch.zeros(NUM_SCALARS + 4 * num_steps, dtype=torch.float64, device=device)


@dataclass
class StepRecord:
    """One optimizer step after it was fetched: its row, the same on every rank, and this rank's own part of it.

    loss: mean over counted positions; NaN where skipped. verdict: `UpdateResult.skipped`.
    bad_docs: one flag per sample, True where its hidden states were not finite.
    """

    step: int
    row: list[float]
    loss: float
    grad_norm: float
    verdict: float
    local_loss: float
    sample_ids: list[str]
    bad_docs: list[bool]

    @property
    def skipped(self) -> bool:
        return self.verdict != 0

    @property
    def overflow(self) -> bool:
        """Skipped while the fp16 loss scale is searched."""
        return self.verdict == OVERFLOW

    def blame(self) -> list[str]:
        """This rank's samples behind a bad step: those whose hidden states were not finite, else, if this rank's own
        loss was not finite, all of its samples; else none."""
        broken = [sample_id for sample_id, bad in zip(self.sample_ids, self.bad_docs) if bad]
        return broken or ([] if self.local_loss - self.local_loss == 0 else self.sample_ids)


class MetricBuffer:
    """Rows of the steps since the last fetch, on the device, and the sample ids they were made from, on the host."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._pending: list[tuple[int, Tensor, list[Tensor], list[str]]] = []

    def add(
        self, step: int, row: Tensor, local_row: Tensor, update: UpdateResult, bad_docs: list[Tensor], ids: list[str]
    ) -> None:
        """Remember one step. `row`: over all ranks; `local_row`: of this rank; `bad_docs`: a flag per sample."""
        device = row.device
        local = torch.stack([local_row[0], local_row[WEIGHT_AT]])
        tail = torch.stack([update.grad_norm.to(device).double(), update.skipped.to(device).double()])
        self._pending.append((step, torch.cat([row, local, tail]), bad_docs, ids))

    def fetch(self) -> list[StepRecord]:
        """Copy everything to the host (this waits for the device) and start anew."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        rows = torch.stack([row for _, row, _, _ in pending]).cpu()
        flags = [flag for _, _, bad_docs, _ in pending for flag in bad_docs]
        bad = iter(torch.cat(flags).tolist() if flags else [])
        records = []
        for (step, _, _, ids), values in zip(pending, rows):
            *row, local_loss, local_count, grad_norm, verdict = values.tolist()
            loss = float("nan") if verdict else row[0] / max(1.0, row[WEIGHT_AT])
            own_loss = local_loss / max(1.0, local_count)
            records.append(StepRecord(step, row, loss, grad_norm, verdict, own_loss, ids, [next(bad) for _ in ids]))
        return records


class MeanOver:
    """Host sums over the steps of a log interval or an epoch, without skipped ones."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self.good: list[StepRecord] = []
        self.sums = [0.0] * (NUM_SCALARS + 4 * num_steps)
        self.tokens, self.num_steps = 0.0, 0

    def add(self, record: StepRecord, keep: bool = True) -> None:
        """keep: remember its loss and gradient norm as well (an epoch is too long for that)."""
        self.num_steps += 1
        self.tokens += record.row[1]
        if not record.skipped:
            self.sums = [a + b for a, b in zip(self.sums, record.row)]
            if keep:
                self.good.append(record)

    def metrics(self) -> dict[str, Any]:
        """Mean loss and gradient norm of the steps, and `summarize_sums` of their rows."""
        return {
            "loss": statistics.fmean(record.loss for record in self.good),
            **summarize_sums(self.sums, self._num_steps),
            "grad_norm": statistics.fmean(record.grad_norm for record in self.good),
        }


def summarize_sums(values: list[float], num_steps: int) -> dict[str, Any]:
    """Means from sums: per-step loss and accuracy lists, `acc0`, `tau` (1 + mean run of correct steps from step 0)."""
    vectors = [values[NUM_SCALARS + i * num_steps : NUM_SCALARS + (i + 1) * num_steps] for i in range(4)]
    loss_sum, counted, supervised, correct = vectors
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
