"""Several servers as one: requests go where a place is free, a server that dies is left out until it answers again.

live  -- cannot connect, or FAILURES_IN_A_ROW broken replies -->  down  -- a probe is answered -->  live
live  -- refuses the key, or broke the first FAILURES_IN_A_ROW replies -->  down for good
down, all of them, for `wait_s` seconds: EngineError (the script ends with exit code 2; what was answered is kept)
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass

from specforge_lite.core.errors import ConfigError, EngineError, suggest
from specforge_lite.core.log import info, warn
from specforge_lite.regenerate.client import ChatClient, RateLimited, ServerGone
from specforge_lite.regenerate.turns import Answer, Question, RequestFailed

FAILURES_IN_A_ROW = 16
FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS = 0.5, 30.0
LONGEST_PAUSE_SECONDS = 120.0
REFUSALS = ("http-401", "http-403")  # the same for every row: the server is of no use
# Not retried, but no fault of the row either; a 400 or 413 may be, so it says nothing about the server.
SERVER_FAULTS = ("http-404", "http-405", "redirect", "compressed")


@dataclass
class Server:
    """One server's standing. `not_before`: loop time until which it asked not to be asked."""

    client: ChatClient
    in_flight: int = 0
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
        self.max_concurrency, self.max_retries = max_concurrency, max_retries
        self.retry_base_s, self.wait_s = retry_base_s, wait_s
        self.model = ""
        self._waiting: deque[asyncio.Future[Server]] = deque()
        self._ended: EngineError | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._jitter = random.Random(0)

    @property
    def num_places(self) -> int:
        """Requests that can be in flight at once."""
        return self.max_concurrency * len(self.servers)

    @property
    def status(self) -> str:
        """For the progress bar: in flight, and how many servers are live."""
        live = sum(not s.is_down for s in self.servers)
        return f"in flight {sum(s.in_flight for s in self.servers)}, servers {live}/{len(self.servers)}"

    async def start(self, model_name: str | None) -> None:
        """Ask every server for its models. Raises EngineError if none answers, ConfigError for an unknown model."""
        listed = await asyncio.gather(*(self._first_contact(server) for server in self.servers))
        if all(server.is_down for server in self.servers):
            raise EngineError(self._all_gone())
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
        """Ask until answered. Raises RequestFailed after `max_retries` more attempts, EngineError if all are gone."""
        attempt = 0
        while True:
            server = await self._take_place()
            try:
                return await self._ask(server, question)
            except ServerGone as error:
                self._take_down(server, str(error))
                continue  # not the row's fault: no attempt is counted
            except RequestFailed as error:
                if error.reason in REFUSALS:
                    continue
                attempt += 1
                if not error.retryable or attempt > self.max_retries:
                    detail = f"{error.detail} (attempt {attempt})" if attempt > 1 else error.detail
                    raise RequestFailed(error.reason, detail, error.retryable) from None
            finally:
                server.in_flight -= 1
                self._hand_out_places()
            pause = self.retry_base_s * 2 ** (attempt - 1) * (1 + 0.25 * self._jitter.random())
            await asyncio.sleep(min(pause, LONGEST_PAUSE_SECONDS))

    async def close(self) -> None:
        """Stop probing."""
        if self._end_timer is not None:
            self._end_timer.cancel()
        probes = [server.probe for server in self.servers if server.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    # ---------------------------------------------------------------------------------------------------- one request

    async def _ask(self, server: Server, question: Question) -> Answer:
        try:
            answer = await server.client.ask(self.model, question)
        except RequestFailed as error:
            self._count_failure(server, error)
            raise
        server.failures_in_a_row = 0
        server.num_answers += 1
        return answer

    def _count_failure(self, server: Server, error: RequestFailed) -> None:
        if error.reason in REFUSALS:
            self._take_down(server, str(error), for_good=True)
            return
        if isinstance(error, RateLimited) and error.retry_after is not None:
            loop = asyncio.get_running_loop()
            server.not_before = max(server.not_before, loop.time() + min(error.retry_after, LONGEST_PAUSE_SECONDS))
            loop.call_at(server.not_before + 0.001, self._hand_out_places)
        if error.reason != "http-429" and (error.retryable or error.reason in SERVER_FAULTS):
            server.failures_in_a_row += 1
            if server.failures_in_a_row >= FAILURES_IN_A_ROW:
                reason = f"{server.failures_in_a_row} failures in a row, the last: {error}"
                self._take_down(server, reason, for_good=server.num_answers == 0)

    # -------------------------------------------------------------------------------------------------------- places

    async def _take_place(self) -> Server:
        if self._ended is not None:
            raise self._ended
        server = self._free_server()
        if server is not None:
            server.in_flight += 1
            return server
        future: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().in_flight -= 1
                self._hand_out_places()
            raise

    def _free_server(self) -> Server | None:
        now = asyncio.get_running_loop().time()
        free = [s for s in self.servers if not s.is_down and s.in_flight < self.max_concurrency and s.not_before <= now]
        return min(free, key=lambda s: s.in_flight / self.max_concurrency, default=None)

    def _hand_out_places(self) -> None:
        """Give free places to those who wait longest, one waiter per place."""
        while self._waiting:
            if self._waiting[0].done():  # cancelled while waiting
                self._waiting.popleft()
                continue
            server = self._free_server()
            if server is None:
                return
            server.in_flight += 1
            self._waiting.popleft().set_result(server)

    # -------------------------------------------------------------------------------------------------------- health

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
            self._end_timer = asyncio.get_running_loop().call_later(wait_s, self._end)

    async def _probe_until_back(self, server: Server) -> None:
        pause = FIRST_PROBE_SECONDS * 2 ** (server.num_times_down - 1)
        while True:
            await asyncio.sleep(min(pause, LONGEST_PROBE_SECONDS))
            pause *= 2
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
        self._hand_out_places()

    def _end(self) -> None:
        self._ended = EngineError(self._all_gone())
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(self._ended)

    def _all_gone(self) -> str:
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
