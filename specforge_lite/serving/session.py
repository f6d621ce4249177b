"""Serving an exported draft in the real engine: start it, generate over HTTP, read the acceptance it reports.

with ServingSession(ServingOptions("sglang", model_path, draft_path, num_steps=3)) as session:
    run = session.generate(prompts, max_tokens=128)
    print(run.tokens_per_second, session.acceptance().length)

Acceptance: SGLang reports each request's in its last chunk. vLLM counts over the whole server; what the chunks of a
request's stream say is right only where all requests add up to that.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from specforge_lite.core.errors import ConfigError, EngineError, suggest
from specforge_lite.core.http import HttpFailure, HttpLoop
from specforge_lite.core.log import progress
from specforge_lite.serving.engine import Acceptance, Generation, ServingOptions
from specforge_lite.serving.environment import SERVING_ENGINES, find_interpreter
from specforge_lite.serving.launch import start_server
from specforge_lite.serving.process import LaunchedServer

__all__ = ["Acceptance", "GenerationRun", "ServingOptions", "ServingSession"]

REQUEST_SECONDS = 1800.0
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationRun:
    """Answers as token ids, in the order of the prompts, and the seconds it took from first to last."""

    outputs: list[list[int]]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(len(output) for output in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


class ServingSession:
    """A server of ours for as long as the object lives; use as a context manager or call `close`. Threads may share it.

    counts_by_server: acceptance is known for the whole server only. server: one that runs already; default: started.
    Raises ConfigError for options the engine cannot serve and EngineError if it does not start.
    """

    def __init__(self, options: ServingOptions, server: LaunchedServer | None = None) -> None:
        if options.backend not in SERVING_ENGINES:
            raise ConfigError(f"backend '{options.backend}': cannot serve{suggest(options.backend, SERVING_ENGINES)}")
        self.options = options
        self.engine = SERVING_ENGINES[options.backend]
        self.counts_by_server = options.speculative and self.engine.metrics_path is not None
        self._server = server or start_server(
            self.engine,
            options,
            find_interpreter(options.backend, options.engine_python),
            self.engine.serving_command,
            what=f"{options.num_steps} steps, top {options.topk}" if options.speculative else "plain decoding",
            log_name="serving.log",
        )
        self._http = HttpLoop(options.concurrency + 1)
        self._seen = self._start = Acceptance()
        try:
            # The first speculative step compiles for many seconds; it belongs to the start, not to a measurement.
            self.answer([1, 2, 3, 4], 8, ignore_eos=True)
            self.reset_acceptance()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`; OpenAI-compatible below `/v1`."""
        return self._server.spec.url

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float = 0.0, ignore_eos: bool = False
    ) -> GenerationRun:
        """Answer token-id prompts, at most `options.concurrency` at a time. Raises EngineError."""
        start = time.perf_counter()
        with progress(len(prompts), f"generating with {self.options.backend}", unit="prompt") as bar:

            async def answer_all() -> list[list[int]]:
                slots = asyncio.Semaphore(self.options.concurrency)

                async def one(prompt: Sequence[int]) -> list[int]:
                    async with slots:
                        found = await self._answer(prompt, max_tokens, temperature, ignore_eos)
                    bar.update(1)
                    return list(found.token_ids)

                return list(await asyncio.gather(*map(one, prompts)))

            outputs = self._run(answer_all())
        return GenerationRun(outputs, time.perf_counter() - start)

    def answer(
        self, token_ids: Sequence[int], max_tokens: int, temperature: float = 0.0, ignore_eos: bool = False
    ) -> Generation:
        """Answer one prompt, timed. Raises EngineError."""
        return self._run(self._answer(token_ids, max_tokens, temperature, ignore_eos))

    def flush(self) -> None:
        """Let the server forget the prefixes it computed, where it keeps any."""
        if (request := self.engine.flush_request()) is not None:
            method, path = request
            self._run(self._http.request(method, self.url + path, timeout_s=60))

    def acceptance(self) -> Acceptance:
        """What the server counted since the start or the last `reset_acceptance`."""
        return self._seen + self._totals() - self._start

    def reset_acceptance(self) -> None:
        """Start counting anew, e.g. after a warm-up."""
        self._seen = Acceptance()
        self._start = self._totals()

    def close(self) -> None:
        """Stop the server; may be called twice."""
        self._http.close()
        self._server.stop()

    def __enter__(self) -> ServingSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._http.run(work)
        except HttpFailure as error:
            broken = "an answer broke off: " if error.reason in ("half-body", "disconnected") else ""
            raise EngineError(f"{broken}{error}; log: {self._server.spec.log_path}") from None

    async def _answer(
        self, token_ids: Sequence[int], max_tokens: int, temperature: float, ignore_eos: bool
    ) -> Generation:
        path, body = self.engine.generate_request(token_ids, max_tokens, temperature, ignore_eos)
        url, log = self.url + path, self._server.spec.log_path
        start = time.perf_counter()
        times: list[float] = []
        chunks: list[bytes] = []
        async for chunk in self._http.stream(url, {**body, "stream": True}, REQUEST_SECONDS):
            times.append(time.perf_counter() - start)
            if self.engine.cumulative_stream and len(chunks) > 1:
                chunks[-1] = chunk
            else:
                chunks.append(chunk)
        if not chunks:
            raise EngineError(f"{url}: an answer without a token; log: {log}")
        try:
            found = self.engine.read_generation([json.loads(chunk) for chunk in chunks], self.options.speculative)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EngineError(f"{url}: a reply that is not understood ({error!r}); log: {log}") from None
        if found.passes is not None and not self.counts_by_server:
            self._seen += Acceptance(found.passes, found.accepted_at)
        return replace(found, first_token_seconds=times[0], seconds=times[-1])

    def _totals(self) -> Acceptance:
        if not self.counts_by_server:
            return Acceptance()
        return self.engine.read_metrics(self._run(self._http.get_text(f"{self.url}{self.engine.metrics_path}")))
