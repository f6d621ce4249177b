"""A regeneration run: rows stream in, a bounded number is in work, answers are appended as they come."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from specforge_lite.core import log
from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.files import quick_fingerprint, user_errors
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.data.conversations import to_row
from specforge_lite.data.fim import FimRow
from specforge_lite.data.reading import RowFile
from specforge_lite.regenerate.hf_backend import HfBackend
from specforge_lite.regenerate.rows import FimPrompts, InputRow, RowSource
from specforge_lite.regenerate.servers import ServerPool, open_http
from specforge_lite.regenerate.settings import BackendSection, RegenerateConfig
from specforge_lite.regenerate.shards import ShardStore
from specforge_lite.regenerate.turns import Question, RequestFailed, Sampling, regenerate, row_sampling
from specforge_lite.types import Conversation

SYNC_SECONDS = 2.0
ROWS_PER_PLACE = 2  # rows in work per request place: those in a retry pause need no place


@dataclass
class Summary:
    """How a run ended. num_kept: rows that were done before it started; reasons: error rows by reason."""

    num_answered: int = 0
    num_kept: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def num_errors(self) -> int:
        return self.reasons.total()

    def reasons_text(self) -> str:
        """`timeout 3, http-500 2`, the most frequent first."""
        ranked = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{reason} {count}" for reason, count in ranked)

    def describe(self, directory: Path) -> str:
        given_up = f", {self.num_errors} given up ({self.reasons_text()})" if self.num_errors else ""
        kept = f", {self.num_kept} done before" if self.num_kept else ""
        seconds = self.seconds or 1.0
        tokens = f", {self.num_tokens / seconds:.0f} tokens/s" if self.num_tokens else ""
        rate = f"{self.num_answered / seconds:.1f} rows/s{tokens}"
        spent = log.format_seconds(self.seconds)
        return f"{self.num_answered} answered{given_up}{kept} in {spent} ({rate}); {directory}"


def run(config: RegenerateConfig) -> Summary:
    """Regenerate a data set. Raises SpecforgeError; whatever ends it, what was answered is kept for the next run."""
    with user_errors(config.prompts.output_dir), RowFile(config.prompts.raw_data_file) as file:
        return asyncio.run(run_async(config, RowSource(file, config.prompts.sample_size)))


async def run_async(config: RegenerateConfig, source: RowSource) -> Summary:
    """`run`, inside an event loop of the caller's. SIGTERM ends it like Ctrl-C: files are synced, the next run goes
    on."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    prompts = config.prompts
    async with AsyncExitStack() as stack:
        backend = await _open_backend(config.backend, stack)
        settings = run_settings(config, backend.model)
        store = stack.enter_context(ShardStore(prompts.output_dir, prompts.num_per_shard, settings, prompts.resume))
        if prompts.retry_errors:
            log.info(f"--retry-errors: {store.retry_errors()} row(s) will be asked again")
        summary = await Run(config, source, store, backend).go(stopped)
        if not summary.stopped:
            store.write_merged(prompts.output_file)
    return summary


async def _open_backend(config: BackendSection, stack: AsyncExitStack) -> ServerPool | HfBackend:
    """The servers, checked, or the model in this process; `stack` closes it."""
    if config.target_backend == "hf":
        hf = HfBackend(str(config.model_name), config.target_dtype, config.batch_size, config.trust_remote_code)
        return await stack.enter_async_context(aclosing(hf))
    http = await stack.enter_async_context(open_http())
    pool = await stack.enter_async_context(aclosing(ServerPool(config, http)))
    await pool.start()
    return pool


