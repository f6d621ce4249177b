"""The HTTP client of everything that talks to a server: `HttpClient` inside an event loop, `HttpLoop` from plain
threads, `fetch` for one GET.

Nothing but the addresses given is contacted: redirects are not followed, proxies of the environment and cookies are
not used. A reply is read up to a limit and within one deadline, so that neither an endless body nor a slow drip holds
a place for long. A key is sent in a header and stands in no message.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any, TypeVar

import aiohttp

from specforge_lite.core.errors import EngineError, first_line

# For a whole reply, from the request to its last byte: a server that sends a byte now and then does not extend it.
REQUEST_SECONDS = 600.0
FACTS_SECONDS = 30.0
CONNECT_SECONDS = 30.0
HEALTH_SECONDS = 5.0
MAX_REPLY_BYTES = 256 << 20
MAX_MESSAGE = 300
RETRYABLE_STATUS = (408, 409, 425, 429)
ResultT = TypeVar("ResultT")


class HttpFailure(Exception):
    """No usable reply. `reason`: a word to count by; `detail`: one line; `retryable`: the same request may succeed."""

    def __init__(self, reason: str, detail: str, url: str = "", retryable: bool = True) -> None:
        super().__init__(f"{url}: {detail}" if url else detail)
        self.reason, self.detail, self.retryable = reason, detail, retryable


class ServerGone(HttpFailure):
    """No connection (reason `unreachable`), or it broke before the reply was complete (`disconnected`, `half-body`,
    `wrong-http`)."""


class BadReply(HttpFailure):
    """The server answered, but with no reply of use: `timeout`, `body-too-large`, `compressed`, `wrong-json`."""


class HttpStatus(HttpFailure):
    """The server answered with an error (`http-503`) or a `redirect`; `message` is its own, on one line. retry_after:
    seconds that a 429 or 503 asks to wait, None where it does not say."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        reason = "redirect" if 300 <= status < 400 else f"http-{status}"
        retryable = status >= 500 or 300 <= status < 400 or status in RETRYABLE_STATUS
        super().__init__(reason, f"HTTP {status}: {message}", retryable=retryable)
        self.status, self.message, self.retry_after = status, message, retry_after


