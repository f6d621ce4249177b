"""The benchmark's client against a small real HTTP server that streams as SGLang and vLLM do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from specforge_lite.benchmark.measure import Ask
from specforge_lite.benchmark.server import ServerSession, reserved_tokens
from specforge_lite.benchmark.statistics import Counters
from specforge_lite.core.errors import EngineError
from specforge_lite.serving.environment import SERVING_ENGINES
from specforge_lite.serving.process import LaunchedServer
from specforge_lite.serving.session import Acceptance, ServingOptions, ServingSession

STEPS = [[1], [2, 3, 4], [5], [6, 7]]  # the prompt's own pass, then passes that accepted 2, 0 and 1 drafted tokens


class Handler(BaseHTTPRequestHandler):
    """Streams STEPS with pauses; `server.plan` says how."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """vLLM's counters: 3 drafts per request so far."""
        count = self.server.num_requests  # type: ignore[attr-defined]
        lines = [f'vllm:spec_decode_num_drafts_total{{engine="0"}} {3.0 * count}']
        for position, each in enumerate((2, 1)):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines.append(f'{name}{{engine="0",position="{position}"}} {float(each * count)}')
        self._send(200, "\n".join(lines).encode())

    def do_POST(self) -> None:
        """A generation, or SGLang's /flush_cache."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = cast(Any, self.server)
        server.seen.append((self.path, json.loads(body) if body else None))
        if self.path.startswith("/flush_cache"):
            self._send(200, b"ok")
            return
        server.num_requests += 1
        if server.plan == "refuse":
            self._send(400, b'{"object": "error",\n "message": "too long"}')
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = sglang_events() if self.path == "/generate" else vllm_events(server.plan == "merge")
        if server.plan == "complain":
            events = [{"error": {"message": "Requested\ntoo much", "code": 400}}]
        for number, event in enumerate(events):
            if server.plan == "die" and number == 2:
                self.close_connection = True
                return
            time.sleep(0.02)
            self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, payload: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(payload), payload))
        self.wfile.flush()

    def _send(self, status: int, payload: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def sglang_events() -> list[dict[str, Any]]:
    """Each repeats the answer so far."""
    events, tokens = [], []
    for number, step in enumerate(STEPS):
        tokens += step
        facts = {"completion_tokens": len(tokens), "spec_verify_ct": number, "finish_reason": None}
        events.append({"output_ids": list(tokens), "meta_info": facts})
    events[-1]["meta_info"] |= {"finish_reason": {"type": "length"}, "spec_correct_drafts_histogram": [1, 1, 1]}
    return events


def vllm_events(merged: bool) -> list[dict[str, Any]]:
    """Each holds the new tokens."""
    steps = [STEPS[0], STEPS[1] + STEPS[2], STEPS[3]] if merged else STEPS
    events = [{"choices": [{"token_ids": step, "text": "", "finish_reason": None}]} for step in steps]
    events[-1]["choices"][0]["finish_reason"] = "length"
    return events


class Running:
    """Stands where a launched server does."""

    def __init__(self, url: str) -> None:
        self.spec, self.stopped = SimpleNamespace(url=url, log_path=Path("server.log")), False

    def stop(self) -> None:
        self.stopped = True


@contextmanager
def session_on(backend: str, plan: str = "", draft: str | None = "draft") -> Iterator[tuple[ServerSession, Any]]:
    server = cast(Any, ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    server.plan, server.seen, server.num_requests = "", [], 0
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    running = Running(f"http://127.0.0.1:{server.server_address[1]}")
    options = ServingOptions(backend, "m", draft, num_steps=2, num_draft_tokens=3, max_length=100)
    session = ServerSession(ServingSession(options, cast(LaunchedServer, running)))
    server.plan, warm_up = plan, server.seen.pop()[1]
    assert (warm_up.get("prompt") or warm_up["input_ids"]) == [1, 2, 3, 4]
    try:
        yield session, server
    finally:
        session.close()
        server.shutdown()
        server.server_close()
        assert running.stopped


ASK = Ask((10, 11), 7, 0.5)


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_an_answer_with_its_passes_and_times(backend: str) -> None:
    with session_on(backend) as (session, server):
        session.begin()
        reply = session.generate([ASK])[0]
        assert reply.token_ids == (1, 2, 3, 4, 5, 6, 7)
        assert reply.passes == 3
        assert reply.accepted_at == (2, 1)
        assert 0.02 <= reply.first_token_seconds < reply.seconds
        assert reply.seconds >= 0.08 * 0.9
        assert (reply.finish_reason, reply.num_first_tokens) == ("length", 1)
        path, body = server.seen[-1]
        if backend == "sglang":
            assert (path, server.seen[0][0]) == ("/generate", "/flush_cache?timeout=30")
            params = {"max_new_tokens": 7, "temperature": 0.5, "ignore_eos": False}
            assert body == {"input_ids": [10, 11], "sampling_params": params, "stream": True}
            assert session.counters() == Counters()
        else:
            assert path == "/v1/completions"
            assert body["prompt"] == [10, 11]
            assert (body["max_tokens"], body["temperature"], body["stream"]) == (7, 0.5, True)
            assert session.counters() == Counters(3, (2, 1))
            session.begin()
            assert session.counters() == Counters(0, (0, 0))
        assert session.context_length == 100 - 8 - 3


def test_joined_chunks_differ_from_the_server_s_count() -> None:
    with session_on("vllm", "merge") as (session, _):
        session.begin()
        reply = session.generate([ASK])[0]
        assert reply.token_ids == (1, 2, 3, 4, 5, 6, 7)
        assert reply.passes == 2
        assert session.counters().passes == 3


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_without_a_draft_there_are_no_passes(backend: str) -> None:
    with session_on(backend, draft=None) as (session, _):
        session.begin()
        reply = session.generate([ASK])[0]
        assert reply.passes is None
        assert session.counters() == Counters()
        assert session.context_length == 92


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("refuse", r"HTTP 400: .*too long"),
        ("die", r"^an answer broke off: http://127.*; log: server.log$"),
        ("complain", r"^(sglang|vllm): Requested too much$"),
    ],
)
def test_a_server_that_fails_is_one_clear_line(backend: str, plan: str, message: str) -> None:
    with session_on(backend, plan) as (session, _), pytest.raises(EngineError, match=message) as raised:
        session.generate([ASK])
    assert "\n" not in str(raised.value)


def test_room_that_a_server_keeps_back() -> None:
    assert reserved_tokens(0, 0, 0) == 8
    assert reserved_tokens(3, 1, 4) == 8 + 4
    assert reserved_tokens(7, 10, 60) == 8 + 70


def test_metrics_of_several_engines_are_added() -> None:
    read = SERVING_ENGINES["vllm"].read_metrics
    text = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 5.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 7.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 1e+00
"""
    assert read(text) == Acceptance(15, (10, 1))
    assert read("") == Acceptance()
