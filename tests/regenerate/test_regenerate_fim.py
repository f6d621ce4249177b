"""Holes in code filled by the target: the prompt's token ids by hand, over HTTP and in process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import parse_config
from specforge_lite.data.fim import to_fim_row
from specforge_lite.data.reading import RowFile
from specforge_lite.regenerate.rows import FimPrompts, RowSource, read_fim_row
from specforge_lite.regenerate.run import run, run_async
from specforge_lite.regenerate.settings import RegenerateConfig
from tests.fake_chat_server import FakeServer, answer_to

ROWS = [
    {"id": "f1", "prefix": "def add(a, b):\n", "middle": "    return a - b\n", "suffix": "\nprint(add(1, 2))\n"},
    {"id": "f2", "prefix": "x = ", "suffix": "\nprint(x)\n", "source": "x.py"},
    {"id": "chat", "prompt": "hello"},
    {"id": "bad", "prefix": 7, "middle": "x", "suffix": ""},
]


def write(tmp_path: Path) -> list[str]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["--raw-data-file", str(tmp_path / "in.jsonl"), "--output-dir", str(tmp_path / "out")]


def rows_in(tmp_path: Path, pattern: str) -> dict[str, dict[str, Any]]:
    (path,) = (tmp_path / "out").glob(pattern)
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def by_hand(tiny_target: Path, prefix: str, suffix: str) -> list[int]:
    """<prefix> P <suffix> S <middle>, each piece tokenized apart."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    before, after, hole = tokenizer.convert_tokens_to_ids(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    return [before, *tokenizer.encode(prefix), after, *tokenizer.encode(suffix), hole]


def test_over_http(tmp_path: Path, tiny_target: Path) -> None:
    argv = [*write(tmp_path), "--tokenizer-path", str(tiny_target), "--max-tokens", "50"]

    async def scenario() -> list[dict[str, Any]]:
        server = FakeServer()
        server.keep_bodies = True
        await server.start()
        config = parse_config(RegenerateConfig, [*argv, "--server-address-port", server.address])
        with RowFile(config.prompts.raw_data_file) as file:
            await run_async(config, RowSource(file))
        await server.stop()
        assert server.paths["/v1/completions"] == 2
        assert server.paths["/v1/chat/completions"] == 1
        return [body for body in server.bodies if "prompt" in body]

    bodies = {len(body["prompt"]): body for body in asyncio.run(scenario())}
    for row in ROWS[:2]:
        expected = by_hand(tiny_target, str(row["prefix"]), str(row["suffix"]))
        body = bodies[len(expected)]
        assert body["prompt"] == expected
        assert body["stop_token_ids"] == [0, 2]  # <|endoftext|>, and what ends an answer of the tokenizer
        assert body["max_tokens"] == 50
        answered = rows_in(tmp_path, "shard_*.jsonl")[str(row["id"])]
        assert to_fim_row(answered) == to_fim_row({**row, "middle": answer_to(str(expected))})
        assert answered["finish_reason"] == "stop"
    assert rows_in(tmp_path, "shard_*.jsonl")["chat"]["conversations"][1]["content"] == answer_to("hello")
    assert rows_in(tmp_path, "error_*.jsonl")["bad"]["reason"] == "content-not-text"


def test_in_process(tmp_path: Path, tiny_target: Path) -> None:
    argv = [*write(tmp_path), "--target-backend", "hf", "--model-name", str(tiny_target), "--max-tokens", "20"]
    run(parse_config(RegenerateConfig, argv))
    rows = rows_in(tmp_path, "shard_*.jsonl")
    assert set(rows) == {"f1", "f2", "chat"}
    assert rows["f2"]["middle"].strip()
    assert (rows["f2"]["prefix"], rows["f2"]["suffix"]) == ("x = ", "\nprint(x)\n")
    assert "<|" not in rows["f1"]["middle"]


def test_long_code_is_cut_around_the_hole(tiny_target: Path) -> None:
    prompts = FimPrompts(AutoTokenizer.from_pretrained(tiny_target), "psm", max_length=64, max_tokens=40)
    assert prompts.max_tokens == 32
    row = read_fim_row({"prefix": "a = 1\n" * 200, "suffix": "b = 2\n" * 200})
    ids = prompts.prompt_ids(row)
    assert len(ids) == 64 - 32
    short = prompts.prompt_ids(read_fim_row({"prefix": "a", "suffix": "b"}))
    assert (ids[0], ids[-1]) == (short[0], short[-1])


def test_what_is_missing_is_named(tmp_path: Path, tiny_target: Path) -> None:
    argv = write(tmp_path)

    async def scenario() -> None:
        server = FakeServer()
        await server.start()
        config = parse_config(RegenerateConfig, [*argv, "--server-address-port", server.address])
        with (
            RowFile(config.prompts.raw_data_file) as file,
            pytest.raises(ConfigError, match="tokenizer_path: required"),
        ):
            await run_async(config, RowSource(file))
        await server.stop()

    asyncio.run(scenario())
    with pytest.raises(ConfigError, match=r"fim_order spm: qwen2\.5-coder models know psm only"):
        FimPrompts(AutoTokenizer.from_pretrained(tiny_target), "spm", 64, 8)
