"""The TargetEngine that talks to SGLang or vLLM servers; what differs between the two is a `CaptureDialect`.

prefetch worker -> capture(batch) -> one task per sample on the HTTP loop -> server -> plugin -> tmpfs / Mooncake
                                     at most `requests_in_flight` at once   <- reply names the key <-+
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from specforge_lite.capture import transport
from specforge_lite.capture.base import TargetInfo, check_capture, check_sample
from specforge_lite.capture.transport import LostSample, NoSpace, Transport, open_transport
from specforge_lite.core.errors import CaptureError, EngineError
from specforge_lite.core.http import BadReply, HttpLoop, HttpStatus, ServerGone, backoff_seconds
from specforge_lite.core.log import format_seconds, warn
from specforge_lite.types import CapturedStates, TokenizedSample

# Of the capture plugin (serving/plugins): what it writes and replies may change with it.
PLUGIN_VERSION = "0.3.0"
MAX_ATTEMPTS = 6
# Connections of one sample that may break while the server's health path answers.
MAX_BREAKS = 20
PROBE_TOKENS = 16
NUM_PROBES = 4
POLL_SECONDS = 0.5
RETRY_SECONDS = 0.2
SPACE_HINT = "; lower --requests-in-flight or --max-length, or enlarge the transport's memory"


class CaptureDialect(Protocol):
    """How to ask one kind of server for hidden states."""

    name: str
    health_path: str

    def capture_request(self, token_ids: list[int], key: str) -> tuple[str, dict[str, Any]]:
        """Path and JSON body of the request for one sample; one token is generated, greedily."""

    def capture_reply(self, reply: dict[str, Any]) -> tuple[dict[str, Any] | None, int | None]:
        """The plugin's part of the reply, None if it was not at work; and the token that follows the sample, None if
        the reply does not hold it."""

    def output_layer_ids(self, server_layer_ids: Sequence[int]) -> tuple[int, ...]:
        """The engine's layer ids in our convention (layer outputs)."""

    async def read_max_length(self, http: HttpLoop, url: str) -> int:
        """Tokens of the longest prompt that the server accepts. Raises ConfigError or EngineError for a version or a
        setting that makes capture impossible."""


@dataclass(frozen=True)
class ProbeReply:
    """What a server answered to one probe sample. next_token: its own greedy continuation, None if not reported."""

    url: str
    states: CapturedStates
    next_token: int | None


class Server(Protocol):
    """A server that this process launched: its owner restarts it and deletes what it leaves behind."""

    restarts: int
    failure: str | None
    """Set when it will not come back: what happened, in one line."""

    def stop(self) -> None:
        """End it and delete its files; may be called twice."""


