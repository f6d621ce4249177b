"""One request to one OpenAI-compatible server, and what every broken reply is called.

Nothing but the addresses given is contacted: redirects are not followed, proxies of the environment and cookies are
not used. Replies are read up to a limit and within one deadline, so neither an endless body nor a slow drip holds a
place for long. The key comes from OPENAI_API_KEY alone and stands in no log line and no file.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from specforge_lite.core.errors import ConfigError
from specforge_lite.regenerate.turns import Answer, Question, RequestFailed

# A reply may have this much plus this much per token asked for (escapes, tool calls); more is not an answer.
BODY_BYTES, BODY_BYTES_PER_TOKEN = 1 << 20, 64
CONNECT_SECONDS = 10.0
PROBE_SECONDS = 5.0
RETRYABLE_STATUS = (408, 409, 425, 429)
MAX_DETAIL = 200


class ServerGone(Exception):
    """No connection could be made; says nothing about the row that was to be sent."""


class RateLimited(RequestFailed):
    """429 or 503 with the seconds the server asks to wait (None: it does not say)."""

    def __init__(self, reason: str, detail: str, retry_after: float | None) -> None:
        super().__init__(reason, detail, retryable=True)
        self.retry_after = retry_after


@dataclass(frozen=True)
class ServerAddress:
    """`name` as the user wrote it, for messages; `base_url` ends in the API's root, e.g. `http://h:30000/v1`."""

    name: str
    base_url: str


def parse_address(text: str) -> ServerAddress:
    """`HOST:PORT`, `http://HOST:PORT` or a URL with a path (the default path is /v1). Raises ConfigError."""
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
    return ServerAddress(text, f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}")


