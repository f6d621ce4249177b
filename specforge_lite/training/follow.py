"""`--follow DIR`: the loop on rows of recorded traffic that come while it runs. Imported where DIR is given only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.capture.base import num_positions
from specforge_lite.capture.prefetch import SkipBudget
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config, load_tokenizer
from specforge_lite.core.log import info
from specforge_lite.data.follow import FollowPlan, TrafficReader
from specforge_lite.data.tokenize import row_tokenizer
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.training.loop import Trainer
from specforge_lite.training.settings import TrainConfig
from specforge_lite.types import TokenizedSample

POLL_SECONDS = 0.5
FIRST_TOLD, TOLD_EVERY = 4, 120  # polls without a new step until a line says so, and from one line to the next
WARMUP_STEPS = 100  # of a run without an end


def open_traffic(config: TrainConfig) -> TrafficReader:
    """The reader of `--follow`; rows are cut to what the target has positions for."""
    directory, target = config.training.follow, config.target
    assert directory is not None
    positions = num_positions(load_config(target.target_model_path, target.trust_remote_code))
    length = min(config.data.max_length, positions or config.data.max_length)
    tokenizer = load_tokenizer(target.target_model_path, target.trust_remote_code)
    rows = row_tokenizer(tokenizer, config.data.model_copy(update={"max_length": length}), "chat")
    return TrafficReader(directory, rows, target.target_model_path, config.training.follow_models)


def kept_vocab_map(draft: DraftConfig, source: Draft | None, reader: TrafficReader) -> tuple[Tensor, Tensor]:
    """(d2t, t2d) of the draft that the run starts from, or the target's whole one: rows that are still to come
    cannot be counted. Raises ConfigError where it is neither."""
    if draft.mask_token_id is not None:
        reader.mask_token_id = draft.mask_token_id
    size = draft.draft_vocab_size
    if size == draft.vocab_size:
        return torch.zeros(size).long(), torch.ones(size).bool()
    if source is not None and source.config.draft_vocab_size == size:
        return source.d2t.long(), source.t2d.bool()
    raise ConfigError(
        f"draft_vocab_size {size} of {draft.vocab_size}: which tokens these are is counted on a file; with --follow"
        f" start from a draft that has them (--init DRAFT), or give --draft-vocab-size {draft.vocab_size}"
    )


def wrong_with_follow(config: TrainConfig, follow: Path) -> Iterator[str]:
    """One line per setting that cannot be meant beside `--follow`."""
    data, training, optimizer = config.data, config.training, config.optimizer
    if not follow.is_dir():
        yield f"follow {follow}: no such directory; start specforge-lite record --out {follow} first"
    for name, value in (("train_data_path", data.train_data_path), ("offline_dir", training.offline_dir)):
        if value is not None:
            yield f"{name} and follow: give one"
    if "num_epochs" in training.model_fields_set and training.num_epochs is not None:
        yield f"num_epochs {training.num_epochs}: rows that come have no epochs; give --total-steps or nothing"
    if data.data_format == "fim":
        yield "data_format fim: recorded traffic holds chats"
    if not (training.hand_over_to or "http://").startswith(("http://", "https://")):
        yield f"hand_over_to {training.hand_over_to}: expected http://HOST:PORT"
    endless = training.total_steps is None and optimizer.schedule_steps is None
    for name, wrong in (("lr_schedule", optimizer.lr_schedule != "constant"), ("warmup_ratio", True)):
        if endless and wrong and name in optimizer.model_fields_set:
            yield f"{name} {getattr(optimizer, name)}: needs --total-steps or --schedule-steps, the length of it"


class FollowBudget(SkipBudget):
    """A share of the samples so far, and at least one: how many will come is not known."""

    def admit(self, samples: list[TokenizedSample], max_length: int) -> list[TokenizedSample]:
        self.num_samples += len(samples)
        return super().admit(samples, max_length)

    @property
    def allowed(self) -> int:
        return max(1, super().allowed) if self.fraction > 0 else 0


class FollowTrainer(Trainer):
    """A trainer whose rows come while it runs. Its checkpoints say which rows were trained, all before one place."""

    plan: FollowPlan

    def __init__(self, config: TrainConfig, *parts: Any) -> None:
        optimizer = config.optimizer
        if config.training.total_steps is None and optimizer.schedule_steps is None:
            steps = WARMUP_STEPS if optimizer.warmup_steps is None else optimizer.warmup_steps
            changes = {"lr_schedule": "constant", "warmup_ratio": None, "warmup_steps": steps}
            config = config.with_values(optimizer=changes)
        super().__init__(config, *parts)
        self._polls = 0

    def waits_for_rows(self) -> bool:
        self.world.place("waiting for rows", self.progress.step)
        self.plan.refill(self.world.on_main)
        if self.plan.num_planned > self.progress.step - self._first_step:
            self._polls = 0
            return False
        self._polls += 1  # not seconds: what follows is the same on every rank
        missing = f"waiting for rows in {self.plan.reader.directory}: {self.plan.missing()}"
        if self._polls % TOLD_EVERY == FIRST_TOLD:
            self._report()
            info(f"step {self.progress.step}: {missing}; {self._rows_so_far()}")
        self.reporter.beat(self.progress.step, self.end, missing)
        time.sleep(POLL_SECONDS)
        return True

    def data_metrics(self) -> dict[str, Any]:
        data = self.progress.data
        behind = self.plan.reader.bytes_behind() if self.world.is_main else 0
        return {"rows": data["rows"], "rows_left_out": sum(data["left_out"].values()), "bytes_behind": behind}

    def save(self) -> None:
        data = self.progress.data
        self.progress.data = self.plan.saved(data)
        super().save()
        self.progress.data = data
        info(self._rows_so_far())
        url, checkpoint = self.config.training.hand_over_to, self.progress.last_checkpoint
        if url is not None and checkpoint is not None and self.world.is_main:
            from specforge_lite.training.reload import hand_over_checkpoint

            hand_over_checkpoint(url.rstrip("/"), checkpoint, self.config.target.target_model_path)

    def _rows_so_far(self) -> str:
        data = self.progress.data
        left_out = ", ".join(f"{name} {count:,}" for name, count in sorted(data["left_out"].items()))
        return f"{data['rows']:,} rows trained" + (f", left out: {left_out}" if left_out else "")