class Run:
    """The moving parts of one run: one task per row in work, one that shows progress and syncs."""

    def __init__(
        self, config: RegenerateConfig, source: RowSource, store: ShardStore, backend: ServerPool | HfBackend
    ) -> None:
        self.config, self.source, self.store, self.backend = config, source, store, backend
        self.summary = Summary()
        self._rows = self._needed_rows()

    async def go(self, stopped: asyncio.Event) -> Summary:
        """Work until the input is done or `stopped`. Raises EngineError when no server is left or no row was
        answered."""
        start = time.monotonic()
        summary = self.summary
        try:
            with log.progress(None, "regenerate", unit="row") as bar:
                await self._work(bar, stopped)
        finally:
            self.store.sync()
            summary.seconds = time.monotonic() - start
            log.info(summary.describe(self.store.directory))
        if summary.num_errors and not summary.num_answered and not summary.num_kept:
            raise EngineError(f"no row was answered ({summary.reasons_text()}); see {self.store.directory}")
        return summary

    async def _work(self, bar: Any, stopped: asyncio.Event) -> None:
        num_workers = ROWS_PER_PLACE * self.backend.num_places
        workers: asyncio.Future[Any] = asyncio.gather(*(self._worker(bar) for _ in range(num_workers)))
        tasks = (workers, asyncio.ensure_future(self._tick(bar)), asyncio.ensure_future(stopped.wait()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if workers in done:
                self.store.end_of_input()
            self.summary.stopped = workers not in done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tick(self, bar: Any) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(self.store.sync)
            total = self.source.estimated_total
            bar.total = None if total is None else max(bar.n, total - self.summary.num_kept)
            errors = f", errors {self.summary.num_errors}" if self.summary.num_errors else ""
            bar.set_postfix_str(self.backend.status + errors, refresh=False)

    async def _worker(self, bar: Any) -> None:
        for row in self._rows:
            await self._do(row)
            bar.update(1)

    def _needed_rows(self) -> Iterator[InputRow]:
        """Rows that have neither an answer nor an error row yet; shared by all workers."""
        for row in self.source:
            if self.store.is_needed(row.number):
                yield row
            else:
                self.summary.num_kept += 1

    async def _do(self, row: InputRow) -> None:
        config = self.config.sampling
        sampling = row_sampling(row.id, config.seed, config.temperature, config.max_tokens, config.top_p)
        try:
            if row.fim is not None:
                answered = await self._fill(row.fim, sampling)
            elif row.conversation is not None:
                answered = await self._converse(row.conversation, sampling)
            else:
                raise RequestFailed(row.reason, row.detail)
        except RequestFailed as error:
            asked = row.fim.to_row() if row.fim else to_row(row.conversation) if row.conversation else {}
            self.store.add_error(row.number, {**asked, "id": row.id, "reason": error.reason, "detail": error.detail})
            self.summary.reasons[error.reason] += 1
            return
        self.store.add_answer(row.number, {**answered, "id": row.id, "temperature": sampling.temperature})
        self.summary.num_answered += 1

    async def _converse(self, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
        """The answered row in normal form, and facts about the answer."""
        keep_reasoning = self.config.sampling.reasoning == "keep"
        result = await regenerate(
            conversation, self.config.prompts.system_prompt, sampling, keep_reasoning, self.backend.answer
        )
        self.summary.num_tokens += result.completion_tokens
        row = {**to_row(replace(conversation, messages=result.messages)), "finish_reason": result.finish_reason}
        if result.num_recorded_turns_left:
            row["num_recorded_turns_left"] = result.num_recorded_turns_left
        return {**row, "left_out_reason": result.left_out_reason} if result.left_out_reason else row

    async def _fill(self, row: FimRow, sampling: Sampling) -> dict[str, Any]:
        prompts = self._fim_prompts
        sampling = replace(sampling, max_tokens=prompts.max_tokens)
        question = Question([], None, sampling, prompts.prompt_ids(row), prompts.end_token_ids)
        answer = await self.backend.answer(question)
        if not answer.content.strip():
            raise RequestFailed("empty-answer", "the target put nothing into the hole")
        self.summary.num_tokens += answer.completion_tokens
        return {**replace(row, middle=answer.content).to_row(), "finish_reason": answer.finish_reason}

    @cached_property
    def _fim_prompts(self) -> FimPrompts:
        config, backend = self.config.sampling, self.config.backend
        if isinstance(self.backend, HfBackend):
            tokenizer = self.backend.tokenizer
        elif backend.tokenizer_path is not None:
            tokenizer = load_tokenizer(backend.tokenizer_path, backend.trust_remote_code, "tokenizer_path")
        else:
            raise ConfigError("tokenizer_path: required for fill-in-the-middle rows (the target's model directory)")
        return FimPrompts(tokenizer, config.fim_order, config.fim_max_length, config.max_tokens)


def run_settings(config: RegenerateConfig, model: str) -> dict[str, Any]:
    """What makes two runs the same: regeneration.json, compared on resume. No addresses and no key are in it."""
    prompts = config.prompts.model_dump(include={"num_per_shard", "sample_size", "system_prompt"})
    backend = config.backend.model_dump(include={"target_backend", "extra_body"})
    sampling = config.sampling.model_dump(mode="json")
    fim = [sampling.pop("fim_order"), sampling.pop("fim_max_length")]
    input_file = quick_fingerprint(config.prompts.raw_data_file)
    return {"input": input_file, **prompts, **backend, "model": model, **sampling, "fim": fim}
