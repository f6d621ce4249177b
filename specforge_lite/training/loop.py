"""The training loop: plan -> captured states -> K-step draft pass -> summed gradients -> one division -> AdamW.

Nothing in `train_step` waits for the device. Every `--log-interval` steps the sums are fetched, shown and judged.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import record_function

from specforge_lite.capture.base import TargetEngine
from specforge_lite.capture.prefetch import SkipBudget
from specforge_lite.checkpoints.training_run import SavedState
from specforge_lite.core.errors import CaptureError, EngineError, TrainingError
from specforge_lite.core.log import info, progress
from specforge_lite.core.provenance import collect_provenance, redact
from specforge_lite.training.checkpoint import save_checkpoint
from specforge_lite.training.dataloader import BatchMaker, StepBatches, bad_documents
from specforge_lite.training.distributed import World, open_world, report_failure
from specforge_lite.training.machine import fit_to_device, use_deterministic_kernels
from specforge_lite.training.metrics import (
    TOKENS_AT,
    WEIGHT_AT,
    Clock,
    PendingStep,
    SpikeDetector,
    StepRecord,
    empty_row,
    fetch,
    interval_metrics,
    memory_bytes,
    of_end,
    output_row,
    step_line,
    summarize_sums,
)
from specforge_lite.training.reporting import ExitSummary, Reporter, StopRequest, catch_signals, open_reporter
from specforge_lite.training.settings import TrainConfig
from specforge_lite.training.wiring import (
    RunData,
    RunModels,
    check_lengths,
    compute_dtype,
    load_data,
    load_models,
    open_dataloader,
    open_target,
    plan_batches,
    restore_or_start,
    ttt_settings,
)


def run_training(config: TrainConfig) -> int:
    """Train as the command line asks; the exit code."""
    if config.training.deterministic:
        use_deterministic_kernels()
    with catch_signals() as stop, open_world(config.distributed) as world, open_reporter(config, world) as reporter:
        config = fit_to_device(config, world.device).with_target_defaults()
        data = load_data(config)
        with open_target(config, world, data) as engine, report_failure(world):
            models = load_models(config, engine.info, data, world)
            trainer_class: type[Trainer] = Trainer
            if config.training.follow is not None:
                from specforge_lite.training.follow import FollowTrainer as trainer_class
            trainer_class(config, world, data, engine, models, reporter, stop).train()
    return stop.exit_code


class Trainer:
    """One run: its parts put together, on every rank; `train` is the whole story.

    engine_health: what is out of order with the engine, for the step line; served engines report restarts.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        data: RunData,
        engine: TargetEngine,
        models: RunModels,
        reporter: Reporter,
        stop: StopRequest,
    ) -> None:
        """Raises CheckpointError for a checkpoint of another run."""
        self.config, self.world, self.reporter, self.stop = config, world, reporter, stop
        self.engine, self.eval_data, self.target_head = engine, data.eval, models.target_head
        self.engine_health: Callable[[], str] = getattr(engine, "health", str)
        dtype = compute_dtype(config, world)
        torch.manual_seed(config.training.seed + world.rank)
        skips = check_lengths(config, data, engine, models.draft.config)
        plan = self.plan = plan_batches(config, data.train, world)
        self.parallel, self.optimizer, self.progress, self.total_steps = restore_or_start(
            config, world, models, plan, dtype
        )
        self.end = None if math.isinf(self.total_steps) else int(self.total_steps)
        self.ttt = ttt_settings(config, dtype, world, models.draft)
        self.to_batch = BatchMaker(models.target_head, len(engine.info.aux_layer_ids), world.device, dtype)
        self.dataloader = open_dataloader(config, world, plan, data, engine, self.to_batch, skips)
        trained = sum(p.numel() for p in models.draft.parameters() if p.requires_grad)
        info(
            f"training {trained:,} parameters in {str(dtype).removeprefix('torch.')}: {self.end or 'endless'} steps,"
            f" {plan.steps_per_epoch} per epoch, {world.world_size} rank(s)"
            + (f" ({world.sp_size} per batch)" if world.sp_size > 1 else "")
            + f", {config.distributed.sharding}, "
            + (f"resumed after step {self.progress.step}" if self.progress.step else "from the start")
        )
        values = config.model_dump(mode="json")
        self.documents = {
            "config.json": redact(values),
            "provenance.json": collect_provenance(values),
            "draft_config.json": models.draft.config.to_dict(),
            "identity.json": models.identity,
        }
        self._pending: list[PendingStep] = []
        self._interval: list[StepRecord] = []
        self._epoch_sums: list[float] = []
        self._spikes, self._clock = SpikeDetector(), Clock()
        self._started = time.perf_counter()
        self._first_step = self._saved_step = self.progress.step
        self._packed_tokens = self._packed_slots = 0
        self._epoch_ended = False
        self._num_skipped = self.progress.skipped_before
        self._latest: dict[str, Any] = {}
        reporter.start(self.progress.step)
        reporter.summarize = self.summary

    # ------------------------------------------------------------------------------------------------------ the loop

    def train(self) -> ExitSummary:
        """Train until `total_steps`, a signal, or the end of the data on any rank; save; report why it ended."""
        self.stop.in_loop = True
        try:
            reason = self._run_steps()
            self._report()
            if self.progress.step > self._saved_step:
                self.save()
            summary = self.summary(reason)
            self.reporter.finish(summary)
        except BaseException:
            self.dataloader.close(timeout_s=1.0)  # no thread stays behind, and the error is reported at once
            raise
        self.dataloader.close()
        return summary

    def _run_steps(self) -> str:
        """Steps until the last one, a signal, or the end of the data; -> which of them it was."""
        done, hidden = self.progress.step, not sys.stderr.isatty()
        bar = progress(self.end, "training", "step", initial=done, disable=hidden)
        with bar, self._profiler(done) as profiler:
            while self.progress.step < self.total_steps:
                waits = self.waits_for_rows()
                with self._naming_the_checkpoint():
                    batches = None if self.stop or waits else next(self.dataloader, None)
                out_of_data = batches is None and not self.stop and not waits
                verdict = self.world.agree(
                    self.progress.step, bool(self.stop), out_of_data, self.dataloader.num_skipped
                )
                self._num_skipped = self.progress.skipped_before + verdict.num_skipped_samples
                if verdict.num_stopping or verdict.num_out_of_data:
                    return f"stopped by {self.stop.name or 'a signal'}" if verdict.num_stopping else "out of data"
                if waits:
                    continue
                assert batches is not None
                with self._naming_the_checkpoint(), record_function("training step"):
                    self.train_step(batches)
                bar.update()
                if profiler is not None:
                    profiler.step()
                self._after_step()
        return "finished"

    def waits_for_rows(self) -> bool:
        """True where the rows of the next step have not come yet, as they may with --follow; on every rank the same."""
        return False

    def _profiler(self, done: int) -> AbstractContextManager[torch.profiler.profile | None]:
        if self.config.training.profile_start_step is None:
            return nullcontext()
        from specforge_lite.training.profiler import step_profiler

        return step_profiler(self.config, self.world, done)

    @contextmanager
    def _naming_the_checkpoint(self) -> Iterator[None]:
        """What the engine raises ends the run; name the checkpoint from which it can go on."""
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
        count = row[WEIGHT_AT].to(device)
        update = self.optimizer.step(self.progress.step, count, row[0].to(device), square_sum)
        self.progress.step += 1
        self._epoch_ended = planned.state_after["epoch"] > self.progress.data["epoch"]
        self.progress.data = planned.state_after
        self._packed_tokens += planned.num_tokens
        self._packed_slots += planned.num_slots
        tail = torch.stack([local_row[0], local_row[WEIGHT_AT], update.grad_norm.to(row), update.skipped.to(row)])
        self._pending.append(PendingStep(self.progress.step, torch.cat([row, tail]), flags, sample_ids))

    def _after_step(self) -> None:
        training, checkpoint = self.config.training, self.config.checkpoint
        step, epoch = self.progress.step, self.progress.data["epoch"]
        last = step == self.total_steps
        due = lambda interval, epochs: (  # noqa: E731
            (interval > 0 and step % interval == 0) or bool(epochs and self._epoch_ended and epoch % epochs == 0)
        )
        if last or due(self.config.logging.log_interval, None):
            self._report()
        if self._epoch_ended:
            self._report_epoch(epoch - 1)
        self.reporter.beat(step, self.end, "training")
        if self.eval_data is not None and (last or due(training.eval_interval, training.eval_epochs)):
            self.evaluate()
        if not last and due(checkpoint.save_interval, checkpoint.save_epochs):
            self.save()

    # --------------------------------------------------------------------------------------------------- now and then

    def _drain(self) -> None:
        """Fetch the sums of the steps since the last time (waits for the device), judge losses, count bad steps."""
        pending, self._pending = self._pending, []
        for record in fetch(pending):
            self._interval.append(record)
            if not record.skipped:
                self._epoch_sums = [a + b for a, b in zip(self._epoch_sums, record.row)] or record.row
            if record.overflow:
                info(f"step {record.step}: gradient overflow in fp16, step skipped while the loss scale is searched")
            elif record.skipped:
                self.progress.nonfinite_steps += 1
                self._note("nonfinite_step", record, "loss or gradient not finite; step skipped", record.blamed)
            elif self._spikes.is_spike(record.loss):
                own = record.local_loss >= record.loss or not self.world.distributed
                self._note("loss_spike", record, f"loss spike {record.loss:.4g}", record.sample_ids if own else [])
        budget = self.config.training.nonfinite_budget
        if self.progress.nonfinite_steps > budget:
            raise TrainingError(
                f"step {self.progress.step}: {self.progress.nonfinite_steps} steps had a NaN or infinite loss or"
                f" gradient, the budget is {budget} (--nonfinite-budget); the samples are named above."
                f" Last checkpoint: {self.progress.last_checkpoint or 'none'}"
            )

    def _note(self, event: str, record: StepRecord, message: str, own_ids: list[str]) -> None:
        """Report a bad step with the sample ids of all ranks. Collective: every rank sees the same records."""
        names = [name for text in self.world.gather_texts("\n".join(own_ids)) for name in text.split("\n") if name]
        unique = list(dict.fromkeys(names))  # ranks that share a batch name the same
        self.reporter.problem(event, record.step, f"step {record.step}: {message}", unique)

    def _report(self) -> None:
        """The step line and its metrics; nothing when no step was done since the last one."""
        self._drain()
        interval, self._interval = self._interval, []
        step, good = self.progress.step, [record for record in interval if not record.skipped]
        if not good:
            if interval:
                info(f"step {of_end(step, self.end)}: every step since the last line was skipped")
            return
        seconds, wait_share = self._clock.interval(self.dataloader.wait_seconds)
        per_step = (time.perf_counter() - self._started) / max(1, step - self._first_step)
        metrics = {
            **interval_metrics(good, self.ttt.num_steps),
            "learning_rate": self.optimizer.learning_rate(step - 1),
            **self.data_metrics(),
            "tokens_per_second": sum(record.row[TOKENS_AT] for record in interval) / max(seconds, 1e-9),
            "wait_share": wait_share,
            "memory_bytes": memory_bytes(self.world.device),
            **({} if self.end is None else {"eta_seconds": per_step * (self.end - step)}),
            "skipped_samples": self._num_skipped,
            "nonfinite_steps": self.progress.nonfinite_steps,
            "engine": self.engine_health(),
            **(self.optimizer.scaler.state() if self.optimizer.scaler is not None else {}),
        }
        if self._packed_slots:
            metrics["packing_efficiency"] = self._packed_tokens / self._packed_slots
        self._packed_tokens = self._packed_slots = 0
        info(step_line(step, self.end, metrics))
        self._send(metrics)

    def data_metrics(self) -> dict[str, Any]:
        """How far the run is in its data."""
        data = self.progress.data
        return {"epoch": data["epoch"] + data["consumed"] / data["num_samples"]}

    def _report_epoch(self, epoch: int) -> None:
        """Accuracy and loss by position, averaged over the epoch (over the part of it since a resume)."""
        self._drain()
        sums, self._epoch_sums = self._epoch_sums or empty_row(self.ttt.num_steps, "cpu").tolist(), []
        summary = summarize_sums(sums, self.ttt.num_steps)
        accuracies, losses = summary["accuracies"], summary["step_losses"]
        shown = " ".join(f"{value:.3f}" for value in accuracies), " ".join(f"{value:.3f}" for value in losses)
        info(f"epoch {epoch + 1} ended at step {self.progress.step}: acc {shown[0]} | loss {shown[1]}")
        self._send({"epoch_accuracies": accuracies, "epoch_losses": losses, "epochs_done": epoch + 1})

    def _send(self, metrics: dict[str, Any]) -> None:
        self._latest |= metrics
        self.reporter.metrics(self.progress.step, metrics)

    def evaluate(self) -> None:
        """Evaluate the draft as it is now on the held-out samples; all ranks share the work."""
        from specforge_lite.training.evaluate import evaluate

        assert self.eval_data is not None
        self.world.place("evaluating", self.progress.step)
        self.reporter.beat(self.progress.step, self.end, "evaluating")
        start, training = time.perf_counter(), self.config.training
        # An EAGLE-1 draft trains one step and decodes a chain; evaluation follows the chain.
        num_steps = max(self.ttt.num_steps, training.eval_chain_length if self.config.algorithm == "eagle1" else 1)
        # Every rank evaluates samples of its own: without gradients a long one fits as well.
        settings = replace(self.ttt, collect_rows=True, sequence=None, num_steps=num_steps)
        result = evaluate(
            lambda batch: self.parallel.forward(batch, self.target_head, settings),
            self.eval_data,
            self.engine,
            self.to_batch,
            num_steps=num_steps,
            chain_length=training.eval_chain_length,
            batch_size=training.batch_size,
            max_samples=training.eval_max_samples,
            world=self.world,
            skips=SkipBudget(training.skip_budget, len(self.eval_data)),
        )
        info(f"step {of_end(self.progress.step, self.end)} {result.line()}")
        self._send({**result.metrics(), "eval/seconds": time.perf_counter() - start})
        self._clock.interval(self.dataloader.wait_seconds)  # evaluation is not training time

    def save(self) -> None:
        """Write a checkpoint of this moment; all ranks call it."""
        self._drain()
        progress, config = self.progress, self.config.checkpoint
        self.world.place("saving", progress.step)
        self.reporter.beat(progress.step, self.end, "saving")
        counters = {
            "skipped_samples": self._num_skipped,
            "nonfinite_steps": progress.nonfinite_steps,
            "seconds": self._seconds,
            **(self.optimizer.scaler.state() if self.optimizer.scaler is not None else {}),
        }
        state = SavedState(progress.step, progress.data, counters, self.world.world_size)
        documents = self.documents | {"metrics.json": {"step": progress.step, **self._latest}}
        progress.last_checkpoint = save_checkpoint(
            config.output_dir, state, self.parallel, self.optimizer, self.world, documents, config.save_total_limit
        )
        self._saved_step = progress.step
        info(f"saved {progress.last_checkpoint}")
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
            total_steps=self.end,
            last_checkpoint=str(progress.last_checkpoint) if progress.last_checkpoint else None,
            skipped_samples=self._num_skipped,
            nonfinite_steps=progress.nonfinite_steps,
            restarts=self.reporter.restarts,
            seconds=round(self._seconds, 1),
        )
