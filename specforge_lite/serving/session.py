"""Serving an exported draft in the real engine: start it, generate over HTTP, read the acceptance it reports.

with ServingSession(ServingOptions("sglang", model_path, draft_path, num_steps=3)) as session:
    run = session.generate(prompts, max_tokens=128)
    print(run.tokens_per_second, session.acceptance().length)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from specforge_lite.core.errors import ConfigError, EngineError, suggest
from specforge_lite.core.http import BadReply, HttpLoop, HttpStatus, ServerGone
from specforge_lite.core.log import progress
from specforge_lite.serving.engine import Acceptance, ServingOptions
from specforge_lite.serving.environment import SERVING_ENGINES, find_interpreter
from specforge_lite.serving.launch import start_server

__all__ = ["Acceptance", "GenerationRun", "ServingOptions", "ServingSession"]

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
    """A server of ours for as long as the object lives; use as a context manager or call `close`.

    Raises ConfigError for options the engine cannot serve and EngineError if it does not start.
    """

    def __init__(self, options: ServingOptions) -> None:
        if options.backend not in SERVING_ENGINES:
            raise ConfigError(f"backend '{options.backend}': cannot serve{suggest(options.backend, SERVING_ENGINES)}")
        self.options = options
        self.engine = SERVING_ENGINES[options.backend]
        self._server = start_server(
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
            self._run(self._generate_all([[1, 2, 3, 4]], 8, 0.0, True, None))
            self.reset_acceptance()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`; OpenAI-compatible below `/v1`."""
        return self._server.spec.url

    @property
    def log_path(self) -> Path:
        return self._server.spec.log_path

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float = 0.0,
        ignore_eos: bool = False,
    ) -> GenerationRun:
        """Answer token-id prompts, at most `options.concurrency` at a time. Raises EngineError."""
        start = time.perf_counter()
        with progress(len(prompts), f"generating with {self.options.backend}", unit="prompt") as bar:
            outputs = self._run(self._generate_all(prompts, max_tokens, temperature, ignore_eos, bar))
        return GenerationRun(outputs, time.perf_counter() - start)

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
        except (ServerGone, HttpStatus, BadReply) as error:
            raise EngineError(f"{self._server.spec.name}: {error}; log: {self.log_path}") from None

    async def _generate_all(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, ignore_eos: bool, bar: Any | None
    ) -> list[list[int]]:
        slots = asyncio.Semaphore(self.options.concurrency)

        async def one(prompt: Sequence[int]) -> list[int]:
            path, body = self.engine.generate_request(prompt, max_tokens, temperature, ignore_eos)
            async with slots:
                reply = await self._http.post_json(self.url + path, body)
            try:
                found = self.engine.read_generation([reply], self.options.speculative)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise BadReply("wrong-form", f"a reply that is not understood ({error!r})", self.url) from None
            if found.acceptance is not None and self.engine.metrics_path is None:
                self._seen += found.acceptance
            if bar is not None:
                bar.update(1)
            return list(found.token_ids)

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))

    def _totals(self) -> Acceptance:
        if not self.options.speculative or self.engine.metrics_path is None:
            return Acceptance()
        return self.engine.read_metrics(self._run(self._http.get_text(self.url + self.engine.metrics_path)))
