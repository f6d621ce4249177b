"""An OpenAI-compatible server without a model, with latency and faults on request: for tests and load runs.

  python tests/fake_chat_server.py --port 30000 --latency 0.5 --fault-share 0.01

Its answer to a conversation is a pure function of the last message, so that a lost or doubled row is seen.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

HOLD_SECONDS = 3600.0
FaultReply = Callable[["FakeServer", web.Request], Awaitable[web.StreamResponse]]


def answer_to(text: str) -> str:
    """The fake's answer to a user turn or a completion prompt."""
    return f"answer {hashlib.sha256(text.encode()).hexdigest()[:12]} to: {text[:80]}"


class FakeServer:
    """`await start()`, then `address`; `await stop()`.

    latency_s: of each answer; with `jitter` j each text has its own, between (1 - j) and (1 + j) times that.
    faults: text of the last message -> kinds of replies for the first requests with it, one after another.
    fault_share: this share of texts (by hash) has its first request answered with one of `fault_kinds`.
    context_tokens: a prompt (a token per word) and max_tokens beyond it together are refused as vLLM refuses them.
    num_requests counts by text; max_in_flight and authorizations say what clients did.
    """

    def __init__(
        self,
        latency_s: float = 0.0,
        jitter: float = 0.0,
        faults: Mapping[str, Sequence[str]] | None = None,
        fault_share: float = 0.0,
        fault_kinds: Sequence[str] = ("http-500", "http-429", "half-body", "wrong-json", "disconnect"),
        model: str = "fake-model",
        context_tokens: int | None = None,
    ) -> None:
        self.latency_s, self.jitter, self.model = latency_s, jitter, model
        self.faults = {text: list(kinds) for text, kinds in (faults or {}).items()}
        self.fault_share, self.fault_kinds = fault_share, list(fault_kinds)
        self.context_tokens = context_tokens
        self.always: str | None = None  # a kind that every completion gets from now on
        self.num_requests: Counter[str] = Counter()
        self.num_faults: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keep_bodies = False
        self.in_flight = self.max_in_flight = 0
        self.authorizations: set[str | None] = set()
        self.paths: Counter[str] = Counter()
        self.retry_after = "0"
        self.address = ""
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        """Listen on 127.0.0.1; port 0 takes a free one."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._completion)
        app.router.add_post("/v1/completions", self._completion)
        app.router.add_route("*", "/{path:.*}", self._elsewhere)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        await web.SockSite(self._runner, listener, backlog=4096).start()

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _elsewhere(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        return web.json_response({"error": {"message": "no such path"}}, status=404)

    def _note(self, request: web.Request) -> None:
        self.paths[request.path] += 1
        self.authorizations.add(request.headers.get("Authorization"))

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        body = await request.json()
        text = str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])
        self.num_requests[text] += 1
        if self.keep_bodies:
            self.bodies.append(body)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_of(text))
            kind = self._fault_of(text)
            if kind is not None:
                self.num_faults[kind] += 1
                return await FAULTS[kind](self, request)
            refusal = self._refusal(body)
            if refusal is not None:
                return web.json_response({"error": {"message": refusal, "code": 400}}, status=400)
            return web.json_response(reply_to(body, text))
        finally:
            self.in_flight -= 1

    def _refusal(self, body: dict[str, Any]) -> str | None:
        limit, answer = self.context_tokens, body["max_tokens"]
        prompt = sum(len(str(message["content"]).split()) for message in body.get("messages", []))
        if limit is None or prompt + answer <= limit:
            return None
        used = f"you requested {prompt + answer} tokens ({prompt} in the messages, {answer} in the completion)"
        return f"This model's maximum context length is {limit} tokens. However, {used}."

    def _fault_of(self, text: str) -> str | None:
        if self.always is not None:
            return self.always
        if self.faults.get(text):
            return self.faults[text].pop(0)
        if self.num_requests[text] == 1 and self.fails_first(text):
            return self.fault_kinds[_number(text) // 10_000 % len(self.fault_kinds)]
        return None

    def latency_of(self, text: str) -> float:
        """Seconds until a request with this text is answered."""
        return self.latency_s * (1 + self.jitter * (2 * (_number(text) / 16**12) - 1))

    def fails_first(self, text: str) -> bool:
        """True for the share of texts whose first request is answered with a fault."""
        return _number(text) % 10_000 < 10_000 * self.fault_share


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def reply_to(body: dict[str, Any], text: str) -> dict[str, Any]:
    """A chat or text completion. Words in the text ask for more: `#think`, `#long`, `#silent`, `#call NAME`."""
    usage = {"prompt_tokens": len(text.split()), "completion_tokens": 7}
    finish_reason = "length" if "#long" in text else "stop"
    if "prompt" in body:
        return {"choices": [{"index": 0, "text": answer_to(text), "finish_reason": finish_reason}], "usage": usage}
    message: dict[str, Any] = {"role": "assistant", "content": answer_to(text)}
    if "#think" in text:
        message["reasoning_content"] = f"thinking of: {text[:40]}"
    if "#silent" in text:
        message["content"] = ""
    if "#call " in text:
        name = text.split("#call ", 1)[1].split()[0]
        function = {"name": name, "arguments": '{"x": 1}'}
        message |= {"content": None, "tool_calls": [{"id": "call_new", "type": "function", "function": function}]}
        finish_reason = "tool_calls"
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}


# ------------------------------------------------------------------------------------------------------------- faults


def _status(status: int, **headers: str) -> FaultReply:
    async def reply(server: FakeServer, request: web.Request) -> web.StreamResponse:
        error = {"error": {"message": f"status {status} as asked; sent {request.headers.get('Authorization')}"}}
        return web.json_response(error, status=status, headers=headers)

    return reply


async def _rate_limited(server: FakeServer, request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": "slow down"}, status=429, headers={"Retry-After": server.retry_after})


async def _stall(server: FakeServer, request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(HOLD_SECONDS)
    return web.Response()


async def _drip(server: FakeServer, request: web.Request) -> web.StreamResponse:
    """One byte of valid JSON every 50 ms, for ever."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.05)


