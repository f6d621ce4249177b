"""Several servers as one: requests go where a place is free, a server that dies is left out until it answers again.

live  -- cannot connect, or FAILURES_IN_A_ROW broken replies -->  down  -- a probe is answered -->  live
live  -- refuses the key, or broke the first FAILURES_IN_A_ROW replies -->  down for good
down, all of them, for `wait_s` seconds: EngineError (the script ends with exit code 2; what was answered is kept)

A place is one request that may be in flight at a server. Free places wait in a queue; those of a server that is down
are set aside, those of one that asked for a pause return after it.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from specforge_lite.core.errors import ConfigError, EngineError, suggest
from specforge_lite.core.http import ServerGone, backoff_seconds
from specforge_lite.core.log import info, warn
from specforge_lite.regenerate.client import ChatClient
from specforge_lite.regenerate.turns import Answer, Question, RequestFailed

FAILURES_IN_A_ROW = 16
FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS = 0.5, 30.0
LONGEST_PAUSE_SECONDS = 120.0
REFUSALS = ("http-401", "http-403")  # the same for every row: the server is of no use
# Not retried, but no fault of the row either; a 400 or 413 may be, so it says nothing about the server.
SERVER_FAULTS = ("http-404", "http-405", "redirect", "compressed")


@dataclass
class Server:
    """One server's standing. num_aside: places set aside while it is down; not_before: loop time of the next."""

    client: ChatClient
    in_flight: int = 0
    num_aside: int = 0
    failures_in_a_row: int = 0
    num_answers: int = 0
    num_times_down: int = 0
    is_down: bool = False
    is_refused: bool = False
    down_reason: str = ""
    not_before: float = 0.0
    probe: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.client.address.name


class ServerPool:
    """Answers questions with `max_concurrency` requests in flight per server; retries with back-off.

    Lives in one event loop. Raises EngineError once no server has been reachable for `wait_s` seconds.
    """

    def __init__(
        self, clients: list[ChatClient], max_concurrency: int, max_retries: int, retry_base_s: float, wait_s: float
    ) -> None:
        self.servers = [Server(client) for client in clients]
        self.num_places = max_concurrency * len(clients)
        self.max_retries, self.retry_base_s, self.wait_s = max_retries, retry_base_s, wait_s
        self.model = ""
        self._places: asyncio.Queue[Server | None] = asyncio.Queue()  # None: no server is left
        for _ in range(max_concurrency):
            for server in self.servers:
                self._places.put_nowait(server)
        self._end_timer: asyncio.TimerHandle | None = None
        self._jitter = random.Random(0)

    @property
    def status(self) -> str:
        """For the progress bar: in flight, and how many servers are live."""
        live = sum(not s.is_down for s in self.servers)
        return f"in flight {sum(s.in_flight for s in self.servers)}, servers {live}/{len(self.servers)}"

    async def start(self, model_name: str | None) -> None:
        """Ask every server for its models. Raises EngineError if none answers, ConfigError for an unknown model."""
        listed = await asyncio.gather(*(self._first_contact(server) for server in self.servers))
        if all(server.is_down for server in self.servers):
            raise EngineError(self._no_server_left())
        names = sorted({name for models in listed for name in models or []})
        if model_name is None:
            if len(names) != 1:
                found = f"the servers list {len(names)} models" + (f": {', '.join(names[:10])}" if names else "")
                raise ConfigError(f"model_name: required, {found}")
            model_name = names[0]
        elif names and model_name not in names:
            raise ConfigError(f"model_name: no server has '{model_name}'{suggest(model_name, names)}")
        self.model = model_name

    async def answer(self, question: Question) -> Answer:
        """Ask until answered. Raises RequestFailed after `max_retries` more attempts, EngineError without servers."""
        attempt = 0
        while True:
            server = await self._take_place()
            server.in_flight += 1
            try:
                answer = await server.client.ask(self.model, question)
                server.failures_in_a_row = 0
                server.num_answers += 1
                return answer
            except ServerGone as error:
                self._take_down(server, str(error))
                continue  # not the row's fault: no attempt is counted
            except RequestFailed as error:
                self._count_failure(server, error)
                if error.reason in REFUSALS:
                    continue
                attempt += 1
                if not error.retryable or attempt > self.max_retries:
                    detail = f"{error.detail} (attempt {attempt})" if attempt > 1 else error.detail
                    raise RequestFailed(error.reason, detail, error.retryable) from None
            finally:
                server.in_flight -= 1
                self._places.put_nowait(server)
            await asyncio.sleep(backoff_seconds(attempt, self.retry_base_s, LONGEST_PAUSE_SECONDS, self._jitter))

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

    def _count_failure(self, server: Server, error: RequestFailed) -> None:
        if error.reason in REFUSALS:
            self._take_down(server, str(error), for_good=True)
            return
        if error.retry_after is not None:
            pause = min(error.retry_after, LONGEST_PAUSE_SECONDS)
            server.not_before = max(server.not_before, asyncio.get_running_loop().time() + pause)
        if error.reason != "http-429" and (error.retryable or error.reason in SERVER_FAULTS):
            server.failures_in_a_row += 1
            if server.failures_in_a_row >= FAILURES_IN_A_ROW:
                reason = f"{server.failures_in_a_row} failures in a row, the last: {error}"
                self._take_down(server, reason, for_good=server.num_answers == 0)

    def _take_down(self, server: Server, reason: str, for_good: bool = False) -> None:
        server.is_refused = server.is_refused or for_good
        if server.is_down:
            return
        server.is_down, server.down_reason = True, reason
        server.num_times_down += 1
        warn(f"server {server.name} is out of rotation{' for good' if for_good else ''}: {reason}")
        if not server.is_refused:
            server.probe = asyncio.create_task(self._probe_until_back(server))
        if all(s.is_down for s in self.servers):
            wait_s = 0.0 if all(s.is_refused for s in self.servers) else self.wait_s
            self._end_timer = asyncio.get_running_loop().call_later(wait_s, self._places.put_nowait, None)

    async def _probe_until_back(self, server: Server) -> None:
        attempt = server.num_times_down
        while True:
            await asyncio.sleep(backoff_seconds(attempt, FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS))
            attempt += 1
            try:
                await server.client.list_models()
            except ServerGone:
                continue
            except RequestFailed as error:
                server.is_refused, server.down_reason = True, str(error)
                return
            break
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

    async def _first_contact(self, server: Server) -> list[str] | None:
        try:
            return await server.client.list_models()
        except RequestFailed as error:
            self._take_down(server, str(error), for_good=True)
        except ServerGone as error:
            self._take_down(server, str(error))
        return None
