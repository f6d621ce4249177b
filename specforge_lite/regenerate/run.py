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
from specforge_lite.regenerate.client import ChatClient, open_http, parse_address
from specforge_lite.regenerate.fim import FimPrompts
from specforge_lite.regenerate.hf_backend import HfBackend
from specforge_lite.regenerate.pool import ServerPool
from specforge_lite.regenerate.rows import InputRow, RowSource
from specforge_lite.regenerate.settings import RegenerateConfig
from specforge_lite.regenerate.shards import ShardStore, sync_files
from specforge_lite.regenerate.turns import Question, RequestFailed, Sampling, regenerate, row_sampling
from specforge_lite.types import Conversation

SYNC_SECONDS = 2.0
ROWS_PER_PLACE = 2  # rows in work per request place: those in a retry pause need no place


Backend = ServerPool | HfBackend


@dataclass
class Summary:
    """How a run ended. num_kept: rows that were done before it started; reasons: error rows by reason."""

    num_answered: int = 0
    num_errors: int = 0
    num_kept: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False
    reasons: Counter[str] = field(default_factory=Counter)

    def reasons_text(self) -> str:
        """`timeout 3, http-500 2`, the most frequent first."""
        ranked = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{reason} {count}" for reason, count in ranked)

    def describe(self, directory: Path) -> str:
        """The last line of a run."""
        parts = [f"{self.num_answered} answered"]
        if self.num_errors:
            parts.append(f"{self.num_errors} given up ({self.reasons_text()})")
        if self.num_kept:
            parts.append(f"{self.num_kept} done before")
        seconds = self.seconds or 1.0
        tokens = f", {self.num_tokens / seconds:.0f} tokens/s" if self.num_tokens else ""
        spent = log.format_seconds(self.seconds)
        return f"{', '.join(parts)} in {spent} ({self.num_answered / seconds:.1f} rows/s{tokens}); {directory}"


def run(config: RegenerateConfig) -> Summary:
    """Regenerate a data set. Raises SpecforgeError; whatever ends it, what was answered is kept for the next run."""
    with user_errors(config.prompts.output_dir), RowFile(config.prompts.raw_data_file) as file:
        return asyncio.run(run_async(config, RowSource(file, config.prompts.sample_size)))