class HttpClient:
    """A connection pool in the running event loop. max_connections 0: as many as there are requests. key: sent as a
    bearer token."""

    def __init__(self, max_connections: int = 0, key: str | None = None) -> None:
        self._max_connections, self._key = max_connections, key

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        """Opened by the first request, for it belongs to the event loop it is made in."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            trust_env=False,
            auto_decompress=False,  # a few compressed bytes must not become gigabytes
        )

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def request(
        self,
        method: str,
        url: str,
        body: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        max_bytes: int | None = None,
    ) -> bytes:
        """Send `body` as JSON, return the body of a reply with status 200. Raises ServerGone, HttpStatus, BadReply."""
        async with self._reply(method, url, body, timeout_s) as reply:
            return await _read_body(reply, url, MAX_REPLY_BYTES if max_bytes is None else max_bytes)

    async def post_json(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST and parse the reply, a JSON object. Raises as `request`."""
        return _parse(await self.request("POST", url, body), url)

    async def get_json(self, url: str) -> dict[str, Any]:
        """GET and parse the reply, a JSON object. Raises as `request`."""
        return _parse(await self.request("GET", url, timeout_s=FACTS_SECONDS), url)

    async def get_text(self, url: str) -> str:
        """GET a body as it is. Raises as `request`."""
        return (await self.request("GET", url, timeout_s=FACTS_SECONDS)).decode("utf-8", "replace")

    async def answers(self, url: str) -> bool:
        """True if a GET answers 200 within `HEALTH_SECONDS`."""
        try:
            await self.request("GET", url, timeout_s=HEALTH_SECONDS)
        except HttpFailure:
            return False
        return True

    async def stream(self, url: str, body: dict[str, Any], timeout_s: float | None = None) -> AsyncIterator[bytes]:
        """POST, and yield the payloads of the server-sent events of the reply as they come, without `[DONE]`.

        Raises as `request`, and ServerGone where the reply ends without `[DONE]`.
        """
        async with self._reply("POST", url, body, timeout_s) as reply:
            rest = b""
            async for chunk in reply.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                _refuse_longer(rest, MAX_REPLY_BYTES, url)
                for line in lines:
                    payload = line.removeprefix(b"data:").strip()
                    if payload == b"[DONE]":
                        return
                    if line.startswith(b"data:"):
                        yield payload
            raise ServerGone("half-body", "the answer broke off", url)

    @asynccontextmanager
    async def _reply(
        self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A reply with status 200 whose body is still to be read; everything else as one of our exceptions."""
        timeout_s = timeout_s or REQUEST_SECONDS
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_SECONDS, timeout_s))
        try:
            # A redirect would send the samples to whomever the server names.
            async with self._session.request(method, url, json=body, timeout=timeout, allow_redirects=False) as reply:
                if reply.headers.get("Content-Encoding", "identity") != "identity":
                    text = "the reply is compressed although that was not asked for"
                    raise BadReply("compressed", text, url, retryable=False)
                if reply.status != 200:
                    raise await self._status(reply, url)
                yield reply
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ServerGone("unreachable", _describe(error), url) from None
        except TimeoutError:
            raise BadReply("timeout", f"no complete reply within {timeout_s:g} s", url) from None
        except aiohttp.ClientPayloadError as error:
            raise ServerGone("half-body", _describe(error), url) from None
        except aiohttp.ClientResponseError as error:  # not HTTP, or a header without end
            raise ServerGone("wrong-http", _describe(error), url) from None
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise ServerGone("disconnected", _describe(error), url) from None

    async def _status(self, reply: aiohttp.ClientResponse, url: str) -> HttpStatus:
        if 300 <= reply.status < 400:
            location = str(reply.headers.get("Location"))[:MAX_MESSAGE]
            return HttpStatus(reply.status, f"redirects to {location!r}, which is not followed")
        text = error_message(await _read_body(reply, url, MAX_REPLY_BYTES))
        if self._key:
            text = text.replace(self._key, "***")
        after = parse_retry_after(reply.headers.get("Retry-After")) if reply.status in (429, 503) else None
        return HttpStatus(reply.status, text, after)


class HttpLoop(HttpClient):
    """An `HttpClient` in an event loop of its own, in a daemon thread: `run` and `submit` take its coroutines from any
    thread."""

    def __init__(self, max_connections: int = 0, key: str | None = None) -> None:
        super().__init__(max_connections, key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()
        self._closed = False

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

    def close(self) -> None:
        """Cancel everything in flight and stop the thread; may be called twice."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _shut_down(self) -> None:
        current = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()


def fetch(url: str, timeout_s: float = FACTS_SECONDS) -> bytes:
    """One GET from plain code. Raises ServerGone, HttpStatus, BadReply."""
    http = HttpLoop(1)
    try:
        return http.run(http.request("GET", url, timeout_s=timeout_s))
    finally:
        http.close()


def backoff_seconds(attempt: int, base_s: float, longest_s: float, jitter: random.Random | None = None) -> float:
    """Pause after the `attempt`-th failure (1, 2, ...): doubled each time; jitter adds up to a quarter at random."""
    more = 1 + 0.25 * jitter.random() if jitter is not None else 1.0
    return min(base_s * 2 ** min(attempt - 1, 30) * more, longest_s)


def error_message(body: bytes) -> str:
    """The human part of an error body, on one line: OpenAI's and SGLang's shapes, else the text itself."""
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    while isinstance(value, dict):
        value = value.get("message") or value.get("error") or value.get("detail") or json.dumps(value)
    return " ".join(str(value).split())[:MAX_MESSAGE] or "no explanation"


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header (seconds or an HTTP date); None where there is none that makes sense."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def _parse(data: bytes, url: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadReply("wrong-json", f"the reply is not JSON: {first_line(error)}", url) from None
    if not isinstance(value, dict):
        raise BadReply("wrong-json", f"the reply is not a JSON object but {type(value).__name__}", url)
    return value


async def _read_body(reply: aiohttp.ClientResponse, url: str, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in reply.content.iter_any():
        body += chunk
        _refuse_longer(body, max_bytes, url)
    return bytes(body)


def _refuse_longer(body: bytes | bytearray, max_bytes: int, url: str) -> None:
    if len(body) > max_bytes:
        raise BadReply("body-too-large", f"the reply is longer than {max_bytes} bytes", url)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:MAX_MESSAGE]
