"""The training loop: plan -> captured states -> K-step draft pass -> summed gradients -> one division -> AdamW.

Nothing in `train_step` waits for the device. Every `--log-interval` steps the sums are fetched, shown and judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from specforge_lite.checkpoints.training_run import SavedState
from specforge_lite.core.errors import CaptureError, EngineError, TrainingError
from specforge_lite.core.log import info
from specforge_lite.data.sampler import PlannedStep
from specforge_lite.model.draft import TTTSettings
from specforge_lite.model.target_head import TargetHead
from specforge_lite.training.checkpoint import save_checkpoint
from specforge_lite.training.dataloader import Feed, StepBatches, bad_documents
from specforge_lite.training.distributed import World
from specforge_lite.training.evaluate import EvalResult
from specforge_lite.training.metrics import (
    Clock,
    Fetched,
    MetricBuffer,
    SpikeDetector,
    StepRecord,
    counted_in,
    empty_row,
    memory_bytes,
    output_row,
    step_line,
    summarize_sums,
)
from specforge_lite.training.optimizer import DraftOptimizer, learning_rate_at
from specforge_lite.training.parallel import ParallelDraft
from specforge_lite.training.profiling import StepProfiler
from specforge_lite.training.reporting import Reporter
from specforge_lite.training.run_dir import ExitSummary, StopRequest
from specforge_lite.training.settings import TrainConfig


@dataclass
class Progress:
    """Where the run stands; what a checkpoint keeps besides tensors. `data`: state of the sampler."""

    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    skipped_before: int = 0
    nonfinite_steps: int = 0
    seconds_before: float = 0.0
    last_checkpoint: Path | None = None


@dataclass
class Trainer:
    """One run. All parts are made by `training.setup`; `train` is the whole story."""

    config: TrainConfig
    world: World
    parallel: ParallelDraft
    optimizer: DraftOptimizer
    target_head: TargetHead
    ttt: TTTSettings
    feed: Feed
    reporter: Reporter
    stop: StopRequest
    progress: Progress
    total_steps: int
    documents: dict[str, Any]
    evaluator: Callable[[], EvalResult] | None = None
    engine_health: Callable[[], str] = str  # what is out of order with the engine, for the step line

    def __post_init__(self) -> None:
        self._metrics = MetricBuffer(self.ttt.num_steps)
        self._spikes = SpikeDetector()
        self._clock = Clock()
        self._started = time.perf_counter()
        self._first_step = self._saved_step = self.progress.step
        self._interval, self._slots, self._epoch_ended = _Interval(), _Slots(), False
        self._num_skipped = self.progress.skipped_before
        self.reporter.watch(self.summary)

    # ------------------------------------------------------------------------------------------------------ the loop

    def train(self) -> ExitSummary:
        """Train until `total_steps`, a signal, or the end of the data on any rank; save; say why it ended."""
        self.stop.in_loop = True
        try:
            summary = self._finish(self._run_steps())
        except BaseException:
            self.feed.close(timeout_s=1.0)  # no thread stays behind, and the error is told at once
            raise
        self.feed.close()
        return summary

    def _run_steps(self) -> str:
        """Steps until the last one, a signal, or the end of the data; -> which of them it was."""
        with StepProfiler(self.config.training, self.config.checkpoint.output_dir, self.world) as profiler:
            while self.progress.step < self.total_steps:
                batches = None if self.stop else self._next_batches()
                out_of_data = batches is None and not self.stop
                verdict = self.world.agree(self.progress.step, bool(self.stop), out_of_data, self.feed.num_skipped)
                self._num_skipped = self.progress.skipped_before + verdict.num_skipped_samples
                if verdict.num_stopping or verdict.num_out_of_data:
                    return f"stopped by {self.stop.name or 'a signal'}" if verdict.num_stopping else "out of data"
                assert batches is not None
                with self._naming_the_checkpoint(), record_function("training step"):
                    self.train_step(batches)
                profiler.step(self.progress.step)
                self._after_step()
        return "finished"

    def _next_batches(self) -> StepBatches | None:
        with self._naming_the_checkpoint():
            return next(self.feed, None)

    @contextmanager
    def _naming_the_checkpoint(self) -> Iterator[None]:
        """What the engine raises ends the run; say where it can go on."""
        try:
            yield
        except (EngineError, CaptureError) as error:
            self.reporter.finish(self.summary(f"{type(error).__name__}: {error}"))
            kept = self.progress.last_checkpoint or "none"
            raise type(error)(f"{error}; last good checkpoint: {kept}") from None

    def train_step(self, step: StepBatches) -> None:
        """One optimizer step of this rank; leaves sums on the device."""
        planned = step.planned
        self.parallel.begin_step()
        row = empty_row(self.ttt.num_steps, self.world.device)
        flags, sample_ids = [], []
        for index, batch in enumerate(step.batches):
            output = self.parallel.forward(batch, self.target_head, self.ttt)
            self.parallel.backward(self.optimizer.scaled(output.loss), last=index == len(planned.micro_batches) - 1)
            if batch.sample_ids:
                flags.append(bad_documents(batch))
                sample_ids += batch.sample_ids
                row += output_row(output, batch)
        if self.world.sp_rank:
            row[1] = 0  # the batch's tokens are counted once, by the first rank of those that share it
        if flags:  # a broken hidden state makes the step's loss NaN, also where no supervised token depends on it
            row[0] = torch.where(torch.cat(flags).any(), torch.nan, row[0])
        local_row = row.clone()
        self.world.sum_(row)
        square_sum = self.parallel.reduce_gradients()
        device = square_sum.device
        count = counted_in(row, self.ttt.num_steps).to(device)
        update = self.optimizer.step(self.progress.step, count, row[0].to(device), square_sum)
        self.progress.step += 1
        self._epoch_ended = planned.state_after["epoch"] > self.progress.data["epoch"]
        self.progress.data = planned.state_after
        self._slots.add(planned)
        self._metrics.add(self.progress.step, row, local_row, update, flags, sample_ids)

    def _after_step(self) -> None:
        settings, step = self.config, self.progress.step
        last = step == self.total_steps
        if last or step % settings.logging.log_interval == 0:
            self._drain()
            self._report()
        self.reporter.beat(step, self.total_steps, "training")
        by_epoch = self._epochs_are_due(settings.training.eval_epochs)
        if self.evaluator is not None and (last or by_epoch or _is_due(step, settings.training.eval_interval)):
            self.evaluate()
        if not last and self._save_is_due(step):
            self.save()

    def _save_is_due(self, step: int) -> bool:
        by_epoch = self._epochs_are_due(self.config.checkpoint.save_epochs)
        return by_epoch or _is_due(step, self.config.checkpoint.save_interval)

    def _epochs_are_due(self, every: int | None) -> bool:
        """True at the end of every `every`-th epoch."""
        return every is not None and self._epoch_ended and self.progress.data["epoch"] % every == 0

    def _finish(self, reason: str) -> ExitSummary:
        if len(self._metrics):
            self._drain()
            self._report()
        if self.progress.step > self._saved_step:
            self.save()
        summary = self.summary(reason)
        self.reporter.finish(summary)
        return summary

    # --------------------------------------------------------------------------------------------------- now and then

    def _drain(self) -> None:
        """Fetch the sums of the steps since the last time (waits for the device), judge losses, count bad steps."""
        if not len(self._metrics):
            return
        fetched = self._metrics.fetch()
        for index, record in enumerate(fetched.records):
            if record.overflow:
                info(f"step {record.step}: gradient overflow in fp16, step skipped while the loss scale is searched")
            elif record.skipped:
                self._note_skipped(fetched, index, record)
            elif self._spikes.is_spike(record.loss):
                self._note_spike(fetched, index, record)
        self._interval.add(fetched)
        budget = self.config.training.nonfinite_budget
        if self.progress.nonfinite_steps > budget:
            raise TrainingError(
                f"step {self.progress.step}: {self.progress.nonfinite_steps} steps had a NaN or infinite loss or"
                f" gradient, the budget is {budget} (--nonfinite-budget); the samples are named above."
                f" Last checkpoint: {self.progress.last_checkpoint or 'none'}"
            )

    def _note_skipped(self, fetched: Fetched, index: int, record: StepRecord) -> None:
        self.progress.nonfinite_steps += 1
        ids = self._collect_ids(fetched.blame(index))
        self.reporter.problem(
            "nonfinite_step", record.step, f"step {record.step}: loss or gradient not finite; step skipped", ids
        )

    def _note_spike(self, fetched: Fetched, index: int, record: StepRecord) -> None:
        local = fetched.local_loss(index)
        ids = self._collect_ids(fetched.sample_ids[index] if local >= record.loss or not self.world.distributed else [])
        self.reporter.problem("loss_spike", record.step, f"step {record.step}: loss spike {record.loss:.4g}", ids)

    def _collect_ids(self, own: list[str]) -> list[str]:
        """Sample ids of all ranks. Collective: every rank sees the same records, so all call it together."""
        names = [name for text in self.world.gather_texts("\n".join(own)) for name in text.split("\n") if name]
        return list(dict.fromkeys(names))  # ranks that share a batch name the same

    def _report(self) -> None:
        interval, self._interval = self._interval, _Interval()
        step = self.progress.step
        if not interval.losses:
            if interval.num_steps:
                info(f"step {step}/{self.total_steps}: every step since the last line was skipped")
            return
        seconds, wait_share = self._clock.interval(self.feed.wait_seconds)
        done = step - self._first_step
        per_step = (time.perf_counter() - self._started) / max(1, done)
        metrics = {
            "loss": interval.mean_loss,
            **summarize_sums(interval.sums, self.ttt.num_steps),
            "grad_norm": interval.mean_grad_norm,
            "learning_rate": learning_rate_at(self.config.optimizer, step - 1, self.total_steps),
            "epoch": self.progress.data["epoch"] + self.progress.data["consumed"] / self.progress.data["num_samples"],
            "tokens_per_second": interval.tokens / max(seconds, 1e-9),
            "wait_share": wait_share,
            "memory_bytes": memory_bytes(self.world.device),
            "eta_seconds": per_step * (self.total_steps - step),
            "skipped_samples": self._num_skipped,
            "nonfinite_steps": self.progress.nonfinite_steps,
            "engine": self.engine_health(),
            **self.optimizer.scaler_state(),
        }
        if self._slots.slots:
            metrics["packing_efficiency"] = self._slots.take()
        info(step_line(step, self.total_steps, metrics))
        self.reporter.metrics(step, metrics)

    def evaluate(self) -> None:
        """Evaluate on the held-out samples; all ranks share the work."""
        assert self.evaluator is not None
        self.world.place("evaluating", self.progress.step)
        self.reporter.beat(self.progress.step, self.total_steps, "evaluating")
        start = time.perf_counter()
        result = self.evaluator()
        info(f"step {self.progress.step}/{self.total_steps} {result.line()}")
        self.reporter.metrics(self.progress.step, {**result.metrics(), "eval/seconds": time.perf_counter() - start})
        self._clock.interval(self.feed.wait_seconds)  # evaluation is not training time

    def save(self) -> None:
        """Write a checkpoint of this moment; all ranks call it."""
        self._drain()
        self.world.place("saving", self.progress.step)
        self.reporter.beat(self.progress.step, self.total_steps, "saving")
        progress = self.progress
        state = SavedState(
            step=progress.step,
            data=progress.data,
            counters={
                "skipped_samples": self._num_skipped,
                "nonfinite_steps": progress.nonfinite_steps,
                "seconds": self._seconds,
                **self.optimizer.scaler_state(),
            },
            world_size=self.world.world_size,
        )
        config = self.config.checkpoint
        progress.last_checkpoint = save_checkpoint(
            config.output_dir, state, self.parallel, self.optimizer, self.world, self.documents, config.save_total_limit
        )
        self._saved_step = progress.step
        self.reporter.event("checkpoint", {"step": progress.step, "path": str(progress.last_checkpoint)})

    @property
    def _seconds(self) -> float:
        return self.progress.seconds_before + time.perf_counter() - self._started

    def summary(self, reason: str) -> ExitSummary:
        """Why the run ended and what it leaves."""
        progress = self.progress
        return ExitSummary(
            reason=reason,
            step=progress.step,
            total_steps=self.total_steps,
            last_checkpoint=str(progress.last_checkpoint) if progress.last_checkpoint else None,
            skipped_samples=self._num_skipped,
            nonfinite_steps=progress.nonfinite_steps,
            restarts=self.reporter.restarts,
            seconds=round(self._seconds, 1),
        )


@dataclass
class _Interval:
    """Host sums between two step lines (a save in between fetches early)."""

    sums: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tokens: float = 0.0
    num_steps: int = 0

    def add(self, fetched: Fetched) -> None:
        good = fetched.sums()
        self.sums = [a + b for a, b in zip(self.sums, good.values)] if self.sums else good.values
        self.losses += [record.loss for record in good.records if not record.skipped]
        self.grad_norms += [record.grad_norm for record in good.records if not record.skipped]
        self.tokens += fetched.tokens()
        self.num_steps += len(fetched.steps)

    @property
    def mean_loss(self) -> float:
        return sum(self.losses) / max(1, len(self.losses))

    @property
    def mean_grad_norm(self) -> float:
        return sum(self.grad_norms) / max(1, len(self.grad_norms))


@dataclass
class _Slots:
    """Tokens and token slots of this rank's packed batches since the last step line."""

    tokens: int = 0
    slots: int = 0

    def add(self, planned: PlannedStep) -> None:
        self.tokens, self.slots = self.tokens + planned.num_tokens, self.slots + planned.num_slots

    def take(self) -> float:
        """Share of the slots that held a token; starts anew."""
        share = self.tokens / max(1, self.slots)
        self.tokens = self.slots = 0
        return share


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
