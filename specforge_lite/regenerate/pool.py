"""Several servers as one: requests go where a place is free, a server that dies is left out until it answers again.

live  -- cannot connect, or FAILURES_IN_A_ROW broken replies -->  down  -- a probe is answered -->  live
live  -- refuses the key, or broke the first FAILURES_IN_A_ROW replies -->  down for good
down, all of them, for `server_wait` seconds: EngineError (exit code 2; what was answered is kept)

A place is one request that may be in flight at a server. Free places wait in a queue; those of a server that is down
are set aside, those of one that asked for a pause return after it.
"""

from __future__ import annotations

import asyncio
import random

from specforge_lite.core.errors import ConfigError, EngineError, suggest
from specforge_lite.core.http import HttpClient, HttpFailure, backoff_seconds
from specforge_lite.core.log import info, warn
from specforge_lite.regenerate.client import REFUSALS, Server, parse_address
from specforge_lite.regenerate.settings import BackendSection
from specforge_lite.regenerate.turns import Answer, Question, RequestFailed

FAILURES_IN_A_ROW = 16
FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS = 0.5, 30.0
LONGEST_PAUSE_SECONDS = 120.0
# Not retried, but no fault of the row either; a 400 or 413 may be, so it says nothing about the server.
SERVER_FAULTS = ("http-404", "http-405", "redirect", "compressed")


class ServerPool:
    """Answers questions with `max_concurrency` requests in flight per server; retries with back-off.

    Lives in one event loop. Raises EngineError once no server has been reachable for `server_wait` seconds.
    """

    def __init__(self, config: BackendSection, http: HttpClient) -> None:
        self.config, self.model = config, ""
        self.servers = [
            Server(http, name, parse_address(name), config.request_timeout, config.extra_body)
            for name in dict.fromkeys(config.server_address_port)
        ]
        self.num_places = config.max_concurrency * len(self.servers)
        self._places: asyncio.Queue[Server | None] = asyncio.Queue()  # None: no server is left
        for server in self.servers * config.max_concurrency:
            self._places.put_nowait(server)
        self._end_timer: asyncio.TimerHandle | None = None
        self._jitter = random.Random(0)

    @property
    def status(self) -> str:
        """For the progress bar: in flight, and how many servers are live."""
        live = sum(not s.is_down for s in self.servers)
        return f"in flight {sum(s.in_flight for s in self.servers)}, servers {live}/{len(self.servers)}"

    async def start(self) -> None:
        """Ask every server for its models. Raises EngineError if none answers, ConfigError for an unknown model."""
        replies = await asyncio.gather(*(s.list_models() for s in self.servers), return_exceptions=True)
        names: set[str] = set()
        for server, reply in zip(self.servers, replies):
            if isinstance(reply, HttpFailure):
                self._take_down(server, reply, for_good=reply.reason in (*REFUSALS, "redirect"))
            elif isinstance(reply, BaseException):
                raise reply
            else:
                names.update(reply or ())
        if all(server.is_down for server in self.servers):
            raise EngineError(self._no_server_left())
        wanted = self.config.model_name
        if wanted is None and len(names) != 1:
            listed = f": {', '.join(sorted(names)[:10])}" if names else ""
            raise ConfigError(f"model_name: required, the servers list {len(names)} models{listed}")
        if wanted is not None and names and wanted not in names:
            raise ConfigError(f"model_name: no server has '{wanted}'{suggest(wanted, names)}")
        self.model = wanted or names.pop()

    async def answer(self, question: Question) -> Answer:
        """Ask until answered. Raises RequestFailed after `max_retries` more attempts, EngineError without servers."""
        attempt = 0
        while True:
            server = await self._take_place()
            server.in_flight += 1
            try:
                answer = await server.ask(self.model, question)
                server.failures_in_a_row = 0
                server.num_answers += 1
                return answer
            except HttpFailure as error:
                self._count_failure(server, error)
                if error.reason in (*REFUSALS, "unreachable"):  # not the row's fault: no attempt is counted
                    continue
                attempt += 1
                if not error.retryable or attempt > self.config.max_retries:
                    detail = f"{error.detail} (attempt {attempt})" if attempt > 1 else error.detail
                    raise RequestFailed(error.reason, detail, error.retryable) from None
            finally:
                server.in_flight -= 1
                self._places.put_nowait(server)
            pause = backoff_seconds(attempt, self.config.retry_base_seconds, LONGEST_PAUSE_SECONDS, self._jitter)
            await asyncio.sleep(pause)

    async def aclose(self) -> None:
        """Stop probing."""
        if self._end_timer is not None:
            self._end_timer.cancel()
        probes = [server.probe for server in self.servers if server.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    async def _take_place(self) -> Server:
        loop = asyncio.get_running_loop()
        while True:
            server = await self._places.get()
            if server is None:
                self._places.put_nowait(None)  # for all others that wait
                raise EngineError(self._no_server_left())
            if server.is_down:
                server.num_aside += 1
            elif server.not_before > loop.time():
                loop.call_at(server.not_before, self._places.put_nowait, server)
            else:
                return server

    def _count_failure(self, server: Server, error: HttpFailure) -> None:
        if error.reason in (*REFUSALS, "unreachable"):
            self._take_down(server, error, for_good=error.reason in REFUSALS)
            return
        retry_after = getattr(error, "retry_after", None)
        if retry_after is not None:
            pause = min(retry_after, LONGEST_PAUSE_SECONDS)
            server.not_before = max(server.not_before, asyncio.get_running_loop().time() + pause)
        if error.reason != "http-429" and (error.retryable or error.reason in SERVER_FAULTS):
            server.failures_in_a_row += 1
            if server.failures_in_a_row >= FAILURES_IN_A_ROW:
                before = f"{server.failures_in_a_row} failures in a row, the last: "
                self._take_down(server, error, for_good=server.num_answers == 0, before=before)

    def _take_down(self, server: Server, error: HttpFailure, for_good: bool, before: str = "") -> None:
        server.is_refused = server.is_refused or for_good
        if server.is_down:
            return
        server.is_down, server.down_reason = True, f"{before}{error.reason}: {error.detail}"
        server.num_times_down += 1
        warn(f"server {server.name} is out of rotation{' for good' if for_good else ''}: {server.down_reason}")
        if not server.is_refused:
            server.probe = asyncio.create_task(self._probe_until_back(server))
        if all(s.is_down for s in self.servers):
            wait_s = 0.0 if all(s.is_refused for s in self.servers) else self.config.server_wait
            self._end_timer = asyncio.get_running_loop().call_later(wait_s, self._places.put_nowait, None)

    async def _probe_until_back(self, server: Server) -> None:
        attempt = server.num_times_down
        while True:
            await asyncio.sleep(backoff_seconds(attempt, FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS))
            attempt += 1
            try:
                await server.list_models()
                break
            except HttpFailure as error:
                if error.reason in (*REFUSALS, "redirect"):
                    server.is_refused, server.down_reason = True, f"{error.reason}: {error.detail}"
                    return
        server.is_down, server.failures_in_a_row = False, FAILURES_IN_A_ROW // 2
        if self._end_timer is not None:
            self._end_timer.cancel()
        info(f"server {server.name} answers again")
        for _ in range(server.num_aside):
            self._places.put_nowait(server)
        server.num_aside = 0

    def _no_server_left(self) -> str:
        reasons = "; ".join(f"{s.name}: {s.down_reason}" for s in self.servers)
        return f"no server is left ({reasons})"