class RemoteEngine:
    """Hidden states from one or several servers that run the same target.

    `capture` may be called from `max_concurrency` threads; together they keep at most `requests_in_flight` requests
    with the servers. wait_minutes: how long a server that does not answer is waited for.
    """

    def __init__(
        self,
        dialect: CaptureDialect,
        info: TargetInfo,
        urls: Sequence[str],
        place: str | None,
        requests_in_flight: int,
        wait_minutes: float,
        server: Server | None = None,
    ) -> None:
        self.info = info
        self.max_concurrency = requests_in_flight
        self._dialect = dialect
        self._urls = list(urls)
        self._next_url = itertools.cycle(self._urls)
        self._wait_minutes = wait_minutes
        self._server = server
        self._place = place
        self._transports: dict[str, Transport] = {}
        self._warned: set[str] = set()
        self._closed = False
        self._http = HttpLoop(requests_in_flight + 2)
        self._slots = asyncio.Semaphore(requests_in_flight)

    def probe(self) -> list[ProbeReply]:
        """Ask every server about itself and for a few samples; raises EngineError or CaptureError if it will not do.

        Sets `info.max_length` to what all servers accept.
        """
        limits, replies = [self.info.max_length], []
        for url in self._urls:
            limits.append(self._http.run(self._ask_max_length(url)))
            length = min(PROBE_TOKENS, limits[-1])
            for number in range(NUM_PROBES):
                # The upper part of a vocabulary holds special tokens, images' placeholders among them.
                ids = (torch.arange(length) * (7 + 30 * number) + number) % max(1, self.info.vocab_size * 3 // 4)
                sample = TokenizedSample("probe", ids, torch.ones(length, dtype=torch.bool))
                states, next_token = self._http.run(self._capture_one(sample, url))
                check_capture(sample, states, self.info)
                if not (torch.isfinite(states.aux_LAH).all() and torch.isfinite(states.last_LH).all()):
                    raise CaptureError(f"{url}: the probe's hidden states are not finite")
                replies.append(ProbeReply(url, states, next_token))
        self.info = replace(self.info, max_length=min(limits))
        return replies

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """See TargetEngine. Samples of a call are asked for at the same time."""
        for sample in samples:
            check_sample(sample, self.info)
        futures = [self._http.submit(self._capture_one(sample, next(self._next_url))) for sample in samples]
        try:
            states = [future.result()[0] for future in futures]
        except CancelledError:
            raise EngineError("the engine was closed") from None
        finally:
            for future in futures:
                future.cancel()
        for sample, state in zip(samples, states, strict=True):
            check_capture(sample, state, self.info)
        return states

    def health(self) -> str:
        """What is out of order, in a few words for the trainer's step line; empty when nothing is."""
        if self._server is not None and self._server.restarts:
            return f"engine restarted {self._server.restarts}x"
        return ""

    def close(self) -> None:
        """Cancel what is in flight, stop a launched server, delete the run's directory; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._http.close()
        if self._server is not None:
            self._server.stop()
        for opened in self._transports.values():
            opened.close()

    async def _capture_one(self, sample: TokenizedSample, url: str) -> tuple[CapturedStates, int | None]:
        """The states of a sample and the token that the server would continue it with."""
        place = f"{self.info.engine}: sample {sample.sample_id}"
        token_ids = sample.input_ids_L.tolist()
        attempt = breaks = 0
        async with self._slots:
            while True:
                try:
                    found, next_token = await self._ask(token_ids, url)
                    layer_ids = self._dialect.output_layer_ids(found.aux_layer_ids)
                    return replace(found, sample_id=sample.sample_id, aux_layer_ids=layer_ids), next_token
                except ServerGone as error:
                    breaks += 1
                    if breaks > MAX_BREAKS:
                        raise CaptureError(
                            f"{place}: the connection broke {breaks} times, although the server answers its health"
                            f" path: {error}"
                        ) from None
                    await self._wait_until_back(url, str(error))
                    url = next(self._next_url)
                except (LostSample, HttpStatus, BadReply) as error:
                    attempt += 1
                    if attempt >= MAX_ATTEMPTS:
                        hint = SPACE_HINT if isinstance(error, NoSpace) else ""
                        where = "" if url in str(error) else f" ({url})"
                        raise CaptureError(f"{place}: asked {attempt} times, {error}{hint}{where}") from None
                    self._warn_once(f"sample {sample.sample_id}: {error}; asking again")
                    await asyncio.sleep(backoff_seconds(attempt, RETRY_SECONDS, 10.0))

    async def _ask(self, token_ids: list[int], url: str) -> tuple[CapturedStates, int | None]:
        key = secrets.token_hex(16)
        path, body = self._dialect.capture_request(token_ids, key)
        try:
            reply = await self._http.post_json(url + path, body)
        except HttpStatus as error:
            if error.status < 500 and error.status != 429:
                raise CaptureError(f"{url}: {error}") from None
            raise
        try:
            facts, next_token = self._dialect.capture_reply(reply)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise BadReply("wrong-form", f"a reply that is not understood ({error!r})", url) from None
        if not isinstance(facts, dict):
            raise CaptureError(
                f"{url}: the reply holds no captured sample, so the capture plugin is not at work in this server;"
                f" see docs/topologies.md for how to start one (SPECFORGE_CAPTURE must be set, the plugin installed)"
            )
        if "error" in facts:
            raise CaptureError(f"{url}: {facts['error']}")
        if facts.get("plugin") != PLUGIN_VERSION:
            raise CaptureError(f"{url}: capture plugin {facts.get('plugin')}, expected {PLUGIN_VERSION}")
        return await self._transport(str(facts.get("place")), url).take(key, transport.TAKE_SECONDS), next_token

    def _transport(self, place: str, url: str) -> Transport:
        if self._place is not None and not place.startswith(self._place):
            kind = place.partition(":")[0]
            hint = f"; add --transport {kind}" if not self._place.startswith(kind) else f", expected {self._place}"
            raise CaptureError(f"{url}: the server stores to {place}{hint}")
        if place not in self._transports:
            self._transports[place] = open_transport(place)
        return self._transports[place]

    async def _ask_max_length(self, url: str) -> int:
        try:
            return await self._dialect.read_max_length(self._http, url)
        except (ServerGone, HttpStatus, BadReply) as error:
            raise EngineError(f"{url}: not a {self._dialect.name} server that answers ({error})") from None
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(f"{url}: its report about itself is not understood ({error!r})") from None

    async def _wait_until_back(self, url: str, reason: str) -> None:
        """Return when the server answers its health path again, or another of several does."""
        start = time.monotonic()
        limit = 60 * self._wait_minutes
        if self._server is None:
            self._warn_once(f"{reason}; waiting up to {format_seconds(limit)} (--dist-timeout)")
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if self._server is not None and self._server.failure is not None:
                raise EngineError(self._server.failure)
            for candidate in self._urls:
                if await self._http.answers(candidate + self._dialect.health_path):
                    return
            if time.monotonic() - start > limit:
                raise EngineError(f"{url}: no answer for {format_seconds(limit)} (--dist-timeout)")

    def _warn_once(self, message: str) -> None:
        """Warn, but not once per request in flight for the same trouble."""
        kind = message.rpartition(": ")[2][:40]
        if kind not in self._warned:
            self._warned.add(kind)
            warn(f"{self.info.engine}: {message}")