async def _endless(server: FakeServer, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" " * 65536)


async def _half_body(server: FakeServer, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices": [{"mess')
    return _hang_up(request, response)


async def _disconnect(server: FakeServer, request: web.Request) -> web.StreamResponse:
    return _hang_up(request, web.StreamResponse())


def _hang_up(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return response


def _text(text: str, **headers: str) -> FaultReply:
    async def reply(server: FakeServer, request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, content_type="application/json", headers=headers)

    return reply


_BOMB = "[" * 100_000
_NO_TEXT = json.dumps({"choices": [{"message": {"content": 17}, "finish_reason": "stop"}]})
_SURROGATE = '{"choices": [{"message": {"content": "half \\ud83d pair"}, "finish_reason": "stop"}]}'

FAULTS: dict[str, FaultReply] = {
    "http-400": _status(400),
    "http-401": _status(401),
    "http-404": _status(404),
    "http-429": _rate_limited,
    "http-500": _status(500),
    "http-503": _status(503),
    "redirect": _status(307, Location="http://203.0.113.1/elsewhere"),
    "stall": _stall,
    "drip": _drip,
    "endless": _endless,
    "half-body": _half_body,
    "disconnect": _disconnect,
    "wrong-json": _text("<html>busy</html>"),
    "nested": _text(_BOMB),
    "no-choices": _text('{"choices": []}'),
    "not-text": _text(_NO_TEXT),
    "surrogate": _text(_SURROGATE),
    "compressed": _text("not really", **{"Content-Encoding": "gzip"}),
}


async def _serve(args: argparse.Namespace) -> None:
    server = FakeServer(args.latency, args.jitter, fault_share=args.fault_share)
    await server.start(args.port)
    print(server.address, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds per answer")
    parser.add_argument("--jitter", type=float, default=0.0, help="0.5: latencies from half to one and a half")
    parser.add_argument("--fault-share", type=float, default=0.0, help="share of prompts that fail once")
    try:
        asyncio.run(_serve(parser.parse_args()))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
