"""Servers that answer wrongly, met by every client of ours: training that captures, regeneration, the benchmark. Each
ends in one clear line that names the server and what it did, exit code 2, after a bounded number of requests.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.capture import remote
from specforge_lite.core import http
from specforge_lite.regenerate import servers
from tests.bad_server import ELSEWHERE, KINDS, BadServer
from tests.script_runner import end_of_script, visible

ROW = {"id": "a", "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]}
MAX_SECONDS = 15.0


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of production, scaled down: what is tested is that they hold."""
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(http, "FACTS_SECONDS", 0.3)
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 1 << 20)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.002)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.002)
    monkeypatch.setattr(servers, "BODY_BYTES", 1 << 20)
    monkeypatch.setattr(servers, "PROBE_SECONDS", 0.3)


def rows(tmp_path: Path, count: int = 1) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**ROW, "id": str(i)}) + "\n" for i in range(count)))
    return path


def check_end(code: int, error: str, address: str, start: float) -> None:
    assert code == 2
    assert error.startswith("error: ")
    assert error.isprintable()
    assert len(error) < 1500
    assert address in error
    assert time.monotonic() - start < MAX_SECONDS


# ------------------------------------------------------------------------------------------------------------- capture

# What the line says, for kinds that a word describes; the others are told by what was found.
CAPTURE_SAYS = {
    "http 400": "HTTP 400: as asked",
    "http 401": "HTTP 401: as asked",
    "http 404": "HTTP 404: as asked",
    "http 429": "HTTP 429: as asked",
    "http 500": "HTTP 500: as asked",
    "http 503": "HTTP 503: as asked",
    "a redirect": f"HTTP 307: redirects to '{ELSEWHERE}', which is not followed",
    "a redirect for ever": "HTTP 302: redirects to '/generate', which is not followed",
    "a web page": "the reply is not JSON",
    "an empty body": "the reply is not JSON",
    "not utf-8": "the reply is not JSON",
    "nested without end": "the reply is not JSON",
    "a list": "the reply is not a JSON object but list",
    "null": "the reply is not a JSON object but NoneType",
    "text": "the reply is not a JSON object but str",
    "compressed, and it is not": "the reply is compressed although that was not asked for",
    "an endless body": "the reply is longer than 1048576 bytes",
    "a slow drip": "no complete reply within 0.3 s",
    "silence": "no complete reply within 0.3 s",
}
BROKEN = ("half a body", "no reply", "not http", "an endless header")


def capture_words(tmp_path: Path, tiny_target: Path, server: BadServer) -> list[str]:
    return [
        "--target-model-path", str(tiny_target), "--target-backend", "sglang", "--target-url",
        f"http://{server.address}", "--train-data-path", str(rows(tmp_path)), "--cache-dir", str(tmp_path / "cache"),
        "--max-length", "64", "--offline-dir", str(tmp_path / "states"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_capture_from_a_server_whose_replies_are_wrong(
    kind: str, tmp_path: Path, tiny_target: Path, capsys: Any
) -> None:
    start = time.monotonic()
    with BadServer(kind, ("/generate",)) as server:
        code, error = end_of_script("capture_hidden_states", capture_words(tmp_path, tiny_target, server), capsys)
        check_end(code, error, server.address, start)
        assert CAPTURE_SAYS.get(kind, "") in error
        if kind in BROKEN:
            assert "the connection broke" in error
        assert 1 <= server.num_requests <= remote.MAX_BREAKS + 1
    assert [name for name in visible(tmp_path / "states") if name.startswith(("states", "manifest"))] == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a redirect for ever"])
def test_capture_from_a_server_that_does_not_say_what_it_is(
    kind: str, tmp_path: Path, tiny_target: Path, capsys: Any
) -> None:
    start = time.monotonic()
    with BadServer(kind, ("/get_server_info",)) as server:
        code, error = end_of_script("capture_hidden_states", capture_words(tmp_path, tiny_target, server), capsys)
        if "sglang 5" in error or "sglang []" in error or "sglang None" in error:
            server_named = "supported are versions from"
        else:
            server_named = server.address
        check_end(code, error, server_named, start)


# -------------------------------------------------------------------------------------------------------- regeneration

REGENERATION_SAYS = {
    "http 400": "http-400",
    "http 401": "http-401",
    "http 404": "http-404",
    "http 429": "http-429",
    "http 500": "http-500",
    "http 503": "http-503",
    "a redirect": "redirect",
    "half a body": "half-body",
    "no reply": "disconnected",
    "not http": "wrong-http",
    "a web page": "wrong-json",
    "an empty body": "wrong-json",
    "not utf-8": "wrong-json",
    "nested without end": "wrong-json",
    "a list": "wrong-form",
    "null": "wrong-form",
    "text": "wrong-form",
    "an object without content": "wrong-form",
    "numbers in odd places": "wrong-form",
    "lists in odd places": "wrong-form",
    "compressed, and it is not": "compressed",
    "an endless body": "body-too-large",
    "a slow drip": "timeout",
    "silence": "timeout",
}


@pytest.mark.parametrize("kind", REGENERATION_SAYS)
def test_regeneration_by_a_server_whose_replies_are_wrong(
    kind: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    with BadServer(kind, ("/v1/chat",)) as server:
        words = [
            "--raw-data-file", str(rows(tmp_path, 3)), "--output-dir", str(tmp_path / "out"), "--server-address-port",
            server.address, "--max-retries", "1", "--retry-base-seconds", "0.01", "--request-timeout", "0.3",
            "--server-wait", "0.2", "--max-tokens", "4", "--output-file", str(tmp_path / "merged.jsonl"),
        ]  # fmt: skip
        code, error = end_of_script("generate_data_by_target", words, capsys)
        place = str(tmp_path / "out") if "no row was answered" in error else server.address
        check_end(code, error, place, start)
        assert REGENERATION_SAYS[kind] in error
    assert not (tmp_path / "merged.jsonl").exists()
    for file in visible(tmp_path / "out"):
        assert not file.startswith("shard") or (tmp_path / "out" / file).read_text() == ""


def test_every_kind_is_met_by_some_client() -> None:
    assert set(REGENERATION_SAYS) <= set(KINDS)
    assert len(KINDS) >= 25
