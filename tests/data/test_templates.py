"""Chat templates: goldens typed by hand, recognition, and agreement with Jinja templates that mark generation."""

from __future__ import annotations

import random
from typing import Any

import pytest

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.templates import TEMPLATES, Chat
from specforge_lite.data.templates.auto import choose_template, difference_from_own, recognise
from specforge_lite.data.templates.base import Canvas
from specforge_lite.data.templates.gpt_oss import typescript_type
from specforge_lite.data.tokenize import ConversationTokenizer, TokenizeOptions, render, template_fingerprint
from specforge_lite.types import Conversation
from tests.data_tokenizers import byte_level, control_tokens
from tests.template_goldens import IDS, MASKS, PLAIN, TEXT, TOOL, TOOL_TEXT, TOOLS

VOCABULARY = {token: i for i, token in enumerate(control_tokens())}


def unmark(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """`a⟦b⟧` -> ("ab", ((1, 2),))."""
    text, spans, start = "", [], 0
    for character in marked:
        if character == "⟦":
            start = len(text)
        elif character == "⟧":
            spans.append((start, len(text)))
        else:
            text += character
    return text, tuple(spans)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_has_a_golden(name: str) -> None:
    assert name in TEXT, f"add what '{name}' draws to template_goldens.py"
    assert name in IDS, f"add the ids of '{name}' to template_goldens.py"
    assert name in MASKS
    assert ("tool" in TEMPLATES[name].roles) == (name in TOOL_TEXT)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_spans(name: str) -> None:
    rendering = render(TEMPLATES[name], PLAIN)
    assert (rendering.text, rendering.spans) == unmark(TEXT[name])


@pytest.mark.parametrize("name", TOOL_TEXT)
def test_tool_text_and_spans(name: str) -> None:
    rendering = render(TEMPLATES[name], TOOLS, [TOOL])
    assert (rendering.text, rendering.spans) == unmark(TOOL_TEXT[name])


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask(name: str, trim_offsets: bool) -> None:
    spec = TokenizerSpec.from_tokenizer(byte_level(trim_offsets))
    row = ConversationTokenizer(spec, TokenizeOptions(chat_template=name))(Conversation("x", PLAIN))
    assert " ".join(map(str, row.input_ids)) == IDS[name]
    assert "".join("01"[int(bit)] for bit in row.loss_mask) == MASKS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_last_answer_is_trained_when_asked(name: str) -> None:
    all_turns = render(TEMPLATES[name], PLAIN)
    last_turn = render(TEMPLATES[name], PLAIN, train_only_last_turn=True)
    assert last_turn.text == all_turns.text
    assert len(all_turns.spans) == 2
    assert last_turn.spans == all_turns.spans[1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_end_of_turn_is_trained(name: str) -> None:
    rendering = render(TEMPLATES[name], PLAIN)
    controls = TEMPLATES[name].control_tokens
    for start, end in rendering.spans:
        assert rendering.text[start:end].endswith(controls)


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - set(TOOL_TEXT)))
def test_tools_are_refused_where_there_is_no_form(name: str) -> None:
    with pytest.raises(DataError, match=f"template '{name}' has no form for"):
        render(TEMPLATES[name], TOOLS)


def test_several_calls_in_one_turn() -> None:
    calls = [TOOLS[1]["tool_calls"][0], {"type": "function", "function": {"name": "sea", "arguments": '{"b": 2}'}}]
    messages = [TOOLS[0], {"role": "assistant", "content": "Wait.", "tool_calls": calls}]
    expected = (
        'Wait.\n<tool_call>\n{"name": "sky", "arguments": {"at": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sea", "arguments": {"b": 2}}\n</tool_call><|im_end|>'
    )
    rendering = render(TEMPLATES["chatml"], messages)
    start, end = rendering.spans[0]
    assert rendering.text[start:end] == expected
    for name in ("llama3.1", "gpt-oss"):
        with pytest.raises(DataError, match="no form for several tool calls"):
            render(TEMPLATES[name], messages)


