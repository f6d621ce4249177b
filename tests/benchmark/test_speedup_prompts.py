"""Benchmark prompts: what ships, local copies, forms of rows, and the rendering of conversations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.benchmark.prompts import BENCHMARKS, BenchmarkRequest, load_prompts
from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.data.prompts import ChatEncoder, Prompt


def load(text: str, data_dir: Path | None = None, num_shots: int = 0) -> list[Prompt]:
    return load_prompts(BenchmarkRequest.parse(text), data_dir, num_shots)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "count", "num_turns", "categories"),
    [
        ("mtbench:80", 80, 2, 8),
        ("gsm8k:200", 200, 1, 1),
        ("humaneval:200", 164, 1, 1),
        ("math500:200", 200, 1, 7),
        ("mtbench", 80, 2, 8),
    ],
)
def test_shipped_prompts(text: str, count: int, num_turns: int, categories: int) -> None:
    prompts = load(text)
    assert len(prompts) == count
    assert {len(p.turns) for p in prompts} == {num_turns}
    assert len({p.id for p in prompts}) == count
    assert len({p.category for p in prompts}) == categories
    assert all(turn.strip() for p in prompts for turn in p.turns)


def test_shipped_prompts_hold_no_solution() -> None:
    prompts = load("humaneval:1") + load("gsm8k:1") + load("math500:1")
    assert prompts[0].turns[0].startswith("Complete the code I provided.\n\nfrom typing import List")
    assert prompts[1].turns[0].endswith("How much in dollars does she make every day at the farmers' market?")
    assert prompts[2].turns[0].endswith("put your final answer within \\boxed{}.")
    assert prompts[2].category == "Precalculus"


def test_few_shot_gsm8k() -> None:
    plain, shot = load("gsm8k:2")[1], load("gsm8k:2", num_shots=5)[1]
    assert shot.turns[0].count("Question: ") == 6
    assert shot.turns[0].endswith(f"Question: {plain.turns[0]}\nAnswer:")
    assert shot.turns[0].count("####") == 5
    assert load("mtbench:1", num_shots=5) == load("mtbench:1")
    with pytest.raises(ConfigError, match=r"num_shots: expected 0\.\.5, found 6"):
        load("gsm8k:2", num_shots=6)


def test_local_copies_go_first(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({"task_id": "t/0", "prompt": "def f():\n", "test": "", "canonical_solution": ""}) + "\n")
    write_jsonl(tmp_path / "alpaca.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert load("gsm8k", tmp_path)[0].turns == ("1 + 1?",)
    assert load("humaneval", tmp_path) == [Prompt("t/0", "code", ("Complete the code I provided.\n\ndef f():\n",))]
    assert load("alpaca", tmp_path)[0].turns == ("Add.\n\n1 2",)
    assert len(load("mtbench", tmp_path)) == 80  # not there: as shipped


def test_any_file_of_prompts(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Hello"},
        {"turns": ["a", "b"], "category": "chat", "question_id": 7},
        {"id": "c", "conversations": [
            {"role": "system", "content": "S"}, {"role": "user", "content": "u1"},
            {"role": "assistant", "content": "a1"}, {"role": "user", "content": "u2"},
            {"role": "assistant", "content": "never shown"}]},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    request = BenchmarkRequest.parse(f"{path}:3")
    assert request.label == "mine"
    plain, turns, chat = load_prompts(request)
    assert plain.turns == ("Hello",)
    assert turns == Prompt("7", "chat", ("a", "b"))
    assert chat.turns == ("u2",)
    assert [m["content"] for m in chat.context] == ["S", "u1", "a1"]


MBPP = {
    "task_id": 11,
    "text": "Reverse a list.",
    "code": "x",
    "test_list": ["assert f([1]) == [1]", "assert f([]) == []"],
}
LCB = {"question_id": "abc", "question_content": "Add them.", "difficulty": "easy", "starter_code": "def f():"}


def test_local_files_of_code_and_contest_benchmarks(tmp_path: Path) -> None:
    """By name in --data-dir, and as files of any name."""
    write_jsonl(tmp_path / "mbpp.jsonl", [MBPP])
    write_jsonl(tmp_path / "livecodebench.jsonl", [LCB, {**LCB, "difficulty": "hard", "starter_code": ""}])
    write_jsonl(tmp_path / "aime24.jsonl", [{"id": 60, "problem": "Find x.", "answer": "1"}])
    (mbpp,) = load("mbpp", tmp_path)
    assert mbpp.turns == (
        "You are an expert Python programmer, and here is your task: Reverse a list. Your code should pass these tests:"
        "\n\nassert f([1]) == [1]\nassert f([]) == []",
    )
    easy, hard = load("livecodebench", tmp_path)
    assert easy.turns == ("Add them.\n\nUse this starter code:\n\n```python\ndef f():\n```",)
    assert (easy.category, hard.category, hard.turns) == ("easy", "hard", ("Add them.",))
    (aime,) = load("aime:5", tmp_path)
    assert aime.turns[0].startswith("Find x.\nPlease reason step by step")
    mine = write_jsonl(tmp_path / "mine.jsonl", [MBPP, LCB, {"prompt": "Hi", "category": "talk"}])
    assert [p.category for p in load(str(mine))] == ["code", "easy", "talk"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm:8", "'gsm' is no benchmark and no file; did you mean 'gsm8k'.; known: mtbench, gsm8k"),
        ("gsm8k:0", "expected NAME:COUNT with a positive count"),
        ("gsm8k:x", "expected NAME:COUNT"),
    ],
)
def test_bad_benchmark_entries(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkRequest.parse(text)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k.jsonl", {"problem": "1"}, r"gsm8k\.jsonl:1: expected a text under 'question', found keys problem"),
        ("mtbench.jsonl", {"turns": []}, r"mtbench\.jsonl:1: expected 'turns'"),
        ("alpaca.jsonl", {"instruction": ""}, r"alpaca\.jsonl:1: expected a text under 'instruction'"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    write_jsonl(tmp_path / name, [row])
    with pytest.raises(DataError, match=message):
        load(name.removesuffix(".jsonl"), tmp_path)


def test_a_benchmark_that_does_not_ship_asks_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    """Offline here: one clear error, after saying what is fetched and how to do without."""
    with pytest.raises(DataError, match="tatsu-lab/alpaca"):
        load("alpaca:2")
    assert "--data-dir DIR reads a local copy instead" in capsys.readouterr().out
    assert all(bench.hub.repository for bench in BENCHMARKS.values())


# ------------------------------------------------------------------------------------------------------------ rendering


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_target)


def test_conversations_are_rendered_by_the_target_s_template(tokenizer: Any) -> None:
    chat = ChatEncoder(tokenizer, system_prompt="Be brief.")
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.decode(chat.encode(messages))
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    own = [{"role": "system", "content": "Own."}, *messages]
    assert "Be brief." not in tokenizer.decode(chat.encode(own))
    assert tokenizer.decode(ChatEncoder(tokenizer, raw=True).encode(messages)) == "Hi"


def test_template_kwargs_reach_the_template(tokenizer: Any) -> None:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% if thinking %}T{% else %}N{% endif %}{{ messages[0].content }}"
    messages = [{"role": "user", "content": "Hi"}]
    assert own.decode(ChatEncoder(own, {"thinking": True}).encode(messages)) == "THi"
    assert own.decode(ChatEncoder(own).encode(messages)) == "NHi"
    own.chat_template = None
    with pytest.raises(ConfigError, match="no chat template; --raw-prompts"):
        ChatEncoder(own, raw_flag="--raw-prompts")


def test_the_longest_conversation(tokenizer: Any) -> None:
    """Two turns: both prompts as rendered, and twice what may be answered."""
    chat = ChatEncoder(tokenizer)
    short, long = Prompt("a", "", ("Hi",)), Prompt("b", "", ("Hello there", "And now?"))
    first = len(chat.encode([{"role": "user", "content": "Hello there"}]))
    second = len(chat.encode([{"role": "user", "content": "And now?"}]))
    assert chat.longest([short, long], 50) == first + second + 100
