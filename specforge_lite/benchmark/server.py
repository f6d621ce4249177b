"""The benchmark's serving engines: a real SGLang or vLLM, asked over HTTP as users do, answers streamed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from specforge_lite.benchmark.measure import Ask
from specforge_lite.benchmark.statistics import Counters
from specforge_lite.serving.engine import Generation
from specforge_lite.serving.launch import CONTEXT_MARGIN
from specforge_lite.serving.session import ServingSession


def reserved_tokens(steps: int, topk: int, num_draft_tokens: int) -> int:
    """Context that a server does not give to prompt and answer. SGLang 0.5.23 keeps back room for what is drafted as
    well, seen on its refusals: max(TOPK x STEPS, VERIFY)."""
    return CONTEXT_MARGIN + max(topk * steps, num_draft_tokens)


class ServerSession:
    """A launched server, which is stopped with it. One request per call and thread."""

    batched = False
    clock = staticmethod(time.perf_counter)

    def __init__(self, server: ServingSession) -> None:
        self._server, options = server, server.options
        looks_ahead = (options.num_steps, options.topk, options.num_draft_tokens) if options.speculative else (0, 0, 0)
        self.context_length = options.max_length - reserved_tokens(*looks_ahead)

    def begin(self) -> None:
        """Forget the prefixes of earlier runs, so that no run reads what another has computed; start counting."""
        self._server.flush()
        self._server.reset_acceptance()

    def generate(self, asks: Sequence[Ask]) -> list[Generation]:
        """Answer requests one after the other (call it from several threads). Raises EngineError."""
        return [self._server.answer(ask.token_ids, ask.max_new_tokens, ask.temperature) for ask in asks]

    def counters(self) -> Counters:
        """Passes over the whole server since `begin`, where the engine counts so."""
        if not self._server.counts_by_server:
            return Counters()
        found = self._server.acceptance()
        return Counters(found.num_passes, found.accepted_at)

    def close(self) -> None:
        """Stop the server."""
        self._server.close()
