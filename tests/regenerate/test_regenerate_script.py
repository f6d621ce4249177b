"""The script as a process: killed at random moments, servers gone, SIGTERM; and the in-process backend."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.settings import parse_config
from specforge_lite.data.reading import RowFile
from specforge_lite.inference import hf_generate
from specforge_lite.inference.hf_generate import GenerationRequest, generate_batch
from specforge_lite.regenerate.hf_backend import HfBackend, take_alike
from specforge_lite.regenerate.rows import RowSource
from specforge_lite.regenerate.run import run, run_async
from specforge_lite.regenerate.settings import RegenerateConfig
from specforge_lite.regenerate.turns import Question, Sampling
from tests.fake_chat_server import FakeServer, answer_to
from tests.training_runs import ScriptProcess, start_script


def write_prompts(path: Path, texts: list[str]) -> Path:
    rows = [{"id": f"r{i}", "conversations": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_in(directory: Path, pattern: str = "*_*.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(directory.glob(pattern)) for line in path.read_text().splitlines()]


def start(tmp_path: Path, server: FakeServer, *flags: str) -> ScriptProcess:
    words = ["--raw-data-file", str(tmp_path / "in.jsonl"), "--output-dir", str(tmp_path / "out"), *flags]
    words += ["--server-address-port", server.address, "--retry-base-seconds", "0.05", "--server-wait", "0.5"]
    return start_script("scripts/generate_data_by_target.py", words, tmp_path / "log")


async def run_here(tmp_path: Path, server: FakeServer) -> None:
    argv = ["--raw-data-file", str(tmp_path / "in.jsonl"), "--output-dir", str(tmp_path / "out")]
    config = parse_config(RegenerateConfig, [*argv, "--server-address-port", server.address])
    with RowFile(config.prompts.raw_data_file) as file:
        await run_async(config, RowSource(file))


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def with_server(scenario: Callable[[FakeServer], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        server = FakeServer(**options)
        await server.start()
        try:
            await scenario(server)
        finally:
            await server.stop()

    asyncio.run(main())


def test_sigkill_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    num_rows = 300
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(num_rows)])
    rng = random.Random(0)

    async def scenario(server: FakeServer) -> None:
        flags = ["--max-concurrency", "16", "--num-per-shard", "40", "--max-retries", "0"]
        for _ in range(3):
            script = start(tmp_path, server, *flags)
            target = sum(server.num_requests.values()) + rng.randrange(20, 80)
            await until(lambda target=target: sum(server.num_requests.values()) >= target)  # type: ignore[misc]
            script.process.kill()
            assert (await asyncio.to_thread(script.end)).returncode == -signal.SIGKILL
        done = await asyncio.to_thread(start(tmp_path, server, *flags).end)
        assert done.returncode == 0, done.stderr
        assert "done before" in done.stdout
        # only what was in flight at a kill may be asked twice
        assert sum(server.num_requests.values()) <= num_rows + 3 * 16

    with_server(scenario, latency_s=0.02, fault_share=0.1, fault_kinds=["http-500", "wrong-json"])
    out = tmp_path / "out"
    assert not list(out.glob("*.part"))
    assert Counter(row["id"] for row in rows_in(out)) == Counter(f"r{i}" for i in range(num_rows))
    errors = rows_in(out, "error_*")
    assert 10 < len(errors) < 60
    assert {row["reason"] for row in errors} == {"http-500", "wrong-json"}
    for row in rows_in(out, "shard_*"):
        assert row["conversations"][1]["content"] == answer_to(row["conversations"][0]["content"])


def test_all_servers_dead_is_exit_code_2_in_one_line_with_state_kept(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(200)])

    async def scenario(server: FakeServer) -> None:
        script = start(tmp_path, server, "--max-concurrency", "8")
        await until(lambda: sum(server.num_requests.values()) >= 40)
        await server.stop()
        done = await asyncio.to_thread(script.end)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2
        assert last.startswith(f"error: no server is left ({server.address}: ")
        assert "Traceback" not in done.stderr
        assert " answered in " in done.stdout
        assert 20 < len(rows_in(tmp_path / "out", "*.jsonl.part")) < 200

    with_server(scenario, latency_s=0.05)


def test_sigterm_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", [f"question {i}" for i in range(100)])

    async def scenario(server: FakeServer) -> None:
        script = start(tmp_path, server, "--max-concurrency", "4")
        await until(lambda: sum(server.num_requests.values()) >= 20)
        script.process.terminate()
        assert (await asyncio.to_thread(script.end)).returncode == 143
        assert 0 < len(rows_in(tmp_path / "out", "*.part")) < 100
        server.latency_s = 0
        await run_here(tmp_path, server)

    with_server(scenario, latency_s=0.1)
    assert Counter(row["id"] for row in rows_in(tmp_path / "out")) == Counter(f"r{i}" for i in range(100))


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        done = await asyncio.to_thread(start(tmp_path, server, "--num-per-shart", "5").end)
        assert done.returncode == 2
        assert done.stderr.strip() == "error: --num-per-shart: unknown flag; did you mean '--num-per-shard'?"
        with pytest.raises(DataError, match=f"^{tmp_path / 'in.jsonl'}: No such file or directory$"):
            await run_here(tmp_path, server)

    with_server(scenario)


def test_an_output_directory_that_cannot_be_made(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", ["q"])
    (tmp_path / "out").write_text("a file where a directory is wanted")

    async def scenario(server: FakeServer) -> None:
        with pytest.raises(ConfigError, match=f"^output_dir {tmp_path / 'out'}: File exists$"):
            await run_here(tmp_path, server)

    with_server(scenario)


# ------------------------------------------------------------------------------------------------------ hf, in process


def hf_config(tmp_path: Path, target: Path, *flags: str) -> RegenerateConfig:
    argv = ["--target-backend", "hf", "--target-model-path", str(target), "--target-dtype", "float32"]
    argv += ["--raw-data-file", str(tmp_path / "in.jsonl"), "--output-dir", str(tmp_path / "out"), *flags]
    return parse_config(RegenerateConfig, argv)


def test_hf_answers_equal_plain_generation(tmp_path: Path, tiny_target: Path) -> None:
    texts = [f"Tom has {i} apples and eats {i // 2}. How many are left?" for i in range(3, 14)]
    write_prompts(tmp_path / "in.jsonl", texts)
    summary = run(hf_config(tmp_path, tiny_target, "--max-tokens", "24", "--batch-size", "4"))
    assert (summary.num_answered, summary.num_errors) == (11, 0)
    backend = HfBackend(str(tiny_target), "float32", 1)
    for row, text in zip(rows_in(tmp_path / "out", "shard_*"), texts):
        prompt = backend.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        (alone,) = generate_batch(backend.lm, [GenerationRequest(prompt["input_ids"], 24)], backend.eos_token_ids)
        expected = backend.tokenizer.decode(alone.token_ids, skip_special_tokens=True)
        assert row["conversations"] == [
            {"role": "user", "content": text},
            {"role": "assistant", "content": expected, "finish_reason": alone.finish_reason},
        ]
        assert row["finish_reason"] == alone.finish_reason


def test_hf_turn_by_turn_and_too_long_prompts(tmp_path: Path, tiny_target: Path) -> None:
    rows = [
        {"id": "two", "conversations": [
            {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "x"},
            {"role": "user", "content": "And twice that?"}, {"role": "assistant", "content": "y"}]},
        {"id": "long", "prompt": "word " * 2000},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(hf_config(tmp_path, tiny_target, "--max-tokens", "400", "--temperature", "0.7"))
    (answered,) = rows_in(tmp_path / "out", "shard_*")
    roles = [m["role"] for m in answered["conversations"]]
    assert roles == ["user", "assistant"] * (2 if answered.get("num_recorded_turns_left") is None else 1)
    (error,) = rows_in(tmp_path / "out", "error_*")
    assert (error["id"], error["reason"]) == ("long", "prompt-too-long")
    assert "the target takes 1024" in error["detail"]


def test_hf_sampling_does_not_depend_on_the_batch(tmp_path: Path, tiny_target: Path) -> None:
    texts = [f"Ann has {i} cats. How many legs?" for i in range(10)]
    write_prompts(tmp_path / "in.jsonl", texts)
    flags = ["--max-tokens", "12", "--temperature", "0", "1.0", "--seed", "3"]
    run(hf_config(tmp_path, tiny_target, *flags, "--batch-size", "3"))
    first = rows_in(tmp_path / "out", "shard_*")
    (tmp_path / "out").rename(tmp_path / "other")
    run(hf_config(tmp_path, tiny_target, *flags, "--batch-size", "10"))
    assert rows_in(tmp_path / "out", "shard_*") == first
    assert {row["temperature"] for row in first} == {0.0, 1.0}


def test_hf_stops_between_segments(tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_generate, "SEGMENT_TOKENS", 2)
    backend = HfBackend(str(tiny_target), "float32", 2)
    calls = iter([False, False, True])
    (result,) = generate_batch(backend.lm, [GenerationRequest([5, 6], 50)], [], 0, lambda: next(calls))
    assert len(result.token_ids) == 4
    asyncio.run(backend.aclose())


def test_hf_user_mistakes(tmp_path: Path, tiny_target: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", ["q"])
    with pytest.raises(ConfigError, match="model_name: required with --target-backend hf"):
        parse_config(RegenerateConfig, ["--target-backend", "hf", "--raw-data-file", "a", "--output-dir", "b"])
    with pytest.raises(ConfigError, match="target_model_path"):
        run(hf_config(tmp_path, tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the input; choose another name"):
        parse_config(
            RegenerateConfig, ["--raw-data-file", "a.jsonl", "--output-dir", "b", "--output-file", "./a.jsonl"]
        )
    for flags, message in [
        (["--extra-body", "{"], "--extra-body: not valid JSON"),
        (["--extra-body", '{"stream": true}'], "--extra-body: 'stream' is set by the program"),
        (["--temperature", "-1"], "--temperature: expected one or more numbers >= 0"),
        (["--server-address-port"], "server.address.port: expected at least one"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse_config(RegenerateConfig, ["--raw-data-file", "a.jsonl", "--output-dir", "b", *flags])


def test_alike_prompts_are_taken_together_the_oldest_first() -> None:
    waiting = [(GenerationRequest([1] * n, 1), n) for n in (50, 10, 52, 11, 49, 90)]
    assert [n for _, n in take_alike(waiting, 3)] == [50, 52, 49]
    assert [n for _, n in take_alike(waiting, 2)] == [10, 11]
    assert [n for _, n in take_alike(waiting, 5)] == [90]
    assert waiting == []


def test_an_error_inside_a_batch_reaches_every_row_of_it(tiny_target: Path) -> None:
    backend = HfBackend(str(tiny_target), "float32", 2)
    backend.lm = None
    question = Question([{"role": "user", "content": "q"}], None, Sampling(4, 0.0, 1.0, 0))

    async def ask() -> list[Any]:
        return await asyncio.gather(backend.answer(question), backend.answer(question), return_exceptions=True)

    assert [type(result) for result in asyncio.run(ask())] == [AttributeError, AttributeError]