def open_session() -> aiohttp.ClientSession:
    """A session without cookies, proxies or compression, with the key of OPENAI_API_KEY if there is one."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    headers = {"Accept-Encoding": "identity", "Accept": "application/json"}
    if key:
        if not key.isascii() or not key.isprintable():
            raise ConfigError("OPENAI_API_KEY: expected printable ASCII characters")
        headers["Authorization"] = f"Bearer {key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        trust_env=False,
        auto_decompress=False,  # a few compressed bytes must not become gigabytes
    )


class ChatClient:
    """Requests to one server."""

    def __init__(
        self, session: aiohttp.ClientSession, address: ServerAddress, timeout_s: float, extra_body: dict[str, Any]
    ) -> None:
        self.session, self.address, self.timeout_s, self.extra_body = session, address, timeout_s, extra_body

    async def list_models(self) -> list[str] | None:
        """Names the server lists; None where it answers but lists none. Raises ServerGone, RequestFailed (refused)."""
        try:
            status, headers, body = await self._send("GET", "/models", None, PROBE_SECONDS, BODY_BYTES)
        except RequestFailed as error:
            raise ServerGone(str(error)) from None
        if status in (401, 403):
            raise RequestFailed(f"http-{status}", "the server refuses the key in OPENAI_API_KEY, or wants one")
        if 300 <= status < 400:
            check_status(status, headers, body)
        if status >= 500:
            raise ServerGone(f"http-{status}")
        try:
            return [str(model["id"]) for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    async def ask(self, model: str, question: Question) -> Answer:
        """One chat completion, or text completion of token ids. Raises RequestFailed (RateLimited), ServerGone."""
        sampling = question.sampling
        is_chat = question.prompt_ids is None
        prompt = {"messages": question.messages} if is_chat else {"prompt": question.prompt_ids}
        body: dict[str, Any] = {
            "model": model,
            **prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": False,
        }
        if sampling.temperature > 0:
            body["seed"] = sampling.seed
        if question.tools:
            body["tools"] = question.tools
        if question.stop_token_ids:
            body["stop_token_ids"] = question.stop_token_ids
        limit = BODY_BYTES + BODY_BYTES_PER_TOKEN * sampling.max_tokens
        body |= self.extra_body
        path = "/chat/completions" if is_chat else "/completions"
        while True:
            status, headers, reply = await self._send("POST", path, body, self.timeout_s, limit)
            if status not in (400, 413, 422) or (room := room_left(error_text(reply), body["max_tokens"])) is None:
                break
            if room < 1:
                raise RequestFailed("prompt-too-long", error_text(reply))
            body["max_tokens"] = room
        check_status(status, headers, reply)
        return parse_answer(reply, is_chat)

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, max_bytes: int
    ) -> tuple[int, Any, bytes]:
        try:
            async with self.session.request(
                method,
                self.address.base_url + path,
                json=body,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_SECONDS),
            ) as response:
                return response.status, response.headers, await read_body(response, max_bytes)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ServerGone(describe(error)) from None
        except TimeoutError:
            raise RequestFailed("timeout", f"no complete reply within {timeout_s:g} s", retryable=True) from None
        except aiohttp.ClientPayloadError as error:
            raise RequestFailed("half-body", describe(error), retryable=True) from None
        except aiohttp.ClientResponseError as error:  # not HTTP, or a header without end
            raise RequestFailed("wrong-http", describe(error), retryable=True) from None
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise RequestFailed("disconnected", describe(error), retryable=True) from None


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body, if it has at most `max_bytes`. Raises RequestFailed and drops the connection beyond that."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise RequestFailed("compressed", "the reply is compressed although that was not asked for")
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > max_bytes:
            response.close()
            raise RequestFailed("body-too-large", f"the reply is longer than {max_bytes} bytes", True)
        chunks.append(chunk)
    return b"".join(chunks)


def check_status(status: int, headers: Any, body: bytes) -> None:
    """Raise RequestFailed or RateLimited for anything but 200."""
    if status == 200:
        return
    if 300 <= status < 400:
        target = str(headers.get("Location", "nowhere"))[:MAX_DETAIL]
        raise RequestFailed("redirect", f"HTTP {status} to {target}; redirects are not followed", retryable=True)
    detail = f"HTTP {status}: {error_text(body)}"
    if status in (429, 503):
        raise RateLimited(f"http-{status}", detail, parse_retry_after(headers.get("Retry-After")))
    raise RequestFailed(f"http-{status}", detail, retryable=status >= 500 or status in RETRYABLE_STATUS)


def error_text(body: bytes) -> str:
    """The server's own words, on one line, without what it may have echoed of the key."""
    text = body[:2000].decode("utf-8", "replace")
    try:
        value = json.loads(body)
        error = value.get("error", value)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        pass
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if key:
        text = text.replace(key, "***")
    return " ".join(text.split())[:MAX_DETAIL] or "no explanation"


# What vLLM, SGLang, OpenAI and llama.cpp write where prompt and max_tokens do not fit the context together.
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


def parse_answer(body: bytes, is_chat: bool = True) -> Answer:
    """First choice of a chat or text completion. Raises RequestFailed: `wrong-json`, `wrong-form`, `lone-surrogate`."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        start = " ".join(body[:60].decode("utf-8", "replace").split())
        raise RequestFailed("wrong-json", f"{len(body)} bytes that are not JSON: '{start}'", True) from None
    try:
        choice = value["choices"][0]
        message = choice["message"] if is_chat else {"content": _text(choice["text"])}
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        answer = Answer(
            content=_text(message.get("content")),
            finish_reason=_text(choice.get("finish_reason")) or "unknown",
            reasoning=_text(reasoning),
            tool_calls=_tool_calls(message.get("tool_calls")),
            completion_tokens=_count((value.get("usage") or {}).get("completion_tokens")),
        )
        json.dumps([answer.content, answer.reasoning, answer.tool_calls], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestFailed("lone-surrogate", "the answer holds half a surrogate pair", True) from None
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        place = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise RequestFailed("wrong-form", f"JSON, but no completion ({place})", True) from None
    return answer


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, with the three keys that mean something."""
    result = []
    for call in calls or []:
        function = call["function"]
        extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        plain = {"name": _text(function["name"]), "arguments": _text(function.get("arguments"))}
        result.append({**extra, "type": "function", "function": plain})
    return result


def describe(error: BaseException) -> str:
    """An exception as one short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:MAX_DETAIL]
