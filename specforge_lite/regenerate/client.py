"""One OpenAI-compatible server: its address, a request to it, and what every reply that is no answer is called.

The key comes from OPENAI_API_KEY alone and stands in no log line and no file.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.http import HttpClient, HttpFailure, HttpStatus
from specforge_lite.regenerate.turns import Answer, Question, RequestFailed

# A reply may have this much plus this much per token asked for (escapes, tool calls); more is not an answer.
BODY_BYTES, BODY_BYTES_PER_TOKEN = 1 << 20, 64
PROBE_SECONDS = 5.0
REFUSALS = ("http-401", "http-403")  # the same for every row: the server is of no use


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
