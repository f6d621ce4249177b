"""A small HTTP client for many requests at once, usable from plain threads: one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import aiohttp

from specforge_lite.core.errors import EngineError, first_line

# For a whole reply, from the request to its last byte: a server that sends a byte now and then does not extend it.
REQUEST_SECONDS = 600.0
FACTS_SECONDS = 30.0
MAX_REPLY_BYTES = 256 << 20
ResultT = TypeVar("ResultT")


class ServerGone(Exception):
    """No connection, or it broke before the reply was complete."""


class BadReply(Exception):
    """The server answered, but with no reply: not JSON, too long, or not complete in time."""


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

    async def post_json(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST and parse the reply. Raises ServerGone, HttpStatus or BadReply."""
        return await self._request("POST", url, body, REQUEST_SECONDS)

    async def get_json(self, url: str) -> dict[str, Any]:
        """GET and parse the reply. Raises ServerGone, HttpStatus or BadReply."""
        return await self._request("GET", url, None, FACTS_SECONDS)

    async def get_text(self, url: str) -> str:
        """GET a body as it is. Raises ServerGone, HttpStatus or BadReply."""
        return (await self._read("GET", url, None, FACTS_SECONDS)).decode("utf-8", "replace")

    async def answers(self, url: str) -> bool:
        """True if a GET answers 200 within 5 seconds."""
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with self._session.get(url, timeout=timeout, allow_redirects=False) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _request(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        data = await self._read(method, url, body, timeout_s)
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadReply(f"{url}: the reply is not JSON: {first_line(error)}") from None
        if not isinstance(parsed, dict):
            raise BadReply(f"{url}: the reply is not a JSON object but {type(parsed).__name__}")
        return parsed

    async def _read(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=30)
        try:
            # A redirect would send the samples to whomever the server names.
            async with self._session.request(method, url, json=body, timeout=timeout, allow_redirects=False) as reply:
                data = await _read_body(reply, url)
        except aiohttp.ConnectionTimeoutError as error:
            raise ServerGone(f"{url}: {type(error).__name__}: {error}") from None
        except TimeoutError:
            raise BadReply(f"{url}: no complete reply within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"{url}: {type(error).__name__}: {first_line(error)}") from None
        if 300 <= reply.status < 400:
            raise HttpStatus(reply.status, f"redirects to {reply.headers.get('Location')!r}, which is not followed")
        if reply.status != 200:
            raise HttpStatus(reply.status, _message(data.decode("utf-8", "replace")))
        return data

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


async def _read_body(reply: aiohttp.ClientResponse, url: str) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in reply.content.iter_any():
        size += len(chunk)
        if size > MAX_REPLY_BYTES:
            reply.close()
            raise BadReply(f"{url}: the reply is longer than {MAX_REPLY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _message(text: str) -> str:
    """The human part of an error body: OpenAI's and SGLang's shapes, else the text itself."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = text
    while isinstance(body, dict):
        body = body.get("message") or body.get("error") or body.get("detail") or json.dumps(body)
    return " ".join(str(body).split())[:300]
