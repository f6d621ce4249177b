"""Regeneration against real HTTP servers in the same event loop: faults, dying servers, limits, the key."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.settings import parse_config
from specforge_lite.data.conversations import to_conversation
from specforge_lite.data.reading import RowFile
from specforge_lite.regenerate.rows import RowSource
from specforge_lite.regenerate.run import Summary, run_async
from specforge_lite.regenerate.servers import parse_address, parse_answer, room_left
from specforge_lite.regenerate.settings import RegenerateConfig
from specforge_lite.regenerate.turns import RequestFailed
from tests.fake_chat_server import FakeServer, answer_to

QUICK = ["--retry-base-seconds", "0.01", "--request-timeout", "5", "--server-wait", "0.5", "--max-concurrency", "8"]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write_prompts(path: Path, texts: Iterable[str]) -> Path:
    rows = [{"id": f"r{i}", "conversations": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


async def regenerate(directory: Path, servers: list[FakeServer], *flags: str) -> Summary:
    argv = ["--raw-data-file", str(directory / "in.jsonl"), "--output-dir", str(directory / "out"), *QUICK]
    argv += ["--server-address-port", *(server.address for server in servers), *flags]
    config = parse_config(RegenerateConfig, argv)
    with RowFile(config.prompts.raw_data_file) as file:
        return await run_async(config, RowSource(file, config.prompts.sample_size))


def with_servers(count: int, scenario: Callable[..., Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        servers = [FakeServer(**options) for _ in range(count)]
        try:
            for server in servers:
                await server.start()
            return await scenario(*servers)
        finally:
            for server in servers:
                await server.stop()

    return asyncio.run(main())


def read(directory: Path, pattern: str) -> list[dict[str, Any]]:
    files = sorted((directory / "out").glob(pattern))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def check_complete(directory: Path, num_rows: int) -> None:
    """Every row once, with the answer to its own question."""
    found = Counter(row["id"] for row in read(directory, "*_*.jsonl"))
    assert found == Counter(f"r{i}" for i in range(num_rows))
    for row in read(directory, "shard_*.jsonl"):
        question, answer = row["conversations"]
        assert answer == {"role": "assistant", "content": answer_to(question["content"]), "finish_reason": "stop"}


def test_two_servers_share_the_rows(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(200)])

    async def scenario(a: FakeServer, b: FakeServer) -> None:
        summary = await regenerate(tmp_path, [a, b], "--num-per-shard", "64", "--output-file", str(tmp_path / "all"))
        assert (summary.num_answered, summary.num_errors, summary.num_tokens) == (200, 0, 1400)
        assert a.max_in_flight == b.max_in_flight == 8
        assert min(sum(a.num_requests.values()), sum(b.num_requests.values())) > 50
        assert set((a.num_requests + b.num_requests).values()) == {1}
        assert set(a.paths) == {"/v1/models", "/v1/chat/completions"}

    with_servers(2, scenario, latency_s=0.01)
    check_complete(tmp_path, 200)
    assert [row["row"] for row in read(tmp_path, "../all")] == list(range(200))
    row = read(tmp_path, "shard_0-64.jsonl")[0]
    assert (row["finish_reason"], row["temperature"]) == ("stop", 0.0)
    assert to_conversation(row).id == "r0"


RETRIED = {
    "http-429": "http-429", "http-500": "http-500", "http-503": "http-503", "redirect": "redirect",
    "half-body": "half-body", "disconnect": "disconnected", "wrong-json": "wrong-json", "nested": "wrong-json",
    "no-choices": "wrong-form", "not-text": "wrong-form", "surrogate": "lone-surrogate", "endless": "body-too-large",
    "stall": "timeout", "drip": "timeout",
}  # fmt: skip
NOT_RETRIED = {"http-400": "http-400", "http-404": "http-404", "compressed": "compressed"}


@pytest.mark.parametrize("kind", [*RETRIED, *NOT_RETRIED])
def test_each_broken_reply_has_a_name_and_a_bounded_number_of_attempts(tmp_path: Path, kind: str) -> None:
    write_prompts(tmp_path / "in.jsonl", ["fine", "once", "always"])

    async def scenario(server: FakeServer) -> None:
        await regenerate(tmp_path, [server], "--max-retries", "2", "--request-timeout", "0.5")
        assert server.num_requests["fine"] == 1
        assert server.num_requests["once"] == (2 if kind in RETRIED else 1)
        assert server.num_requests["always"] == (3 if kind in RETRIED else 1)

    with_servers(1, scenario, faults={"once": [kind], "always": [kind] * 9})
    errors = {row["id"]: row for row in read(tmp_path, "error_*.jsonl")}
    assert set(errors) == ({"r2"} if kind in RETRIED else {"r1", "r2"})
    assert errors["r2"]["reason"] == {**RETRIED, **NOT_RETRIED}[kind]
    assert errors["r2"]["conversations"] == [{"role": "user", "content": "always"}]
    assert "\n" not in errors["r2"]["detail"]
    check_complete(tmp_path, 3)


def test_a_mix_of_faults_loses_and_doubles_nothing(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(400)])

    async def scenario(a: FakeServer, b: FakeServer) -> None:
        summary = await regenerate(tmp_path, [a, b], "--request-timeout", "0.4")
        assert (summary.num_answered, summary.num_errors) == (400, 0)
        assert sum(len(s.num_faults) for s in (a, b)) > 6

    kinds = ["http-500", "http-429", "half-body", "wrong-json", "disconnect", "stall", "drip", "no-choices"]
    with_servers(2, scenario, fault_share=0.2, fault_kinds=kinds)
    check_complete(tmp_path, 400)


def test_retry_after_pauses_the_server(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", ["q0", "q1", "q2"])

    async def scenario(server: FakeServer) -> float:
        server.retry_after = "0.6"
        start = time.monotonic()
        await regenerate(tmp_path, [server])
        return time.monotonic() - start

    assert with_servers(1, scenario, faults={"q0": ["http-429"]}) >= 0.6
    check_complete(tmp_path, 3)


def test_a_dead_server_is_left_out_and_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(300)])

    async def scenario(a: FakeServer, b: FakeServer) -> None:
        run = asyncio.create_task(regenerate(tmp_path, [a, b], "--max-concurrency", "4"))
        await asyncio.sleep(0.4)
        await a.stop()
        await asyncio.sleep(0.3)
        seen = sum(a.num_requests.values())
        await a.start(int(a.address.split(":")[1]))
        await run
        assert sum(a.num_requests.values()) > seen

    with_servers(2, scenario, latency_s=0.05)
    check_complete(tmp_path, 300)
    assert read(tmp_path, "error_*.jsonl") == []
    output = capsys.readouterr()
    assert "is out of rotation" in output.err
    assert "answers again" in output.out


def test_all_servers_dead_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(120)])

    async def scenario(a: FakeServer, b: FakeServer) -> None:
        run = asyncio.create_task(regenerate(tmp_path, [a, b], "--num-per-shard", "30"))
        await asyncio.sleep(0.25)
        await asyncio.gather(a.stop(), b.stop())
        with pytest.raises(EngineError, match=r"no server is left \(127.0.0.1:\d+: .*; 127.0.0.1:\d+: "):
            await run
        done = len(read(tmp_path, "*_*.jsonl*"))
        assert 0 < done < 120
        with pytest.raises(EngineError, match="no server is left"):  # at the start of a run: at once
            await regenerate(tmp_path, [a, b], "--num-per-shard", "30")
        await a.start(int(a.address.split(":")[1]))
        summary = await regenerate(tmp_path, [a], "--num-per-shard", "30")
        assert summary.num_kept == done
        assert summary.num_answered == 120 - done

    with_servers(2, scenario, latency_s=0.05)
    check_complete(tmp_path, 120)


@pytest.mark.parametrize("kind", ["http-404", "redirect", "wrong-json", "http-401"])
def test_a_server_that_never_answers_ends_the_run_before_the_rows_are_used_up(tmp_path: Path, kind: str) -> None:
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(500)])

    async def scenario(server: FakeServer) -> None:
        server.always = kind
        with pytest.raises(EngineError, match=f"no server is left .*{kind}"):
            await regenerate(tmp_path, [server])

    with_servers(1, scenario)
    assert len(read(tmp_path, "error_*")) < 50


def test_no_row_answered_is_an_error(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", ["#silent a", "#silent b"])

    async def scenario(server: FakeServer) -> None:
        with pytest.raises(EngineError, match=r"no row was answered \(empty-answer 2\)"):
            await regenerate(tmp_path, [server])

    with_servers(1, scenario)


def test_model_name_is_asked_for_or_checked(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", ["q"])

    async def scenario(server: FakeServer) -> None:
        server.keep_bodies = True
        await regenerate(tmp_path, [server])
        assert server.bodies[0]["model"] == "fake-model"
        with pytest.raises(ConfigError, match="no server has 'fake-modell'; did you mean 'fake-model'"):
            await regenerate(tmp_path, [server], "--model-name", "fake-modell")
        server.model = "new-model"
        with pytest.raises(ConfigError, match="model was 'fake-model', now 'new-model'"):
            await regenerate(tmp_path, [server])

    with_servers(1, scenario)


def test_the_request_says_everything_and_nothing_else(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", ["q"])

    async def scenario(server: FakeServer) -> list[dict[str, Any]]:
        server.keep_bodies = True
        flags = ["--max-tokens", "9", "--system-prompt", "be kind", "--extra-body", '{"top_k": 5}']
        await regenerate(tmp_path, [server], *flags, "--temperature", "0.5", "--top-p", "0.9")
        return server.bodies

    (body,) = with_servers(1, scenario)
    seed = body.pop("seed")
    assert 0 <= seed < 2**31
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "q"}]
    assert body == {
        "model": "fake-model", "messages": messages, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9,
        "stream": False, "top_k": 5,
    }  # fmt: skip


def test_multi_turn_tools_and_reasoning_over_http(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    turns = [
        {"role": "user", "content": "first #think"},
        {"role": "assistant", "content": "old"},
        {"role": "user", "content": "use it #call get"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "old", "function": {"name": "get"}}]},
        {"role": "tool", "content": "42", "tool_call_id": "old"},
        {"role": "assistant", "content": "old"},
    ]
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "r0", "conversations": turns, "tools": tools}) + "\n")

    async def scenario(server: FakeServer) -> list[dict[str, Any]]:
        server.keep_bodies = True
        await regenerate(tmp_path, [server])
        return server.bodies

    bodies = with_servers(1, scenario)
    assert [len(body["messages"]) for body in bodies] == [1, 3, 5]
    assert all(body["tools"] == tools for body in bodies)
    (row,) = read(tmp_path, "shard_*.jsonl")
    assert [m["role"] for m in row["conversations"]] == ["user", "assistant"] * 2 + ["tool", "assistant"]
    assert row["conversations"][1]["reasoning_content"] == "thinking of: first #think"
    assert row["conversations"][4] == {"role": "tool", "content": "42", "tool_call_id": "call_new"}
    assert row["conversations"][5]["content"] == answer_to("42")
    assert row["tools"] == tools


def test_an_answer_gets_the_room_that_is_left_and_answered_turns_are_kept(tmp_path: Path) -> None:
    """A context of 64 tokens with --max-tokens 64: no row fits as asked. Each turn has 10 words, each answer 13."""
    turns = [{"role": role, "content": f"{i} w w w w w w w w w"} for i in range(5) for role in ("user", "assistant")]
    rows = [{"id": "r0", "conversations": turns}, {"id": "r1", "prompt": "word " * 64}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def scenario(server: FakeServer) -> list[int]:
        server.keep_bodies = True
        await regenerate(tmp_path, [server], "--max-tokens", "64", "--max-retries", "0")
        return [body["max_tokens"] for body in server.bodies if server._refusal(body) is None]

    # prompts of 10, 10 + 13 + 10, 10 + 13 + 10 + 13 + 10 tokens; the fourth has 79
    assert sorted(with_servers(1, scenario, context_tokens=64)) == [8, 31, 54]
    (row,) = read(tmp_path, "shard_*.jsonl")
    assert [m["role"] for m in row["conversations"]] == ["user", "assistant"] * 3
    assert (row["num_recorded_turns_left"], row["left_out_reason"]) == (4, "prompt-too-long")
    (error,) = read(tmp_path, "error_*.jsonl")
    assert (error["id"], error["reason"]) == ("r1", "prompt-too-long")
    assert "64 in the messages" in error["detail"]


@pytest.mark.parametrize(
    ("message", "room"),
    [
        ("This model's maximum context length is 4096 tokens. However, you requested 4396 tokens (300 in the messages,"
         " 4096 in the completion).", 3796),
        ("'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum context length is 4096"
         " tokens and your request has 31 input tokens (4096 > 4096 - 31).", 4065),
        ("Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total of"
         " 4127 tokens: 31 tokens from the input messages and 4096 tokens for the completion.", 4065),
        ("max_tokens=4096 cannot be greater than max_model_len=2048. Please request fewer output tokens.", 2048),
        # a lower bound of the prompt, and no number of it: half as much
        ("maximum context length is 4096 tokens. However, your prompt contains at least 1 input tokens", 2048),
        ("the request exceeds the available context size, try increasing it", 2048),
        ("This model's maximum context length is 4096 tokens. However, your prompt contains at least 4097 input"
         " tokens, which exceeds this limit even without any output tokens.", 0),
        ("The input (5000 tokens) is longer than the model's context length (4096 tokens).", 0),
        ("Input length (5000) exceeds model's maximum context length (4096).", 0),
        ("This model's maximum context length is 4096 tokens. However, your prompt contains 99999 characters (more than"
         " 9999 characters, which is the upper bound for 4095 input tokens).", 0),
        ("temperature: expected at most 2", None),
        ("unknown model 'x'", None),
    ],
)  # fmt: skip
def test_room_that_a_refusal_leaves(message: str, room: int | None) -> None:
    assert room_left(message, 4096) == room


def test_bad_rows_are_errors_with_a_place_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = json.dumps({"id": "good", "prompt": "q"})
    (tmp_path / "in.jsonl").write_text(f"{good}\n{{broken\n" + json.dumps({"id": "odd", "messages": 5}) + "\n")
    with_servers(1, lambda server: regenerate(tmp_path, [server]))
    assert [row["id"] for row in read(tmp_path, "shard_*.jsonl")] == ["good"]
    errors = {row["id"]: (row["reason"], row["detail"]) for row in read(tmp_path, "error_*.jsonl")}
    assert errors["line-2"][0] == "not-json"
    assert errors["odd"][0] == "not-a-list"
    assert "line 3" in errors["odd"][1]
    assert [row["id"] for row in read(tmp_path, "error.jsonl")] == ["line-2", "odd"]
    (tmp_path / "in.jsonl").write_text(f"{good}\n")
    (tmp_path / "out").rename(tmp_path / "first")
    with_servers(1, lambda server: regenerate(tmp_path, [server]))
    assert not (tmp_path / "out" / "error.jsonl").exists()


def test_never_more_rows_in_work_than_the_window(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(500)])

    async def scenario(server: FakeServer) -> None:
        server.always = "stall"
        argv = ["--raw-data-file", str(tmp_path / "in.jsonl"), "--output-dir", str(tmp_path / "out")]
        argv += ["--server-address-port", server.address, "--max-concurrency", "5"]
        config = parse_config(RegenerateConfig, argv)
        with RowFile(config.prompts.raw_data_file) as file:
            source = RowSource(file)
            run = asyncio.create_task(run_async(config, source))
            await asyncio.sleep(0.5)
            assert server.in_flight == 5
            assert source.num_rows == 10
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

    with_servers(1, scenario)


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-17")
    write_prompts(tmp_path / "in.jsonl", ["fine", "bad"])

    async def scenario(server: FakeServer) -> set[str | None]:
        await regenerate(tmp_path, [server], "--max-retries", "0")
        return server.authorizations

    assert with_servers(1, scenario, faults={"bad": ["http-500"]}) == {"Bearer sk-very-secret-17"}
    assert read(tmp_path, "error_*.jsonl")[0]["detail"] == "HTTP 500: status 500 as asked; sent Bearer ***"
    output = capsys.readouterr()
    written = output.out + output.err + "".join(p.read_text() for p in (tmp_path / "out").iterdir())
    assert "secret" not in written


def test_a_refused_key_names_the_variable(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", ["q"])

    async def scenario(server: FakeServer) -> None:
        server.always = "http-401"
        with pytest.raises(EngineError, match="http-401"):
            await regenerate(tmp_path, [server])

    with_servers(1, scenario)


@pytest.mark.parametrize(
    ("text", "base_url"),
    [
        ("127.0.0.1:30000", "http://127.0.0.1:30000/v1"),
        ("host:1", "http://host:1/v1"),
        ("[::1]:30000", "http://[::1]:30000/v1"),
        ("http://host", "http://host/v1"),
        ("https://host:8443/api/v3/", "https://host:8443/api/v3"),
        ("http://host:80/", "http://host:80/v1"),
    ],
)
def test_addresses(text: str, base_url: str) -> None:
    assert parse_address(text) == base_url


@pytest.mark.parametrize(
    "text", ["host", "", "host:port", "host:99999", "ftp://host:1", "http://", "http://h:1/v1?key=x", "http://h/#a"]
)
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT or an http"):
        parse_address(text)


def test_a_password_in_an_address_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY") as caught:
        parse_address("http://me:hunter2@host:1")
    assert "hunter2" not in str(caught.value)


def test_answers_are_read_strictly() -> None:
    full = {"choices": [{"message": {"content": "hi", "reasoning": "hm"}, "finish_reason": None}], "usage": None}
    answer = parse_answer(json.dumps(full).encode())
    assert (answer.content, answer.reasoning, answer.finish_reason) == ("hi", "hm", "unknown")
    for body, reason in [
        (b"", "wrong-json"), (b"{", "wrong-json"), (b"\xff\xfe", "wrong-json"), (b"[]", "wrong-form"),
        (b"7", "wrong-form"), (b'{"choices": [{"text": "x"}]}', "wrong-form"), (b'{"choices": 3}', "wrong-form"),
        (b'{"choices": [{"message": {"content": ["x"]}}]}', "wrong-form"),
        (b'{"choices": [{"message": {"content": "", "tool_calls": [{}]}}]}', "wrong-form"),
    ]:  # fmt: skip
        with pytest.raises(RequestFailed) as caught:
            parse_answer(body)
        assert caught.value.reason == reason
        assert caught.value.retryable
