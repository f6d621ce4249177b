"""Texts that models of several families generate, typed by hand -> what a server with the right parser reports."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from specforge_lite.inference.hf_generate import GenerationResult
from specforge_lite.regenerate.hf_backend import HfBackend, split_answer
from specforge_lite.regenerate.turns import RequestFailed

SPECIAL = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "[TOOL_CALLS]", "<|im_end|>"]


def call(name: str, arguments: str, **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


OSLO = call("weather", '{"city": "Oslo"}')
ANALYSIS = "<|channel|>analysis<|message|>Greet."
HARMONY_CALL = "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
CASES = {
    "plain": ("Hello there!", ("", "Hello there!", [])),
    "think": ("<think>\nGreet.\n</think>\n\nHello!", ("Greet.", "Hello!", [])),
    "magistral": ("[THINK]Greet.[/THINK]Hello!", ("Greet.", "Hello!", [])),
    "opened by the prompt": ("\nGreet.\n</think>\n\nHello!", ("Greet.", "Hello!", [])),
    "gpt-oss": (f"{ANALYSIS}<|end|><|start|>assistant<|channel|>final<|message|>Hello!", ("Greet.", "Hello!", [])),
    "gpt-oss without a thought": ("<|channel|>final<|message|>Hello!<|return|>", ("", "Hello!", [])),
    "gpt-oss call": (f'{ANALYSIS}<|end|>{HARMONY_CALL}{{"city": "Oslo"}}<|call|>', ("Greet.", "", [OSLO])),
    "gpt-oss call, recipient first": (
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>', ("", "", [OSLO])
    ),
    "hermes": (
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
        ("", "Let me see.", [OSLO, call("time", "{}")]),
    ),
    "qwen3-coder": (
        "<think>\nhm\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n"
        "</tool_call>",
        ("hm", "", [OSLO]),
    ),
    "phi-4-mini": (
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>', ("", "", [OSLO])
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]',
        ("", "", [{"id": "abcdefghi", **OSLO}]),
    ),
    "mistral v11": (
        '[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[ARGS]{"at": {"h": 1}}',
        ("", "", [{"id": "abc", **OSLO}, call("time", '{"at": {"h": 1}}')]),
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Oslo\"}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("", "", [OSLO]),
    ),
    "deepseek v3.1": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("", "", [OSLO, call("time", "{}")]),
    ),
    "llama 3": ('{"name": "weather", "parameters": {"city": "Oslo"}}', ("", "", [OSLO])),
    "llama 3 with its mark": (
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}', ("", "", [OSLO])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forms(name: str) -> None:
    text, expected = CASES[name]
    opened = "<think>" if "opened" in name else ""
    assert split_answer(text, SPECIAL, opened, has_tools=bool(expected[2])) == expected


def test_json_is_text_where_no_tool_was_offered() -> None:
    text = '{"name": "Oslo", "parameters": {}}'
    assert split_answer(text, SPECIAL) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "opened", "reasoning"),
    [("<think>\nFirst, I", "", "First, I"), ("First, I", "<think>", "First, I"), (ANALYSIS, "", "Greet."),
     (f"{ANALYSIS}<|end|><|start|>assistant<|chan", "", "Greet.")],
)  # fmt: skip
def test_a_thought_that_is_cut_off_stays_reasoning(text: str, opened: str, reasoning: str) -> None:
    assert split_answer(text, SPECIAL, opened, is_cut=True) == (reasoning, "", [])


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>commentary<|message|>I will look it up.<|end|>",  # a preamble has no place in a message
        "<|channel|>commentary to=browser.search<|message|>{}<|call|>",
        f"{ANALYSIS}<|end|><|start|>assistant{ANALYSIS}<|end|>",
        "Hello<|channel|>final",
        "Hello <|im_end|> there",
        "<think>a <|im_end|> b</think>c",
        "[TOOL_CALLS] weather now",
        '<tool_call>\n{"name": "weather", "argum',
        "<tool_call>[1]</tool_call>",
        "<tool_call>{}</tool_call> and more",
    ],
)
def test_other_forms_are_refused_never_flattened(text: str) -> None:
    with pytest.raises(RequestFailed, match="answer-form"):
        split_answer(text, SPECIAL)


def test_the_in_process_backend_keeps_special_tokens_until_the_form_is_read(tiny_target: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    backend: Any = SimpleNamespace(tokenizer=tokenizer)

    def answer(text: str, finish_reason: str = "stop") -> Any:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return HfBackend._to_answer(backend, GenerationResult(ids, finish_reason), True)

    found = answer(f"{ANALYSIS}<|end|><|start|>assistant<|channel|>final<|message|>Hello there!<|return|>")
    assert (found.reasoning, found.content, found.finish_reason) == ("Greet.", "Hello there!", "stop")
    found = answer('[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]')
    assert (found.tool_calls, found.content, found.finish_reason) == ([OSLO], "", "tool_calls")
    found = answer(ANALYSIS, "length")
    assert (found.reasoning, found.content, found.finish_reason) == ("Greet.", "", "length")
