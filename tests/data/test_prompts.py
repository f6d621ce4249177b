"""The one reader of prompt files: what it takes, what it refuses and how, and what does not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.data.prompts import ChatEncoder, Prompt, encode_prompt_file, read_prompts

CHAT = {
    "id": "a",
    "conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "never shown"}],
}
GOOD = json.dumps(CHAT)


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_target)


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [f"{GOOD}\n\n", f"\n{GOOD}\n", f"[{GOOD}]", json.dumps(CHAT, indent=2)])
def test_files_people_have(tmp_path: Path, text: str) -> None:
    """Blank lines, a JSON array, a pretty-printed object."""
    (prompt,) = read_prompts(file(tmp_path, text))
    assert prompt == Prompt("a", "all", ("hi",))
    assert prompt.steps == [[{"role": "user", "content": "hi"}]]


def test_a_tool_result_is_answered(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "get", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "use it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    (prompt,) = read_prompts(file(tmp_path, json.dumps({"id": "t", "messages": turns, "tools": tools})))
    assert prompt.turns == ()
    assert [m["role"] for m in prompt.steps[0]] == ["user", "assistant", "tool"]
    assert len(prompt.steps) == 1
    assert prompt.tools == tuple(tools)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n{{broken\n", r"p\.jsonl:2: not-json: column 2: "),
        (f"{GOOD}\n{{broken\n{GOOD}\n7\n", r"p\.jsonl:2: not-json: column 2: .* \(2 of 4 rows cannot be used\)"),
        ("[1]\n", r"p\.jsonl:1: expected an object, found int"),
        (f'{GOOD}\n{{"conversations": []}}\n', r"p\.jsonl:2: 'conversations' is empty"),
        ('{"conversations": [{"role": "assistant", "content": "x"}]}', r"p\.jsonl:1: no user turn"),
        ("", r"p\.jsonl: empty"),
        ("\xff\xfe", r"p\.jsonl"),
    ],
)
def test_bad_rows_are_named_and_counted(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    assert len(read_prompts(file(tmp_path, f"{GOOD}\n{{broken\n"), 1)) == 1


def test_what_is_too_long_is_left_out_and_named(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = json.dumps({"id": "long", "prompt": "apples and pears " * 1000})
    path = file(tmp_path, f"{GOOD}\n{long}\n{GOOD}\n")
    encoded = encode_prompt_file(path, None, str(tiny_target))
    assert [prompt.id for prompt, _ in encoded] == ["a", "a"]
    assert "warning: 1 of 3 prompts are left out, too long: " in (warning := capsys.readouterr().err)
    assert "p.jsonl:2 (" in warning
    assert "at most 1024" in warning
    with pytest.raises(DataError, match=r"no prompt fits: .*p\.jsonl:1 \(.* tokens\)"):
        encode_prompt_file(file(tmp_path, long), None, str(tiny_target))
    length = len(encoded[0][1])
    short = file(tmp_path, GOOD)
    assert len(encode_prompt_file(short, None, str(tiny_target), max_length=length + 5, num_new_tokens=5)) == 1
    with pytest.raises(DataError, match="no prompt fits"):
        encode_prompt_file(short, None, str(tiny_target), max_length=length + 4, num_new_tokens=5)


def test_a_template_that_refuses_is_one_line_with_the_place(tokenizer: Any, tmp_path: Path) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('not so') }}{% endif %}{{ messages[0].content }}"
    )
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in ("yes", "no", "no"))
    prompts = read_prompts(file(tmp_path, rows))
    with pytest.raises(DataError, match=r"p\.jsonl:2: refused by the target's chat template: not so \(2 of 3 rows"):
        ChatEncoder(own).encode_all(prompts, 100)


def test_no_chat_template_is_one_line(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    with pytest.raises(ConfigError, match="the target's tokenizer has no chat template"):
        ChatEncoder(own)
