"""The benchmark's serving engines: a real SGLang or vLLM, asked over HTTP as users do, answers streamed.

Verification passes: SGLang reports each request's in its last chunk. vLLM counts over the whole server; a request's
passes, read from the chunks of its stream, count only if those of a run add up to the server's own count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from specforge_lite.benchmark.measure import Ask
from specforge_lite.benchmark.statistics import Counters, Reply
from specforge_lite.core.errors import EngineError
from specforge_lite.core.http import HttpFailure, HttpLoop
from specforge_lite.serving.environment import SERVING_ENGINES
from specforge_lite.serving.launch import CONTEXT_MARGIN
from specforge_lite.serving.session import ServingOptions, ServingSession

REQUEST_SECONDS = 1800.0
T = TypeVar("T")


def reserved_tokens(steps: int, topk: int, num_draft_tokens: int) -> int:
    """Context that a server does not give to prompt and answer. SGLang 0.5.23 keeps back room for what is drafted as
    well, seen on its refusals: max(TOPK x STEPS, VERIFY)."""
    return CONTEXT_MARGIN + max(topk * steps, num_draft_tokens)


class ServerSession:
    """A launched server. One request per call and thread."""

    batched = False

    def __init__(
        self,
        options: ServingOptions,
        temperature: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        open_server: Callable[[ServingOptions], ServingSession] = ServingSession,
    ) -> None:
        self.options, self.temperature, self.clock = options, temperature, clock
        looks_ahead = (options.num_steps, options.topk, options.num_draft_tokens) if options.speculative else (0, 0, 0)
        self.context_length = options.max_length - reserved_tokens(*looks_ahead)
        self.engine = SERVING_ENGINES[options.backend]
        self._server = open_server(options)
        self._http = HttpLoop()
        self._before = Counters()

    def begin(self) -> None:
        """Forget the prefixes of earlier runs, so that no run reads what another has computed; start counting."""
        if (flush := self.engine.flush_request()) is not None:
            method, path = flush
            self._run(self._http.request(method, self._server.url + path, timeout_s=60))
        self._before = self._totals()

    def generate(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer requests one after the other (call it from several threads). Raises EngineError."""
        return [self._run(self._answer(ask)) for ask in asks]

    def counters(self) -> Counters:
        """Passes over the whole server since `begin`, where the engine counts so."""
        now = self._totals()
        if now.passes is None:
            return Counters()
        before = [*self._before.accepted_at, *[0] * len(now.accepted_at)]
        return Counters(now.passes - (self._before.passes or 0), tuple(n - b for n, b in zip(now.accepted_at, before)))

    def close(self) -> None:
        """Stop the server."""
        self._http.close()
        self._server.close()

    def _totals(self) -> Counters:
        if not self.options.speculative or self.engine.metrics_path is None:
            return Counters()
        found = self.engine.read_metrics(self._run(self._http.get_text(self._server.url + self.engine.metrics_path)))
        return Counters(found.num_passes, found.accepted_at)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._http.run(work)
        except HttpFailure as error:
            broken = "an answer broke off: " if error.reason in ("half-body", "disconnected") else ""
            raise EngineError(f"{broken}{error}; log: {self._server.log_path}") from None

    async def _answer(self, ask: Ask) -> Reply:
        path, body = self.engine.generate_request(ask.token_ids, ask.max_new_tokens, self.temperature)
        url = self._server.url + path
        start = self.clock()
        times: list[float] = []
        chunks: list[bytes] = []
        async for chunk in self._http.stream(url, {**body, "stream": True}, REQUEST_SECONDS):
            times.append(self.clock() - start)
            if self.engine.cumulative_stream and len(chunks) > 1:
                chunks[-1] = chunk
            else:
                chunks.append(chunk)
        if not chunks:
            raise EngineError(f"{url}: an answer without a token; log: {self._server.log_path}")
        try:
            found = self.engine.read_generation([json.loads(chunk) for chunk in chunks], self.options.speculative)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EngineError(f"{url}: a reply that is not understood ({error!r})") from None
        counted = found.acceptance
        passes, accepted_at = (counted.num_passes, counted.accepted_at) if counted is not None else (None, ())
        return Reply(
            found.token_ids, passes, accepted_at, times[0], times[-1], found.finish_reason, found.num_first_tokens
        )
