"""A small HTTP client for many requests at once, usable from plain threads: one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import aiohttp

from specforge_lite.errors import EngineError

REQUEST_SECONDS = 600.0
ResultT = TypeVar("ResultT")


class ServerGone(Exception):
    """No connection, or it broke before the reply was complete."""


class HttpStatus(Exception):
    """The server answered with an error; `message` is its own, on one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


class HttpLoop:
    """An event loop in a daemon thread with one connection pool."""

    def __init__(self, max_connections: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()
        self._closed = False
        self._session = self.run(self._open(max_connections))

    def submit(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Start a coroutine on the loop."""
        if self._closed:
            work.close()
            raise EngineError("the engine was closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Start a coroutine on the loop and wait for it."""
        try:
            return self.submit(work).result()
        except CancelledError:
            raise EngineError("the engine was closed") from None

    async def post_json(self, url: str, body: dict[str, Any], timeout_s: float = REQUEST_SECONDS) -> dict[str, Any]:
        """POST and parse the reply. Raises ServerGone or HttpStatus."""
        return await self._request("POST", url, body, timeout_s)

    async def get_json(self, url: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """GET and parse the reply. Raises ServerGone or HttpStatus."""
        return await self._request("GET", url, None, timeout_s)

    async def get_text(self, url: str) -> str:
        """GET a body as it is. Raises ServerGone or HttpStatus."""
        return await self._read("GET", url, None, 30.0)

    async def answers(self, url: str) -> bool:
        """True if a GET answers 200 within 5 seconds."""
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _request(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        try:
            parsed: dict[str, Any] = json.loads(await self._read(method, url, body, timeout_s))
        except json.JSONDecodeError as error:
            raise ServerGone(f"{url}: not JSON: {error}") from None
        return parsed

    async def _read(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> str:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=timeout_s, sock_connect=30)
        try:
            async with self._session.request(method, url, json=body, timeout=timeout) as reply:
                text = await reply.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ServerGone(f"{url}: {type(error).__name__}: {error}") from None
        if reply.status != 200:
            raise HttpStatus(reply.status, _message(text))
        return text

    def close(self) -> None:
        """Cancel everything in flight and stop the thread; may be called twice."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _open(self, max_connections: int) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=max_connections))

    async def _shut_down(self) -> None:
        current = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()


def _message(text: str) -> str:
    """The human part of an error body: OpenAI's and SGLang's shapes, else the text itself."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = text
    while isinstance(body, dict):
        body = body.get("message") or body.get("error") or body.get("detail") or json.dumps(body)
    return " ".join(str(body).split())[:300]
