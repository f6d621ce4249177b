"""The recording proxy: what passes, byte for byte, and what is written, against an upstream that also misbehaves."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from specforge_lite.core.errors import ConfigError
from specforge_lite.data.conversations import RowRejected
from specforge_lite.serving import record
from specforge_lite.serving.record import RecordingProxy, TrafficWriter, load_redaction, rows_of
from specforge_lite.serving.record_settings import RecordSection

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7, "max_tokens": 9}
ANSWER = {
    "id": "chat-1",
    "model": "served",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
}


def stream_of(*deltas: dict[str, Any], reason: str | None = "stop", name: str = "chat-2") -> bytes:
    """Server-sent events as both engines write them: a usage chunk without choices at the end."""
    parts: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    parts.append({"index": 0, "delta": {}, "finish_reason": reason})
    chunks: list[dict[str, Any]] = [{"id": name, "model": "served", "choices": [part]} for part in parts]
    chunks.append({"id": name, "choices": [], "usage": {"total_tokens": 3}})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


STREAM = stream_of({"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"})


class Upstream:
    """A server on loopback whose one handler is `reply`; `seen`: method, path, headers and body of each request."""

    def __init__(self, reply: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
        self._reply = reply
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

    async def __aenter__(self) -> Upstream:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.method, request.raw_path, dict(request.headers), body))
        return await self._reply(request)


async def plain(request: web.Request) -> web.StreamResponse:
    if request.query.get("kind") == "stream":
        return await streamed(request, [STREAM[i : i + 7] for i in range(0, len(STREAM), 7)])
    return web.json_response(ANSWER, headers={"X-Engine": "a", "Set-Cookie": "b=c"})


async def streamed(request: web.Request, chunks: list[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks:
        await response.write(chunk)
        await asyncio.sleep(0)
    await response.write_eof()
    return response


def rows_in(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(directory.glob("*.jsonl")) for line in file.read_text().splitlines()]


def run(
    out: Path,
    client: Callable[[aiohttp.ClientSession, RecordingProxy, Upstream], Awaitable[None]],
    reply: Callable[[web.Request], Awaitable[web.StreamResponse]] = plain,
    **settings: Any,
) -> RecordingProxy:
    """Let `client` talk through a proxy."""

    async def main() -> RecordingProxy:
        async with Upstream(reply) as upstream:
            config = RecordSection(upstream=upstream.url, listen="127.0.0.1:0", out=out, **settings)
            async with (
                RecordingProxy(config) as proxy,
                aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(20)) as session,
            ):
                await client(session, proxy, upstream)
            return proxy

    return asyncio.run(main())


# -------------------------------------------------------------------------------------------------------------- passing


def test_requests_and_replies_pass_byte_for_byte(tmp_path: Path) -> None:
    body = b'{"model":"m",  "messages": [{"role":"user","content":"caf\\u00e9"}], "unknown": 1}'

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, upstream: Upstream) -> None:
        path = "/v1/chat/completions?kind=stream&x=%2F%20"
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json", "X-Trace": "7"}
        async with session.post(
            URL(proxy.url + path.replace("kind", "k"), encoded=True), data=body, headers=headers
        ) as reply:
            assert (reply.status, await reply.read()) == (200, json.dumps(ANSWER).encode())
            assert (reply.headers["X-Engine"], reply.headers["Set-Cookie"]) == ("a", "b=c")
        method, seen_path, seen_headers, seen_body = upstream.seen[0]
        assert (method, seen_path, seen_body) == ("POST", path.replace("kind", "k"), body)
        assert seen_headers["Authorization"] == "Bearer secret"
        assert seen_headers["X-Trace"] == "7"
        assert seen_headers["Content-Length"] == str(len(body))
        assert seen_headers["Host"] == upstream.url.removeprefix("http://")
        async with session.post(upstream.url + path, data=body) as direct:
            expected = await direct.read()
        async with session.post(proxy.url + path, data=body) as reply:
            assert await reply.read() == expected == STREAM
            assert reply.headers["Content-Type"] == "text/event-stream"
        for method in ("GET", "HEAD", "DELETE"):
            async with session.request(method, proxy.url + "/v1/models") as reply:
                assert reply.status == 200
        assert [seen[0] for seen in upstream.seen[-3:]] == ["GET", "HEAD", "DELETE"]

    proxy = run(tmp_path / "out", client)
    assert proxy.counts == {"requests": 5, "recorded": 2, "dropped-by-redaction": 0}
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize("status", [302, 400, 401, 429, 500, 503])
def test_errors_and_redirects_pass_and_are_not_recorded(tmp_path: Path, status: int) -> None:
    async def reply(_: web.Request) -> web.StreamResponse:
        headers = {"Location": "http://203.0.113.9/", "Retry-After": "3"}
        return web.json_response(ANSWER, status=status, headers=headers)

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        async with session.post(proxy.url + "/v1/chat/completions", json=ASK, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (status, "3")
            assert await answer.json() == ANSWER

    run(tmp_path / "out", client, reply)
    assert rows_in(tmp_path / "out") == []


def test_a_stream_arrives_while_it_is_made(tmp_path: Path) -> None:
    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        gate["event"] = asyncio.Event()
        async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as reply:
            first = await asyncio.wait_for(reply.content.readany(), 5)
            assert first == STREAM[:20]  # the upstream waits for us before it sends the rest
            gate["event"].set()
            assert await reply.read() == STREAM[20:]

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(STREAM[:20])
        await gate["event"].wait()
        await response.write(STREAM[20:])
        await response.write_eof()
        return response

    gate: dict[str, asyncio.Event] = {}
    assert run(tmp_path / "out", client, reply).counts["recorded"] == 1


def test_a_reply_that_breaks_does_not_look_whole(tmp_path: Path) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(STREAM[:-20])
        assert request.transport is not None
        request.transport.abort()
        return response

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        with pytest.raises(aiohttp.ClientPayloadError):
            async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as answer:
                await answer.read()

    proxy = run(tmp_path / "out", client, reply)
    assert rows_in(tmp_path / "out") == []
    assert proxy.counts["broken"] == 1


def test_a_client_that_leaves_stops_the_generation(tmp_path: Path) -> None:
    stopped: list[str] = []

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"data: {}\n\n")
                await asyncio.sleep(0.01)
        finally:
            stopped.append("stopped")

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as answer:
            await answer.content.readany()
            answer.close()
        for _step in range(200):
            if stopped:
                break
            await asyncio.sleep(0.02)

    run(tmp_path / "out", client, reply)
    assert stopped == ["stopped"]
    assert rows_in(tmp_path / "out") == []


def test_no_upstream_is_a_502_in_openai_form(tmp_path: Path) -> None:
    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, upstream: Upstream) -> None:
        await upstream.__aexit__()
        async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as answer:
            assert answer.status == 502
            assert upstream.url in (await answer.json())["error"]["message"]

    run(tmp_path / "out", client)


def test_a_flood_is_neither_lost_nor_doubled(tmp_path: Path) -> None:
    """300 chats of 24 clients at once, some of which stall, break or fail; every whole one is one row."""

    async def reply(request: web.Request) -> web.StreamResponse:
        number = int(json.loads(await request.read())["messages"][0]["content"])
        data = stream_of({"content": f"answer {number}"}, name=f"chat-{number}")
        if number % 10 == 1:
            return web.json_response({"error": "busy"}, status=503)
        if number % 10 == 2:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            request.transport.abort()  # type: ignore[union-attr]
            return response
        if number % 10 == 3:
            await asyncio.sleep(0.05)
        return await streamed(request, [data[:30], data[30:]])

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        slots = asyncio.Semaphore(24)

        async def ask(number: int) -> None:
            body = {"messages": [{"role": "user", "content": str(number)}], "stream": True}
            try:
                async with slots, session.post(proxy.url + "/v1/chat/completions", json=body) as answer:
                    await answer.read()
            except aiohttp.ClientError:
                assert number % 10 == 2

        await asyncio.gather(*map(ask, range(300)))

    proxy = run(tmp_path / "out", client, reply)
    rows = rows_in(tmp_path / "out")
    whole = [n for n in range(300) if n % 10 not in (1, 2)]
    assert sorted(row["id"] for row in rows) == sorted(f"chat-{n}" for n in whole)
    for row in rows:
        question, answer = row["conversations"]
        assert answer["content"] == f"answer {question['content']}"
        assert row["id"] == f"chat-{question['content']}"
    assert proxy.counts["recorded"] == len(whole)
    assert proxy.counts["broken"] == 30


# ----------------------------------------------------------------------------------------------------------------- rows


def row_of(answer: dict[str, Any] | bytes, **request: Any) -> dict[str, Any]:
    reply = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    (row,) = rows_of(json.dumps({**ASK, **request}).encode(), reply)
    return row


def test_a_row_has_the_normal_form_and_how_it_was_made() -> None:
    row = row_of(ANSWER)
    assert row.pop("recorded_at").startswith("20")
    assert row == {
        "id": "chat-1",
        "conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "model": "served",
        "sampling": {"temperature": 0.7, "max_tokens": 9},
        "finish_reason": "stop",
    }
    assert row_of(STREAM)["conversations"] == row["conversations"]


def test_answers_of_the_history_are_shown_and_not_trained_again() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    messages = row_of(ANSWER, messages=turns)["conversations"]
    assert [message.get("weight") for message in messages] == [None, 0, None, None]


def test_an_answer_that_a_limit_cut_off_is_marked() -> None:
    row = row_of(stream_of({"content": "Hel"}, reason="length"))
    assert row["finish_reason"] == "length"
    assert row["conversations"][-1]["finish_reason"] == "length"


def test_reasoning_and_tool_calls_of_a_stream_are_joined() -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "hm"}, {"reasoning_content": "m"},
        {"tool_calls": [{"index": 0, "id": "call-1", "function": {"name": "find", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [{"index": 1, "id": "call-2", "function": {"name": "find", "arguments": "{}"}}]},
    ]  # fmt: skip
    row = row_of(stream_of(*deltas, reason="tool_calls"), tools=tools)
    answer = row["conversations"][-1]
    assert answer["reasoning_content"] == "hmm"
    assert row["tools"] == tools
    assert answer["tool_calls"] == [
        {"id": "call-1", "type": "function", "function": {"name": "find", "arguments": '{"x": 1}'}},
        {"id": "call-2", "type": "function", "function": {"name": "find", "arguments": "{}"}},
    ]


def test_each_finished_choice_is_a_row() -> None:
    choices = [
        {"index": i, "message": {"role": "assistant", "content": str(i)}, "finish_reason": reason}
        for i, reason in enumerate(("stop", "abort", "length"))
    ]
    rows = rows_of(json.dumps({**ASK, "n": 3}).encode(), json.dumps({**ANSWER, "choices": choices}).encode())
    assert [(row["id"], row["finish_reason"]) for row in rows] == [("chat-1-0", "stop"), ("chat-1-2", "length")]


@pytest.mark.parametrize(
    ("body", "reply", "reason"),
    [
        (b"{", json.dumps(ANSWER).encode(), "not-json"),
        (json.dumps(ASK).encode(), b"<html>", "not-json"),
        (json.dumps(ASK).encode(), STREAM[:-10].replace(b'"stop"', b"null"), "unfinished"),
        (json.dumps(ASK).encode(), stream_of({"content": ""}), "empty-turn"),
        (json.dumps({**ASK, "messages": "Hi"}).encode(), STREAM, "not-a-list"),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode(), STREAM,
         "content-not-text"),
    ],
)  # fmt: skip
def test_what_is_no_finished_chat_has_a_reason(body: bytes, reply: bytes, reason: str) -> None:
    with pytest.raises(RowRejected) as caught:
        rows_of(body, reply)
    assert caught.value.reason == reason


def test_compressed_replies_are_read_and_long_ones_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_RECORDED_BYTES", 4096)
    packed = gzip.compress(json.dumps(ANSWER).encode())
    bomb = gzip.compress(b" " * 1_000_000)
    replies = iter([packed, bomb, b"x" * 5000])

    async def reply(_: web.Request) -> web.StreamResponse:
        body = next(replies)
        return web.Response(body=body, headers={"Content-Encoding": "gzip"} if body[:1] == b"\x1f" else {})

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        for expected in (packed, bomb, b"x" * 5000):
            async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as answer:
                assert await answer.read() == expected

    proxy = run(tmp_path / "out", client, reply)
    assert (proxy.counts["recorded"], proxy.counts["too-long"]) == (1, 2)


# ----------------------------------------------------------------------------------------------------------------- disk


def test_files_are_the_owners_and_begin_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        for _step in range(3):
            async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as answer:
                await answer.read()

    run(out, client)
    run(out, client, file_mb=1e-6)
    files = sorted(out.glob("*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in files] == [3, 1, 1, 1]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


def test_a_full_budget_stops_the_recording_and_not_the_requests(tmp_path: Path) -> None:
    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        for _step in range(5):
            async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as answer:
                assert await answer.json() == ANSWER

    proxy = run(tmp_path / "out", client, max_gb=700e-9)
    assert len(rows_in(tmp_path / "out")) == 2
    assert proxy.counts["recording-stopped"] == 1


def test_the_sampling_rate_is_a_share_of_the_chats(tmp_path: Path) -> None:
    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        for _step in range(200):
            async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as answer:
                await answer.read()

    assert 60 <= run(tmp_path / "half", client, sampling_rate=0.5).counts["recorded"] <= 140
    assert run(tmp_path / "none", client, sampling_rate=0).counts["recorded"] == 0


def test_redaction_covers_every_text_and_never_fails_open(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def drop(row):\n    return None if 'drop' in str(row) else {**row, 'seen': True}\n"
        "def broken(row):\n    raise KeyError('x')\n"
    )
    row = row_of(ANSWER, messages=[{"role": "user", "content": "mail a@b.example"}], stop="a@b.example")
    row["tools"] = [{"type": "function", "function": {"name": "f", "description": "a@b.example"}}]
    redact = load_redaction((r"\S+@\S+",), f"{own}:drop")
    clean = redact(row)
    assert clean is not None
    assert clean["seen"]
    assert clean["conversations"][0]["content"] == "mail [REDACTED]"
    assert clean["tools"][0]["function"]["description"] == "[REDACTED]"
    assert redact({**row, "id": "drop"}) is None
    with pytest.raises(ConfigError, match=r"own.py has no function 'gone'"):
        load_redaction((), f"{own}:gone")

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        async with session.post(proxy.url + "/v1/chat/completions", json=ASK) as answer:
            assert await answer.json() == ANSWER

    proxy = run(tmp_path / "out", client, redact_function=f"{own}:broken")
    assert proxy.counts["failed"] == 1
    assert rows_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upstream": "127.0.0.1:30000"}, "expected http://HOST:PORT"),
        ({"listen": "8001"}, "expected HOST:PORT"),
        ({"redact": ("(",)}, "no regular expression"),
        ({"sampling_rate": 2}, "less than or equal to 1"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordSection(**{"upstream": "http://127.0.0.1:1", "out": tmp_path, **settings})


def test_one_recorder_a_directory(tmp_path: Path) -> None:
    config = RecordSection(upstream="http://127.0.0.1:1", out=tmp_path / "out")
    writer = TrafficWriter(config)
    with pytest.raises(ConfigError, match="in use by"):
        TrafficWriter(config)
    writer.close()


def test_the_command_keeps_what_was_finished_when_it_is_killed(tmp_path: Path) -> None:
    """SIGKILL right after a reply; the row is there. SIGTERM ends with a summary and exit code 0."""

    async def main(number: int, out: Path) -> tuple[int, str]:
        async with Upstream(plain) as upstream:
            words = ["record", "--upstream", upstream.url, "--listen", "127.0.0.1:0", "--out", str(out)]
            process = subprocess.Popen(
                [sys.executable, "-m", "specforge_lite", *words], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            url = (await asyncio.to_thread(process.stdout.readline)).split()[0]
            request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(ASK).encode())
            reply = await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=20).read())
            os.kill(process.pid, number)
            assert json.loads(reply) == ANSWER
            rest, _ = await asyncio.to_thread(process.communicate)
            return process.returncode, rest

    code, _ = asyncio.run(main(signal.SIGKILL, tmp_path / "killed"))
    assert code == -signal.SIGKILL
    assert [row["id"] for row in rows_in(tmp_path / "killed")] == ["chat-1"]
    code, rest = asyncio.run(main(signal.SIGTERM, tmp_path / "ended"))
    assert code == 0
    assert "recorded 1, requests 1" in rest