def test_neighbouring_tool_results_share_a_turn() -> None:
    messages = [TOOLS[0], TOOLS[1], {"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}, TOOLS[3]]
    text = render(TEMPLATES["qwen3"], messages).text
    assert (
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>" in text
    )
    text = render(TEMPLATES["deepseek"], messages).text
    assert "begin｜>a<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>b<｜tool▁output▁end｜><｜tool▁outputs▁end｜>" in text


@pytest.mark.parametrize(
    ("content", "reasoning"), [("<think>\nAdd.\n</think>\n\nIt is 2.", None), ("It is 2.", "Add.")]
)
def test_reasoning_inside_content_is_found(content: str, reasoning: str | None) -> None:
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    for name in ("qwen3", "deepseek-r1", "deepseek-v3.1", "gpt-oss"):
        rendering = render(TEMPLATES[name], [*PLAIN[:4], message])
        assert (rendering.text, rendering.spans) == unmark(TEXT[name])


def test_earlier_reasoning_is_not_drawn() -> None:
    messages = [PLAIN[1], {**PLAIN[4]}, PLAIN[3], PLAIN[2]]
    for name in ("qwen3", "deepseek-r1", "deepseek-v3.1", "gpt-oss"):
        assert "Add." not in render(TEMPLATES[name], messages).text


def test_tool_results_that_are_json_or_come_from_nowhere() -> None:
    messages = [TOOLS[0], TOOLS[1], {"role": "tool", "content": '{"a": 1}'}, TOOLS[3]]
    assert '\n\n"{\\"a\\": 1}"<|eot_id|>' in render(TEMPLATES["llama3.1"], messages).text
    with pytest.raises(DataError, match="a tool result without a tool call"):
        render(TEMPLATES["gpt-oss"], [TOOLS[0], TOOLS[3], TOOLS[2], TOOLS[3]])


def test_typescript_types() -> None:
    assert typescript_type({"type": "array", "items": {"type": "integer"}}) == "number[]"
    assert typescript_type({"type": "string", "enum": ["a", "b"]}) == '"a" | "b"'
    assert typescript_type({"type": ["string", "null"]}) == "string | null"
    assert typescript_type({"oneOf": [{"type": "string"}, {"type": "number"}]}) == "string | number"
    assert typescript_type({"oneOf": [{"type": "string"}, {"type": "object"}]}) == "any"
    nested = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {}}, "required": ["a"]}
    assert typescript_type(nested) == "{\na: boolean, b?: any}"


def test_canvas_joins_touching_spans() -> None:
    canvas = Canvas()
    for text, trained in (("a", False), ("b", True), ("", True), ("c", True), ("d", False), ("e", True)):
        canvas.add(text, trained)
    assert canvas.finish().spans == ((1, 3), (4, 5))


def test_cost_is_linear_in_turns() -> None:
    """Characters drawn per turn stay the same: nothing is drawn twice."""

    class Counting(Canvas):
        drawn = 0

        def add(self, text: str, trained: bool = False) -> None:
            Counting.drawn += len(text)
            super().add(text, trained)

    for template in TEMPLATES.values():
        costs = []
        for turns in (50, 100):
            Counting.drawn = 0
            template.draw(Chat([PLAIN[1], PLAIN[2]] * turns), Counting())
            costs.append(Counting.drawn)
        per_turn = costs[1] - costs[0]
        assert costs[0] >= per_turn > 50 * len("Hi thereHello.")


# -------------------------------------------------------------------------------------------------- choice of template

