"""The one HTTP client against servers that answer rightly and wrongly."""

from __future__ import annotations

import asyncio
import json
import random
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import web

from specforge_lite.core import http
from specforge_lite.core.errors import EngineError
from specforge_lite.core.http import BadReply, HttpClient, HttpFailure, HttpLoop, HttpStatus, ServerGone
from tests.bad_server import ELSEWHERE, KINDS, BadServer

REASONS = {
    "http 400": "http-400", "http 401": "http-401", "http 404": "http-404", "http 429": "http-429",
    "http 500": "http-500", "http 503": "http-503", "a redirect": "redirect", "a redirect for ever": "redirect",
    "half a body": "half-body", "no reply": "disconnected", "not http": "wrong-http", "a web page": "wrong-json",
    "an empty body": "wrong-json", "not utf-8": "wrong-json", "nested without end": "wrong-json",
    "a list": "wrong-json", "null": "wrong-json", "text": "wrong-json", "compressed, and it is not": "compressed",
    "an endless body": "body-too-large", "an endless header": "wrong-http", "a slow drip": "timeout",
    "silence": "timeout",
}  # fmt: skip
NOT_RETRYABLE = ("http-400", "http-401", "http-404", "compressed")
GOOD_KINDS = [kind for kind in KINDS if kind not in REASONS]


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 1 << 20)


@pytest.fixture
def client():  # type: ignore[no-untyped-def]
    loop = HttpLoop(4)
    yield loop
    loop.close()


@pytest.mark.parametrize("kind", REASONS)
def test_each_wrong_reply_has_a_reason(kind: str, client: HttpLoop) -> None:
    start = time.monotonic()
    with BadServer(kind, ("/x",)) as server, pytest.raises(HttpFailure) as caught:
        client.run(client.post_json(f"http://{server.address}/x", {"a": 1}))
    failure = caught.value
    assert failure.reason == REASONS[kind]
    assert failure.retryable == (REASONS[kind] not in NOT_RETRYABLE)
    assert str(failure).isprintable()
    assert time.monotonic() - start < 5
    if isinstance(failure, HttpStatus):
        expected = f"redirects to '{ELSEWHERE}', which is not followed"
        assert failure.message == {"a redirect": expected}.get(kind, failure.message)
        assert failure.retry_after == (0.0 if kind == "http 429" else None)
    else:
        assert str(failure).startswith(f"http://{server.address}/x: ")


@pytest.mark.parametrize("kind", GOOD_KINDS)
def test_json_objects_are_replies(kind: str, client: HttpLoop) -> None:
    with BadServer(kind, ("/x",)) as server:
        assert isinstance(client.run(client.get_json(f"http://{server.address}/x")), dict)


def test_nobody_listens(client: HttpLoop) -> None:
    with BadServer("http 500", ("/x",)) as server:
        address = server.address
    with pytest.raises(ServerGone) as caught:
        client.run(client.get_json(f"http://{address}/x"))
    assert caught.value.reason == "unreachable"
    assert not client.run(client.answers(f"http://{address}/health"))
    with pytest.raises(ServerGone):
        http.fetch(f"http://{address}/x")


def test_a_key_is_sent_and_never_shown() -> None:
    async def scenario() -> None:
        async def echo(request: web.Request) -> web.Response:
            return web.Response(status=401, text=f"wrong key: {request.headers['Authorization']}")

        async def quick(request: web.Request) -> web.Response:
            return web.Response(text="x" * 100)

        app = web.Application()
        app.router.add_get("/echo", echo)
        app.router.add_get("/quick", quick)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with HttpClient(key="secret-key") as client:
            with pytest.raises(HttpStatus) as caught:
                await client.request("GET", f"http://127.0.0.1:{port}/echo")
            assert caught.value.message == "wrong key: Bearer ***"
            assert await client.request("GET", f"http://127.0.0.1:{port}/quick", max_bytes=100) == b"x" * 100
            with pytest.raises(BadReply, match="longer than 99 bytes"):
                await client.request("GET", f"http://127.0.0.1:{port}/quick", max_bytes=99)
        await runner.cleanup()

    asyncio.run(scenario())


@pytest.mark.parametrize("ending", ["whole", "breaks off", "refused"])
def test_events_are_streamed(ending: str) -> None:
    events = [b'{"n": %d}' % n for n in range(5)] + [json.dumps({"long": "x" * 300_000}).encode()]

    async def scenario() -> list[bytes]:
        async def reply(request: web.Request) -> web.StreamResponse:
            if ending == "refused":
                return web.json_response({"message": "too long"}, status=400)
            response = web.StreamResponse()
            await response.prepare(request)
            for event in events:
                await response.write(b": comment\ndata: " + event[:3])
                await response.write(event[3:] + b"\r\n\r\n")
            if ending == "whole":
                await response.write(b"data: [DONE]\n\n")
            return response

        app = web.Application()
        app.router.add_post("/x", reply)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found = []
        try:
            async with HttpClient() as client:
                async for event in client.stream(f"http://127.0.0.1:{runner.addresses[0][1]}/x", {}, timeout_s=5):
                    found.append(event)
        finally:
            await runner.cleanup()
        return found

    if ending == "whole":
        assert asyncio.run(scenario()) == events
    elif ending == "refused":
        with pytest.raises(HttpStatus, match="HTTP 400: too long"):
            asyncio.run(scenario())
    else:
        with pytest.raises(ServerGone, match="the answer broke off"):
            asyncio.run(scenario())


def test_close_ends_what_is_in_flight() -> None:
    client = HttpLoop(2)
    http.REQUEST_SECONDS = 60.0  # restored by the fixture
    with BadServer("silence", ("/x",)) as server:
        future = client.submit(client.get_json(f"http://{server.address}/x"))
        time.sleep(0.05)
        client.close()
        assert future.cancelled()
    with pytest.raises(EngineError, match="closed"):
        client.run(client.get_json("http://127.0.0.1:1/x"))
    client.close()


def test_backoff_and_retry_after() -> None:
    assert [http.backoff_seconds(n, 0.5, 10.0) for n in (1, 2, 3, 9, 10_000)] == [0.5, 1.0, 2.0, 10.0, 10.0]
    assert 1.0 <= http.backoff_seconds(2, 0.5, 10.0, random.Random(1)) <= 1.25
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert http.parse_retry_after(later) == pytest.approx(60, abs=2)
    assert [http.parse_retry_after(text) for text in ("3", "-3", "soon", "inf", None)] == [3.0, 0.0, None, None, None]
