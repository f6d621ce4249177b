"""The benchmark's serving engines: a real SGLang or vLLM, asked over HTTP as users do, answers streamed.

Verification passes: SGLang reports each request's in its last chunk. vLLM counts over the whole server; a request's
passes, read from the chunks of its stream, count only if those of a run add up to the server's own count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from specforge_lite.benchmark.session import Ask, Counters, Reply
from specforge_lite.core.errors import EngineError
from specforge_lite.serving.environment import SERVING_ENGINES
from specforge_lite.serving.launch import CONTEXT_MARGIN
from specforge_lite.serving.session import ServingOptions, ServingSession

REQUEST_SECONDS = 1800.0


def reserved_tokens(steps: int, topk: int, num_draft_tokens: int) -> int:
    """Context that a server does not give to prompt and answer. SGLang 0.5.23 keeps back room for what is drafted as
    well, seen on its refusals: max(TOPK x STEPS, VERIFY)."""
    return CONTEXT_MARGIN + max(topk * steps, num_draft_tokens)


class ServerSession:
    """A launched server. One request per call and thread; connections are per call."""

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
        place = urlsplit(self._server.url)
        assert place.hostname is not None
        assert place.port is not None
        self._host, self._port = place.hostname, place.port
        self._before = Counters()

    def begin(self) -> None:
        """Forget the prefixes of earlier runs, so that no run reads what another has computed; start counting."""
        if (flush := self.engine.flush_request()) is not None:
            self._fetch(*flush)
        self._before = self._totals()

    def generate(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer requests one after the other (call it from several threads). Raises EngineError."""
        return [self._answer(ask) for ask in asks]

    def counters(self) -> Counters:
        """Passes over the whole server since `begin`, where the engine counts so."""
        now = self._totals()
        if now.passes is None:
            return Counters()
        before = [*self._before.accepted_at, *[0] * len(now.accepted_at)]
        return Counters(now.passes - (self._before.passes or 0), tuple(n - b for n, b in zip(now.accepted_at, before)))

    def close(self) -> None:
        """Stop the server."""
        self._server.close()

    def _totals(self) -> Counters:
        if not self.options.speculative or self.engine.metrics_path is None:
            return Counters()
        status, text = self._fetch("GET", self.engine.metrics_path)
        if status != 200:
            raise EngineError(f"{self._server.url}{self.engine.metrics_path}: HTTP {status}")
        found = self.engine.read_metrics(text)
        return Counters(found.num_passes, found.accepted_at)

    def _answer(self, ask: Ask) -> Reply:
        path, body = self.engine.generate_request(ask.token_ids, ask.max_new_tokens, self.temperature)
        start = self.clock()
        times: list[float] = []
        chunks: list[bytes] = []
        for line in self._stream(path, {**body, "stream": True}):
            times.append(self.clock() - start)
            if self.engine.cumulative_stream and len(chunks) > 1:
                chunks[-1] = line
            else:
                chunks.append(line)
        if not chunks:
            raise EngineError(f"{self._server.url}: an answer without a token; log: {self._server.log_path}")
        try:
            parsed = [json.loads(chunk) for chunk in chunks]
            found = self.engine.read_generation(parsed, self.options.speculative)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EngineError(f"{self._server.url}: a reply that is not understood ({error!r})") from None
        passes, accepted_at = (
            (None, ()) if found.acceptance is None else (found.acceptance.num_passes, found.acceptance.accepted_at)
        )
        return Reply(
            found.token_ids, passes, accepted_at, times[0], times[-1], found.finish_reason, found.num_first_tokens
        )

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        """Payloads of the server-sent events of a POST, as they come."""
        connection = HTTPConnection(self._host, self._port, timeout=REQUEST_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise EngineError(f"{self._server.url}{path}: HTTP {response.status}: {_one_line(response.read(2000))}")
            for line in response:
                payload = line.removeprefix(b"data:").strip()
                if payload == b"[DONE]":
                    return
                if line.startswith(b"data:"):
                    yield payload
            # `http.client` ends the iteration without an error where a chunked body breaks off.
            raise EngineError(f"{self._server.url}: an answer broke off; log: {self._server.log_path}")
        except (OSError, HTTPException) as error:
            log = self._server.log_path
            raise EngineError(f"{self._server.url}: {type(error).__name__}: {error}; log: {log}") from None
        finally:
            connection.close()

    def _fetch(self, method: str, path: str) -> tuple[int, str]:
        connection = HTTPConnection(self._host, self._port, timeout=60)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        except (OSError, HTTPException) as error:
            raise EngineError(f"{self._server.url}{path}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()


def _one_line(body: bytes) -> str:
    return " ".join(body.decode("utf-8", "replace").split())[:300]
