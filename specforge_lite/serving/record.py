"""A transparent proxy in front of an OpenAI-compatible server that writes finished chats as rows to train on.

    client  ->  RecordingProxy  ->  upstream server         every byte of a body passes as it is, both ways
                      |
                      v    traffic_NNNNNN.jsonl: the normal form, with model, sampling settings and finish reason

A row is written before the proxy ends the request, so that a crash loses no finished one. The memory held is that of
the open requests, twice MAX_RECORDED_BYTES each at most. Whatever goes wrong with a row, the client's reply is
untouched; rows left out are counted by reason.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from specforge_lite.core.errors import ConfigError, first_line
from specforge_lite.core.files import lock_directory
from specforge_lite.core.log import warn
from specforge_lite.data.conversations import RowRejected, to_conversation, to_row
from specforge_lite.serving.record_settings import RecordSection

MAX_RECORDED_BYTES = 16 << 20  # of a request's or a reply's body; a longer one passes and is not recorded
QUICK_BYTES = 1 << 14  # a chat so short is parsed sooner (0.3 ms) than a thread would have been woken
FIELD_BYTES = 1 << 16  # of a header or the request line
CONNECT_SECONDS = 30.0
IDLE_SECONDS = 2.0  # shorter than servers keep an idle connection, which would break the next POST on it
HOP_BY_HOP = (
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade",
)  # fmt: skip
SAMPLING_KEYS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "seed", "n", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "stop", "chat_template_kwargs", "reasoning_effort",
)  # fmt: skip
FINISHED = ("stop", "length", "tool_calls", "function_call")
REDACTED = "[REDACTED]"
Redaction = Callable[[dict[str, Any]], dict[str, Any] | None]


# ---------------------------------------------------------------------------------------------------------------- rows


def rows_of(body: bytes, reply: bytes) -> list[dict[str, Any]]:
    """The rows of a chat request and its whole reply (JSON, or server-sent events): one a finished choice.

    The answers that the client sent along as history get weight 0: each was recorded when it was made, and is trained
    once. Raises RowRejected.
    """
    request = _json_object(body, "request")
    response = _merged_events(reply) if reply.lstrip().startswith((b"data:", b":", b"event:")) else None
    response = response or _json_object(reply, "reply")
    history = request.get("messages")
    if not isinstance(history, list) or not all(isinstance(message, dict) for message in history):
        raise RowRejected("not-a-list", "'messages': expected a list of turns")
    history = [{**turn, "weight": 0} if turn.get("role") == "assistant" else turn for turn in history]
    facts = {
        "model": response.get("model") or request.get("model"),
        "sampling": {key: request[key] for key in SAMPLING_KEYS if request.get(key) is not None},
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows = []
    choices = response.get("choices") or []
    for choice in choices:
        reason, answer = choice.get("finish_reason"), choice.get("message")
        if reason not in FINISHED or not isinstance(answer, dict):
            continue
        if reason == "length":
            answer = {**answer, "finish_reason": "length"}
        name = str(response.get("id") or "") + (f"-{choice.get('index', 0)}" if len(choices) > 1 else "")
        row = {"messages": [*history, {**answer, "role": "assistant"}], "tools": request.get("tools")}
        conversation = to_conversation(row | ({"id": name} if name else {}))
        if conversation.messages[-1]["role"] != "assistant":
            raise RowRejected("empty-turn", "the answer is empty")
        rows.append({**to_row(conversation), **facts, "finish_reason": reason})
    if not rows:
        raise RowRejected("unfinished", f"no choice with a finish reason of {', '.join(FINISHED)}")
    return rows


def _json_object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise RowRejected("not-json", f"{what}: expected JSON") from None
    if not isinstance(value, dict):
        raise RowRejected("not-json", f"{what}: expected a JSON object")
    return value


def _merged_events(stream: bytes) -> dict[str, Any]:
    """The reply that the chunks of a stream make together; deltas of text and tool calls are joined by index."""
    merged: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    data = [line.removeprefix(b"data:").strip() for line in stream.splitlines() if line.startswith(b"data:")]
    chunks = b",".join(text for text in data if text != b"[DONE]")
    for chunk in _json_object(b'{"chunks":[' + chunks + b"]}", "events")["chunks"]:  # one call: five times as fast
        if not isinstance(chunk, dict):
            raise RowRejected("not-json", "events: expected JSON objects")
        merged = {key: chunk[key] for key in ("id", "model") if chunk.get(key)} | merged
        for part in chunk.get("choices") or []:
            index = part.get("index", 0)
            choice = choices.setdefault(index, {"index": index, "message": {}, "finish_reason": None})
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            _add_delta(choice["message"], part.get("delta") or {})
    return {**merged, "choices": [choices[index] for index in sorted(choices)]}


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key in ("content", "reasoning_content", "reasoning"):
        if isinstance(delta.get(key), str):
            message[key] = message.get(key, "") + delta[key]
    for part in delta.get("tool_calls") or []:
        calls: list[dict[str, Any]] = message.setdefault("tool_calls", [])
        index = part.get("index", len(calls))
        while len(calls) <= index:
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        function = part.get("function") or {}
        for key in ("name", "arguments"):
            calls[index]["function"][key] += function.get(key) or ""
        if part.get("id"):
            calls[index]["id"] = part["id"]


def load_redaction(patterns: tuple[str, ...], place: str) -> Redaction:
    """One function that replaces what `patterns` match in every text of a row's turns and tools, then calls the user's
    own at `place`, FILE.py:NAME. Raises ConfigError."""
    compiled = [re.compile(pattern) for pattern in patterns]
    own: Redaction = lambda row: row  # noqa: E731
    if place:
        file, _, name = place.rpartition(":")
        spec = importlib.util.spec_from_file_location("redaction", file)
        if not file.endswith(".py") or not Path(file).is_file() or spec is None or spec.loader is None:
            raise ConfigError(f"redact_function {place}: expected FILE.py:NAME of a file that exists")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        own = getattr(module, name, None)  # type: ignore[assignment]
        if not callable(own):
            raise ConfigError(f"redact_function {place}: {file} has no function '{name}'")

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for pattern in compiled:
                value = pattern.sub(REDACTED, value)
        elif isinstance(value, dict):
            value = {key: clean(item) for key, item in value.items()}
        elif isinstance(value, list):
            value = [clean(item) for item in value]
        return value

    texts = ("conversations", "tools")
    return lambda row: own({key: clean(value) if key in texts else value for key, value in row.items()})


# ---------------------------------------------------------------------------------------------------------------- disk


class TrafficWriter:
    """Appends rows to `traffic_NNNNNN.jsonl`, each with one write; a file of an earlier process is never appended to.

    Raises ConfigError when another process records into the directory.
    """

    def __init__(self, config: RecordSection) -> None:
        self._directory, self._file_bytes = config.out, int(config.file_mb * 1e6)
        self._lock = lock_directory(config.out, "out")
        config.out.chmod(0o700)
        files = sorted(config.out.glob("traffic_*.jsonl"))
        self._number = int(files[-1].stem.rpartition("_")[2]) if files else 0
        self._left = int(config.max_gb * 1e9) - sum(file.stat().st_size for file in files)
        self._handle, self._size = -1, 0
        self.stopped = ""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append the rows, all or none. Raises RowRejected where the budget or the disk is full, or broken."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if not self.stopped and len(data) > self._left:
            self._stop("the size budget is used up; raise --max-gb")
        if self.stopped:
            raise RowRejected("recording-stopped", self.stopped)
        try:
            if self._handle < 0 or self._size >= self._file_bytes:
                self._next_file()
            written = os.write(self._handle, data)
            if written < len(data):
                os.ftruncate(self._handle, self._size)
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            self._stop(error.strerror or str(error))
            raise RowRejected("recording-stopped", self.stopped) from None
        self._size += len(data)
        self._left -= len(data)

    def _next_file(self) -> None:
        if self._handle >= 0:
            os.fsync(self._handle)
            os.close(self._handle)
        self._number += 1
        path = self._directory / f"traffic_{self._number:06d}.jsonl"
        self._handle, self._size = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600), 0

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        warn(f"{self._directory}: recording stops: {reason}; requests pass on")

    def close(self) -> None:
        if self._handle >= 0:
            os.fsync(self._handle)
            os.close(self._handle)
        self._lock.close()


# --------------------------------------------------------------------------------------------------------------- proxy


class Copy:
    """What is kept of a body that passes: up to MAX_RECORDED_BYTES, else nothing."""

    def __init__(self, wanted: bool) -> None:
        self._chunks: list[bytes] = []
        self.size, self.wanted = 0, wanted

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.wanted and self.size <= MAX_RECORDED_BYTES:
            self._chunks.append(chunk)
        elif self.wanted:
            self._chunks.clear()

    def body(self, encoding: str = "") -> bytes:
        """The whole body, decompressed. Raises RowRejected."""
        if self.size > MAX_RECORDED_BYTES:
            raise RowRejected("too-long", f"a body of more than {MAX_RECORDED_BYTES} bytes")
        data = b"".join(self._chunks)
        if encoding in ("", "identity"):
            return data
        if encoding not in ("gzip", "deflate"):
            raise RowRejected("compressed", f"content-encoding {encoding}")
        unpack = zlib.decompressobj(47 if encoding == "gzip" else 15)
        try:
            data = unpack.decompress(data, MAX_RECORDED_BYTES)
        except zlib.error as error:
            raise RowRejected("compressed", first_line(error)) from None
        if not unpack.eof:
            raise RowRejected("too-long", f"a body of more than {MAX_RECORDED_BYTES} bytes, or one that is cut off")
        return data


class RecordingProxy:
    """Serves until it is closed: `async with RecordingProxy(config) as proxy`; `proxy.url` is where it listens.

    counts: `requests`, `recorded` rows, and the rows left out by reason. Raises ConfigError where it cannot listen or
    write.
    """

    def __init__(self, config: RecordSection) -> None:
        self._config = config
        self._redact = load_redaction(config.redact, config.redact_function)
        self._in_thread: set[asyncio.Future[None]] = set()
        self._quick = not config.redact and not config.redact_function
        self.counts: Counter[str] = Counter()
        self.url = ""

    async def __aenter__(self) -> RecordingProxy:
        self._writer = TrafficWriter(self._config)
        self._thread = ThreadPoolExecutor(1, "record")  # parsing a long chat must not hold up the other streams
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            trust_env=False,
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
            max_line_size=FIELD_BYTES,
            max_field_size=FIELD_BYTES,
        )
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        # A client that leaves cancels its handler, which closes the connection to the server, which stops generating.
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            auto_decompress=False,
            shutdown_timeout=5.0,
            max_line_size=FIELD_BYTES,
            max_field_size=FIELD_BYTES,
        )
        host, _, port = self._config.listen.rpartition(":")
        try:
            await self._runner.setup()
            await web.TCPSite(self._runner, host.strip("[]"), int(port)).start()
        except OSError as error:
            await self.__aexit__(None, None, None)
            raise ConfigError(f"listen {self._config.listen}: {error.strerror or error}") from None
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        await self._session.close()
        self._thread.shutdown()
        self._writer.close()

    def summary(self) -> str:
        """The counts on one line."""
        return ", ".join(f"{name} {count:,}" for name, count in sorted(self.counts.items()) if count) or "no requests"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.counts["requests"] += 1
        is_chat = request.method == "POST" and request.path.endswith("/chat/completions")
        wanted = is_chat and not self._writer.stopped and random.random() < self._config.sampling_rate
        asked, replied = Copy(wanted), Copy(wanted)
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP and k.lower() != "host"]
        try:
            upstream = await self._session.request(
                request.method,
                URL(self._config.upstream + request.raw_path, encoded=True),
                headers=headers,
                data=_passing(request.content, asked) if request.body_exists else None,
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            text = f"{self._config.upstream}: {type(error).__name__}: {first_line(error)}"
            return web.json_response({"error": {"message": text, "type": "upstream_unreachable"}}, status=502)
        async with upstream:
            return await self._pass_reply(request, upstream, asked, replied)

    async def _pass_reply(
        self, request: web.Request, upstream: aiohttp.ClientResponse, asked: Copy, replied: Copy
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        for name, value in upstream.headers.items():
            if name.lower() not in HOP_BY_HOP:
                response.headers.add(name, value)
        replied.wanted = replied.wanted and upstream.status == 200
        encoding = upstream.headers.get("Content-Encoding", "").lower()
        try:
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                replied.add(chunk)
                if replied.size == upstream.content_length or chunk.rstrip().endswith(b"[DONE]"):
                    await self._record_once(asked, replied, encoding)  # before the client sees the end
                await response.write(chunk)
            await self._record_once(asked, replied, encoding)
            await response.write_eof()
        except (aiohttp.ClientError, ConnectionError) as error:
            # The reply broke, on either side: the client must not take it for a whole one.
            self.counts["broken"] += 1
            if request.transport is not None and not isinstance(error, ConnectionResetError):
                request.transport.abort()
        return response

    async def _record_once(self, asked: Copy, replied: Copy, encoding: str) -> None:
        if replied.wanted:
            replied.wanted = False
            if self._quick and not self._in_thread and asked.size + replied.size <= QUICK_BYTES:
                self._record(asked, replied, encoding)
                return
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._record, asked, replied, encoding)
            self._in_thread.add(work)  # rows are written one at a time
            work.add_done_callback(self._in_thread.discard)
            await asyncio.shield(work)  # the row is written, whether the client stays or not

    def _record(self, asked: Copy, replied: Copy, encoding: str) -> None:
        try:
            rows = rows_of(asked.body(), replied.body(encoding))
            kept = [row for row in map(self._redact, rows) if row is not None]
            self.counts["dropped-by-redaction"] += len(rows) - len(kept)
            self._writer.write(kept)
            self.counts["recorded"] += len(kept)
        except RowRejected as rejected:
            self.counts[rejected.reason] += 1
        except Exception as error:  # of the user's function, or of a reply of any shape: the row is left out, never raw
            self.counts["failed"] += 1
            if self.counts["failed"] == 1:
                warn(f"a row was left out: {type(error).__name__}: {first_line(error)}")


async def _passing(content: aiohttp.StreamReader, copy: Copy) -> AsyncIterator[bytes]:
    async for chunk in content.iter_any():
        copy.add(chunk)
        yield chunk