_TURN = "{% for m in messages %}"
OWN: dict[str, str] = {
    "chatml": _TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}" + _TURN + "<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ sys if loop.first else '' }}"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
    ),
    "phi4": _TURN + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "<|im_start|>assistant<|im_sep|>",
    "llama3": (
        "{{ bos_token }}"
        + _TURN
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
BOS = {"gemma": "<bos>", "llama3": "<|begin_of_text|>"}


@pytest.mark.parametrize("name", OWN)
def test_auto_recognises_what_the_own_template_draws(name: str) -> None:
    special = {"bos_token": BOS.get(name, "")}
    template = recognise(OWN[name], special, VOCABULARY)
    assert template.name == name
    assert difference_from_own(template, OWN[name], special) is None


def test_a_different_own_template_is_told() -> None:
    own = OWN["chatml"].replace("<|im_end|>\n", "<|im_end|>")
    template = recognise(own, {}, VOCABULARY)
    difference = difference_from_own(template, own, {})
    assert difference is not None
    assert "with a system prompt, at character" in difference


def test_auto_without_a_template_goes_by_tokens() -> None:
    assert recognise(None, {}, {"<|im_start|>": 0, "<|im_end|>": 1}).name == "chatml"
    assert recognise(None, {}, {"<start_of_turn>": 0, "<end_of_turn>": 1}).name == "gemma"
    with pytest.raises(DataError, match=r"its tokens fit llama3, llama3\.1; give one"):
        recognise(None, {}, {"<|start_header_id|>": 0, "<|end_header_id|>": 1, "<|eot_id|>": 2})
    with pytest.raises(DataError, match=r"not recognised \(it has no chat template\); give --chat-template"):
        recognise(None, {}, {"<s>": 0, "</s>": 1})
    with pytest.raises(DataError, match="its chat template is of no known family"):
        recognise("{{ messages[0].content }}", {}, {})


def test_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown template 'lama3'; did you mean 'llama3'\?; known: auto"):
        choose_template("lama3", None, {}, {})
    with pytest.raises(DataError, match=r"has no \{% generation %\} block"):
        choose_template("generation", "{{ x }}", {}, {})


def test_fingerprint_tells_templates_apart() -> None:
    prints = {template_fingerprint(template) for template in TEMPLATES.values()}
    assert len(prints) == len(TEMPLATES)
    generation = [choose_template("auto", source, {}, {}) for source in (JINJA, JINJA.replace("\n", " "))]
    assert template_fingerprint(generation[0]) != template_fingerprint(generation[1])


# ----------------------------------------------------------------------------------------- the tokenizer's own template

JINJA = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


def test_generation_template_marks_the_same_as_chatml() -> None:
    template = choose_template("auto", JINJA, {}, {})
    assert template.name == "generation"
    messages: list[dict[str, Any]] = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in PLAIN]
    for last in (False, True):
        # trim_blocks eats the line end after a block tag, as it does in transformers
        ours, own = (render(t, messages, train_only_last_turn=last) for t in (TEMPLATES["chatml"], template))
        spans = [own.text[start:end] for start, end in own.spans]
        assert spans == [ours.text[start:end] for start, end in ours.spans]


def test_generation_mask_agrees_with_transformers() -> None:
    """On plain text, where transformers' own mask is right, both agree token for token."""
    tokenizer = byte_level(trim_offsets=False)
    spec = TokenizerSpec(TokenizerSpec.from_tokenizer(tokenizer).tokenizer_json, JINJA, ())
    chooser = random.Random(3)
    words = ["Be", "kind", "there", "1+1", "é", "\n", "two", "it"]
    for _ in range(20):
        messages = [
            {"role": role, "content": "x" + " ".join(chooser.choices(words, k=chooser.randint(1, 6))) + "."}
            for role in ["system", *["user", "assistant"] * chooser.randint(1, 3)]
        ]
        row = ConversationTokenizer(spec, TokenizeOptions())(Conversation("x", messages))
        oracle = tokenizer.apply_chat_template(
            messages, chat_template=JINJA, return_dict=True, return_assistant_tokens_mask=True
        )
        assert row.input_ids.tolist() == oracle["input_ids"]
        assert row.loss_mask.astype(int).tolist() == oracle["assistant_masks"]


def test_generation_template_without_a_form_for_tools() -> None:
    template = choose_template("auto", JINJA, {}, {})
    with pytest.raises(DataError, match="no form for tool calls"):
        render(template, TOOLS)


def test_template_errors_are_one_line() -> None:
    refusing = "{% generation %}{% endgeneration %}{{ raise_exception('No system role!') }}"
    with pytest.raises(DataError, match="refuses this conversation: No system role!"):
        render(choose_template("auto", refusing, {}, {}), PLAIN)
    with pytest.raises(DataError, match="chat template, line 1"):
        render(choose_template("auto", "{% generation %}{% if %}", {}, {}), PLAIN)


def test_templates_are_sandboxed() -> None:
    evil = "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}"
    with pytest.raises(DataError, match="refuses this conversation: access to attribute '__class__'"):
        render(choose_template("auto", evil, {}, {}), PLAIN)
