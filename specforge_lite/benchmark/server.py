"""The benchmark's serving engines: a real SGLang or vLLM, asked over HTTP as users do, answers streamed.

What is known of verification passes:
- SGLang tells each request's passes (`spec_verify_ct`) and how many of them accepted 0, 1, ... drafted tokens
  (`spec_correct_drafts_histogram`) in its last chunk.
- vLLM counts over the whole server (/metrics). A chunk of its stream is what one engine step gave, unless the server
  joined two because the client was slow: a request's passes are told only if all chunks of a run add up to the
  server's own count.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from specforge_lite.benchmark.session import Ask, Counters, Reply
from specforge_lite.core.errors import EngineError
from specforge_lite.serving.session import ServingOptions, ServingSession

REQUEST_SECONDS = 1800.0
CONTEXT_MARGIN = 8  # tokens servers keep back beside prompt and answer (serving/launch.py)


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
        self.dialect = DIALECTS[options.backend]()
        self._server = open_server(options)
        place = urlsplit(self._server.url)
        assert place.hostname is not None
        assert place.port is not None
        self._host, self._port = place.hostname, place.port
        self._before = Counters()

    def begin(self) -> None:
        """Forget the prefixes of earlier runs, so that no run reads what another has computed; start counting."""
        self.dialect.forget(self._fetch)
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
        return self.dialect.totals(self._fetch) if self.options.speculative else Counters()

    def _answer(self, ask: Ask) -> Reply:
        path, body = self.dialect.request(ask, self.temperature)
        start = self.clock()
        times: list[float] = []
        chunks: list[bytes] = []
        for line in self._stream(path, body):
            times.append(self.clock() - start)
            if self.dialect.cumulative and len(chunks) > 1:
                chunks[-1] = line
            else:
                chunks.append(line)
        if not chunks:
            raise EngineError(f"{self._server.url}: an answer without a token; log: {self._server.log_path}")
        try:
            parsed = [json.loads(chunk) for chunk in chunks]
            reply = self.dialect.reply(parsed, self.options.speculative)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EngineError(f"{self._server.url}: a reply that is not understood ({error!r})") from None
        return replace(reply, first_token_seconds=times[0], seconds=times[-1])

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


Fetch = Callable[[str, str], tuple[int, str]]


class SglangDialect:
    """`/generate`; every chunk repeats the answer so far, so only the last one is read."""

    cumulative = True

    def request(self, ask: Ask, temperature: float) -> tuple[str, dict[str, Any]]:
        params = {"max_new_tokens": ask.max_new_tokens, "temperature": temperature}
        return "/generate", {"input_ids": list(ask.token_ids), "sampling_params": params, "stream": True}

    def reply(self, chunks: Sequence[dict[str, Any]], speculative: bool) -> Reply:
        if "error" in chunks[-1]:
            raise EngineError(f"sglang: {_message(chunks[-1]['error'])}")
        facts, tokens = chunks[-1]["meta_info"], list(chunks[-1]["output_ids"])
        if len(tokens) != facts["completion_tokens"]:
            raise ValueError(f"{len(tokens)} token ids, completion_tokens {facts['completion_tokens']}")
        histogram = list(facts.get("spec_correct_drafts_histogram") or [])
        accepted_at = tuple(sum(histogram[k:]) for k in range(1, len(histogram)))
        passes = int(facts.get("spec_verify_ct", 0)) if speculative else None
        reason = (facts.get("finish_reason") or {}).get("type", "")
        at_first = len(chunks[0]["output_ids"])
        return Reply(tuple(tokens), passes, accepted_at, 0.0, 0.0, str(reason), at_first)

    def forget(self, fetch: Fetch) -> None:
        fetch("POST", "/flush_cache")

    def totals(self, fetch: Fetch) -> Counters:
        return Counters()  # every request tells its own


class VllmDialect:
    """`/v1/completions`; a chunk holds the new tokens of one engine step."""

    cumulative = False

    def request(self, ask: Ask, temperature: float) -> tuple[str, dict[str, Any]]:
        body = {"prompt": list(ask.token_ids), "max_tokens": ask.max_new_tokens, "temperature": temperature}
        return "/v1/completions", {**body, "return_token_ids": True, "stream": True}

    def reply(self, chunks: Sequence[dict[str, Any]], speculative: bool) -> Reply:
        if "error" in chunks[-1]:
            raise EngineError(f"vllm: {_message(chunks[-1]['error'])}")
        choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
        steps = [list(choice.get("token_ids") or []) for choice in choices]
        steps = [step for step in steps if step]
        accepted = [len(step) - 1 for step in steps[1:]]  # the first comes from the prompt's own pass
        accepted_at = tuple(sum(n > k for n in accepted) for k in range(max(accepted, default=0)))
        tokens = tuple(token for step in steps for token in step)
        reason = next((str(c["finish_reason"]) for c in choices if c.get("finish_reason")), "")
        passes = len(accepted) if speculative else None
        return Reply(tokens, passes, accepted_at if speculative else (), 0.0, 0.0, reason, len(steps[0]))

    def forget(self, fetch: Fetch) -> None:
        """Nothing to do: the server is started without prefix caching."""

    def totals(self, fetch: Fetch) -> Counters:
        status, text = fetch("GET", "/metrics")
        if status != 200:
            raise EngineError(f"vllm: /metrics answered {status}")
        return parse_metrics(text)


DIALECTS: dict[str, Callable[[], SglangDialect | VllmDialect]] = {"sglang": SglangDialect, "vllm": VllmDialect}

_DRAFTS = re.compile(r"^vllm:spec_decode_num_drafts_total(?:\{[^}]*\})?\s+(\S+)", re.M)
_POSITION = re.compile(
    r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{[^}]*position="(\d+)"[^}]*\}\s+(\S+)', re.M
)


def parse_metrics(text: str) -> Counters:
    """vLLM's Prometheus page -> passes and accepted tokens per position, summed over its engines."""
    positions: dict[int, float] = {}
    for position, value in _POSITION.findall(text):
        positions[int(position)] = positions.get(int(position), 0.0) + float(value)
    accepted_at = tuple(int(positions.get(k, 0)) for k in range(max(positions, default=-1) + 1))
    return Counters(int(sum(float(value) for value in _DRAFTS.findall(text))), accepted_at)


def _message(error: Any) -> str:
    """What a server says inside an event."""
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or error).split())[:300]


def _one_line(body: bytes) -> str:
    return " ".join(body.decode("utf-8", "replace").split())[:300]