async def run_async(config: RegenerateConfig, source: RowSource) -> Summary:
    """`run`, inside an event loop of the caller's. SIGTERM ends it like Ctrl-C: files are synced, the next run goes
    on."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with AsyncExitStack() as stack:
        backend = await _open_backend(config, stack)
        settings = run_settings(config, backend.model)
        prompts = config.prompts
        store = stack.enter_context(ShardStore(prompts.output_dir, prompts.num_per_shard, settings, prompts.resume))
        if prompts.retry_errors:
            log.info(f"--retry-errors: {store.retry_errors()} row(s) will be asked again")
        summary = await Run(config, source, store, backend).go(stopped)
        if not summary.stopped:
            _merge(store, prompts.output_file)
    return summary


def _merge(store: ShardStore, output_file: Path | None) -> None:
    """All answers as one file, if one is asked for, and all errors as error.jsonl, if there are any."""
    if output_file is not None:
        log.info(f"{store.write_merged(output_file)} rows in {output_file}")
    errors = store.directory / "error.jsonl"
    if store.complete_files("error"):
        log.info(f"{store.write_merged(errors, 'error')} rows without an answer in {errors}")
    else:
        errors.unlink(missing_ok=True)


async def _open_backend(config: RegenerateConfig, stack: AsyncExitStack) -> Backend:
    """The servers, checked, or the model in this process; `stack` closes it."""
    backend = config.backend
    if backend.target_backend == "hf":
        model = str(backend.model_name)
        hf = HfBackend(model, backend.target_dtype, backend.batch_size, backend.trust_remote_code)
        return await stack.enter_async_context(aclosing(hf))
    addresses = [parse_address(text) for text in dict.fromkeys(backend.server_address_port)]
    http = await stack.enter_async_context(open_http())
    clients = [ChatClient(http, a, backend.request_timeout, backend.extra_body) for a in addresses]
    pool = ServerPool(
        clients, backend.max_concurrency, backend.max_retries, backend.retry_base_seconds, backend.server_wait
    )
    await stack.enter_async_context(aclosing(pool))
    await pool.start(backend.model_name)
    return pool


class Run:
    """The moving parts of one run: one task per row in work, one that shows progress and syncs."""

    def __init__(self, config: RegenerateConfig, source: RowSource, store: ShardStore, backend: Backend) -> None:
        self.config, self.source, self.store, self.backend = config, source, store, backend
        self.summary = Summary()
        self._rows = self._needed_rows()

    async def go(self, stopped: asyncio.Event) -> Summary:
        """Work until the input is done or `stopped`. Raises EngineError when no server is left or no row was
        answered."""
        start = time.monotonic()
        bar = log.progress(self.source.estimated_total, "regenerate", unit="row")
        try:
            await self._work(bar, stopped)
        finally:
            bar.close()
            summary, store = self.summary, self.store
            sync_files(store.take_unsynced())
            summary.seconds, summary.reasons = time.monotonic() - start, store.reasons
            summary.num_answered, summary.num_errors = store.num_answered, store.num_errors
            log.info(summary.describe(store.directory))
        if summary.num_errors and not summary.num_answered and not summary.num_kept:
            raise EngineError(f"no row was answered ({summary.reasons_text()}); see {store.directory}")
        return summary

    async def _work(self, bar: Any, stopped: asyncio.Event) -> None:
        ticker: asyncio.Future[Any] = asyncio.ensure_future(self._tick(bar))
        stop: asyncio.Future[Any] = asyncio.ensure_future(stopped.wait())
        workers: asyncio.Future[Any] = asyncio.gather(
            *(self._worker(bar) for _ in range(ROWS_PER_PLACE * self.backend.num_places))
        )
        try:
            await asyncio.wait({workers, ticker, stop}, return_when=asyncio.FIRST_COMPLETED)
            for task in (workers, ticker):
                if task.done():
                    task.result()
            if workers.done():
                self.store.end_of_input()
            self.summary.stopped = not workers.done()
        finally:
            for task in (workers, ticker, stop):
                task.cancel()
            await asyncio.gather(workers, ticker, stop, return_exceptions=True)

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
            return
        self.store.add_answer(row.number, {**answered, "id": row.id, "temperature": sampling.temperature})

    async def _converse(self, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
        """The answered row in normal form, and facts about the answer."""
        keep_reasoning = self.config.sampling.reasoning == "keep"
        result = await regenerate(
            conversation, self.config.prompts.system_prompt, sampling, keep_reasoning, self.backend.answer
        )
        self.summary.num_tokens += result.completion_tokens
        row = to_row(Conversation(conversation.id, result.messages, conversation.tools))
        row["finish_reason"] = result.finish_reason
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

    async def _tick(self, bar: Any) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(sync_files, self.store.take_unsynced())
            total = self.source.estimated_total
            bar.total = None if total is None else max(bar.n, total - self.summary.num_kept)
            errors = f", errors {self.store.num_errors}" if self.store.num_errors else ""
            bar.set_postfix_str(self.backend.status + errors, refresh=False)


def run_settings(config: RegenerateConfig, model: str) -> dict[str, Any]:
    """What makes two runs the same: regeneration.json, compared on resume. No addresses and no key are in it."""
    sampling, prompts, backend = config.sampling, config.prompts, config.backend
    return {
        "input": quick_fingerprint(prompts.raw_data_file),
        "num_per_shard": prompts.num_per_shard,
        "sample_size": prompts.sample_size,
        "system_prompt": prompts.system_prompt,
        "target_backend": backend.target_backend,
        "model": model,
        "extra_body": backend.extra_body,
        "max_tokens": sampling.max_tokens,
        "temperature": list(sampling.temperature),
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "reasoning": sampling.reasoning,
        "fim": [sampling.fim_order, sampling.fim_max_length],
    }
