"""OpenAI-compatible servers: one request to one of them, what every reply that is no answer is called, and several
servers as one. The key comes from OPENAI_API_KEY alone and stands in no log line and no file.

live  -- cannot connect, or FAILURES_IN_A_ROW broken replies -->  down  -- a probe is answered -->  live
live  -- refuses the key, or broke the first FAILURES_IN_A_ROW replies -->  down for good
down, all of them, for `server_wait` seconds: EngineError (exit code 2; what was answered is kept)

A place is one request that may be in flight at a server. Free places wait in a queue; those of a server that is down
are set aside, those of one that asked for a pause return after it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from specforge_lite.core.errors import ConfigError, EngineError, suggest
from specforge_lite.core.http import HttpClient, HttpFailure, HttpStatus, backoff_seconds
from specforge_lite.core.log import info, warn
from specforge_lite.regenerate.settings import BackendSection
from specforge_lite.regenerate.turns import Answer, Question, RequestFailed

FAILURES_IN_A_ROW = 16
FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS = 0.5, 30.0
LONGEST_PAUSE_SECONDS = 120.0
PROBE_SECONDS = 5.0
# A reply may have this much plus this much per token asked for (escapes, tool calls); more is not an answer.
BODY_BYTES, BODY_BYTES_PER_TOKEN = 1 << 20, 64
REFUSALS = ("http-401", "http-403")  # the same for every row: the server is of no use
# Not retried, but no fault of the row either; a 400 or 413 may be, so it says nothing about the server.
SERVER_FAULTS = ("http-404", "http-405", "redirect", "compressed")


def parse_address(text: str) -> str:
    """Root of the API, e.g. `http://h:30000/v1`, of `HOST:PORT`, `http://HOST:PORT` or a URL with a path (the default
    path is /v1). Raises ConfigError."""
    url = text.strip() if "://" in text else f"http://{text.strip()}"
    expected = f"server_address_port '{text}': expected HOST:PORT or an http(s) URL"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{expected} ({error})") from None
    if parts.username or parts.password:
        host = parts.hostname or "HOST"
        raise ConfigError(f"server_address_port at {host}: no user or password in an address; set OPENAI_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(expected)
    if "://" not in text and port is None:
        raise ConfigError(f"{expected}; the port is missing")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def open_http() -> HttpClient:
    """A client with the key of OPENAI_API_KEY, if there is one."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError("OPENAI_API_KEY: expected printable ASCII characters")
    return HttpClient(key=key or None)


@dataclass
class Server:
    """One server, `name` as the user wrote it, and its standing in the pool. num_aside: places set aside while it is
    down; not_before: loop time of the next request; is_refused: it is down for good."""

    http: HttpClient
    name: str
    base_url: str
    timeout_s: float
    extra_body: dict[str, Any]
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

    async def list_models(self) -> list[str] | None:
        """Names the server lists; None where it answers but lists none. Raises HttpFailure where it is of no use."""
        try:
            reply = await self.http.request("GET", f"{self.base_url}/models", None, PROBE_SECONDS, BODY_BYTES)
            return [str(model["id"]) for model in json.loads(reply)["data"]]
        except HttpStatus as error:
            if error.reason in REFUSALS:
                detail = "the server refuses the key in OPENAI_API_KEY, or wants one"
                raise RequestFailed(error.reason, detail) from None
            if not 400 <= error.status < 500:
                raise
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    async def ask(self, model: str, question: Question) -> Answer:
        """One chat completion, or text completion of token ids. An answer that would not fit the context gets the room
        that is left. Raises HttpFailure (reason `unreachable`: no connection could be made)."""
        sampling = question.sampling
        is_chat = question.prompt_ids is None
        body: dict[str, Any] = {
            "model": model,
            **({"messages": question.messages} if is_chat else {"prompt": question.prompt_ids}),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": False,
        }
        optional = {
            "seed": sampling.seed if sampling.temperature > 0 else None,
            "tools": question.tools or None,
            "stop_token_ids": question.stop_token_ids or None,
        }
        body |= {name: value for name, value in optional.items() if value is not None} | self.extra_body
        url = self.base_url + ("/chat/completions" if is_chat else "/completions")
        while True:
            limit = BODY_BYTES + BODY_BYTES_PER_TOKEN * body["max_tokens"]
            try:
                return parse_answer(await self.http.request("POST", url, body, self.timeout_s, limit), is_chat)
            except HttpFailure as error:
                room = room_left(error.detail, body["max_tokens"]) if error.reason in _REFUSED_BODY else None
                if room is None:
                    raise
                if room < 1:
                    raise RequestFailed("prompt-too-long", error.detail) from None
                body["max_tokens"] = room


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


# What vLLM, SGLang, OpenAI and llama.cpp write where prompt and max_tokens do not fit the context together.
_REFUSED_BODY = ("http-400", "http-413", "http-422")
_TOO_LONG = re.compile(
    r"context (?:length|size|window)|max(?:imum)?_(?:completion_)?tokens|max_model_len|too long", re.I
)
_PROMPT_ALONE = re.compile(r"without any output|longer than the model|input length \(|characters \(more than", re.I)
_CONTEXT = re.compile(r"(?:context (?:length|size|window)|max_model_len)\D{0,40}?(\d+)", re.I)
_PROMPT = re.compile(r"(\d+) (?:input tokens|prompt tokens|tokens from the input|in the (?:messages|prompt))", re.I)


def room_left(message: str, max_tokens: int) -> int | None:
    """Tokens that an answer may have after a refusal: what the message leaves, below 1 where the prompt alone is too
    long; half of `max_tokens` where it gives no numbers. None: the refusal is not about length."""
    if not _TOO_LONG.search(message):
        return None
    if _PROMPT_ALONE.search(message):
        return 0
    context = int(found[1]) if (found := _CONTEXT.search(message)) else max_tokens
    prompt = int(found[1]) if (found := _PROMPT.search(message)) and "at least" not in message else 0
    room = context - prompt
    return room if room < max_tokens else max_tokens // 2


def parse_answer(body: bytes, is_chat: bool = True) -> Answer:
    """First choice of a chat or text completion. Raises RequestFailed: `wrong-json`, `wrong-form`, `lone-surrogate`."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        start = " ".join(body[:60].decode("utf-8", "replace").split())
        raise RequestFailed("wrong-json", f"{len(body)} bytes that are not JSON: '{start}'", True) from None
    try:
        choice = value["choices"][0]
        message = choice["message"] if is_chat else {"content": choice["text"]}
        num_tokens = (value.get("usage") or {}).get("completion_tokens")
        answer = Answer(
            content=_text(message.get("content")),
            finish_reason=_text(choice.get("finish_reason")) or "unknown",
            reasoning=_text(message.get("reasoning_content") or message.get("reasoning")),
            tool_calls=[_tool_call(call) for call in message.get("tool_calls") or []],
            completion_tokens=num_tokens if isinstance(num_tokens, int) and num_tokens >= 0 else 0,
        )
        json.dumps([answer.content, answer.reasoning, answer.tool_calls], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestFailed("lone-surrogate", "the answer holds half a surrogate pair", True) from None
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        place = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise RequestFailed("wrong-form", f"JSON, but no completion ({place})", True) from None
    return answer


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value or ""


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """In OpenAI's form, with the three keys that mean something."""
    function = {"name": _text(call["function"]["name"]), "arguments": _text(call["function"].get("arguments"))}
    extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**extra, "type": "function", "function": function}
