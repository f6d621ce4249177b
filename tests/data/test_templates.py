"""Chat templates: families against goldens typed by hand, the tokenizer's own template, and the choice between them."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import Rendering, TokenizerSpec
from specforge_lite.data.templates.families import ALIASES, TEMPLATES, difference_from_own, template_warning
from specforge_lite.data.templates.rendering import ChatTemplate, choose_template
from specforge_lite.data.tokenize import ConversationTokenizer, TokenizeOptions
from specforge_lite.types import Conversation
from tests.data_tokenizers import byte_level, control_tokens
from tests.template_goldens import IDS, MASKS, PLAIN, TEXT, TOOL, TOOL_TEXT, TOOLS

TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|eot|>")


def marked(rendering: Rendering) -> str:
    """Trained text between ⟦ and ⟧."""
    text = rendering.text
    for start, end in reversed(rendering.spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def own(source: str, tokens: tuple[str, ...] = TOKENS, **special: str) -> ChatTemplate:
    """A template as it comes with a tokenizer."""
    return ChatTemplate("own", source, tuple(special.items()), added_tokens=tokens)


def spec_with(source: str | None, tokens: tuple[str, ...] = (), tool_source: str | None = None) -> TokenizerSpec:
    tokenizer_json = TokenizerSpec.from_tokenizer(byte_level(all_control=False, extra=tokens)).tokenizer_json
    return TokenizerSpec(tokenizer_json, source, (), tool_source)


# ------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_has_a_golden(name: str) -> None:
    assert name in TEXT, f"add what '{name}' renders to template_goldens.py"
    assert name in IDS, f"add the ids of '{name}' to template_goldens.py"
    assert name in MASKS
    assert TEMPLATES[name].has_tools == (name in TOOL_TEXT)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_spans(name: str) -> None:
    assert marked(TEMPLATES[name].render(PLAIN)) == TEXT[name]


@pytest.mark.parametrize("name", TOOL_TEXT)
def test_tool_text_and_spans(name: str) -> None:
    assert marked(TEMPLATES[name].render(TOOLS, [TOOL])) == TOOL_TEXT[name]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask(name: str, trim_offsets: bool) -> None:
    spec = TokenizerSpec.from_tokenizer(byte_level(trim_offsets))
    row = ConversationTokenizer(spec, TokenizeOptions(chat_template=name))(Conversation("x", PLAIN))
    assert " ".join(map(str, row.input_ids)) == IDS[name]
    assert "".join("01"[int(bit)] for bit in row.loss_mask) == MASKS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_last_answer_is_trained_when_asked(name: str) -> None:
    all_turns = TEMPLATES[name].render(PLAIN)
    last_turn = TEMPLATES[name].render(PLAIN, train_only_last_turn=True)
    assert last_turn.text == all_turns.text
    assert len(all_turns.spans) == 2
    assert last_turn.spans == all_turns.spans[1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_weight_and_finish_reason(name: str) -> None:
    """Weight 0: shown, not trained. Length: the text ends where the target was cut off."""
    template = TEMPLATES[name]
    skipped = template.render([*PLAIN[:2], {**PLAIN[2], "weight": 0}, *PLAIN[3:]])
    assert (skipped.text, skipped.spans) == (template.render(PLAIN).text, template.render(PLAIN).spans[1:])
    cut = template.render([*PLAIN[:4], {"role": "assistant", "content": "It is", "finish_reason": "length"}])
    assert cut.text.endswith("It is")
    assert cut.spans[1][1] == len(cut.text)
    middle = template.render([*PLAIN[:2], {**PLAIN[2], "finish_reason": "length"}, *PLAIN[3:]])
    assert middle.text == template.render(PLAIN).text
    assert middle.text[slice(*middle.spans[0])].strip().endswith("Hello.")


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - set(TOOL_TEXT)))
def test_tools_are_refused_where_there_is_no_form(name: str) -> None:
    with pytest.raises(DataError, match=f"template '{name}' has no form for"):
        TEMPLATES[name].render(TOOLS)


def test_several_calls_in_one_turn() -> None:
    calls = [TOOLS[1]["tool_calls"][0], {"type": "function", "function": {"name": "sea", "arguments": '{"b": 2}'}}]
    messages = [TOOLS[0], {"role": "assistant", "content": "Wait.", "tool_calls": calls}]
    expected = (
        'Wait.\n<tool_call>\n{"name": "sky", "arguments": {"at": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sea", "arguments": {"b": 2}}\n</tool_call><|im_end|>'
    )
    rendering = TEMPLATES["chatml"].render(messages)
    start, end = rendering.spans[0]
    assert rendering.text[start:end] == expected
    for name in ("llama3.1", "gpt-oss"):
        with pytest.raises(DataError, match="no form for several tool calls"):
            TEMPLATES[name].render(messages)


def test_neighbouring_tool_results_share_a_turn() -> None:
    messages = [TOOLS[0], TOOLS[1], {"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}, TOOLS[3]]
    text = TEMPLATES["qwen3"].render(messages).text
    assert (
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>" in text
    )
    text = TEMPLATES["deepseek"].render(messages).text
    assert "begin｜>a<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>b<｜tool▁output▁end｜><｜tool▁outputs▁end｜>" in text


@pytest.mark.parametrize(
    ("content", "reasoning"), [("<think>\nAdd.\n</think>\n\nIt is 2.", None), ("It is 2.", "Add.")]
)
def test_reasoning_inside_content_is_found(content: str, reasoning: str | None) -> None:
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    for name in ("qwen3", "deepseek-r1", "deepseek-v3.1", "gpt-oss"):
        assert marked(TEMPLATES[name].render([*PLAIN[:4], message])) == TEXT[name]


def test_earlier_reasoning_is_not_rendered() -> None:
    messages = [PLAIN[1], {**PLAIN[4]}, PLAIN[3], PLAIN[2]]
    for name in ("qwen3", "deepseek-r1", "deepseek-v3.1", "gpt-oss"):
        assert "Add." not in TEMPLATES[name].render(messages).text


def test_tool_results_that_are_json_or_come_from_nowhere() -> None:
    messages = [TOOLS[0], TOOLS[1], {"role": "tool", "content": '{"a": 1}'}, TOOLS[3]]
    assert '\n\n"{\\"a\\": 1}"<|eot_id|>' in TEMPLATES["llama3.1"].render(messages).text
    with pytest.raises(DataError, match="a tool result without a tool call"):
        TEMPLATES["gpt-oss"].render([TOOLS[0], TOOLS[3], TOOLS[2], TOOLS[3]])


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "array", "items": {"type": "integer"}}, "number[]"),
        ({"type": "string", "enum": ["a", "b"]}, '"a" | "b"'),
        ({"type": ["string", "null"]}, "string | null"),
        ({"oneOf": [{"type": "string"}, {"type": "number"}]}, "string | number"),
        ({"oneOf": [{"type": "string"}, {"type": "object"}]}, "any"),
        (
            {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {}}, "required": ["a"]},
            "{\na: boolean, b?: any}",
        ),
    ],
)
def test_typescript_types(schema: dict[str, Any], text: str) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}, "required": ["x"]}}
    rendering = TEMPLATES["gpt-oss"].render(PLAIN, [{"type": "function", "function": function}])
    assert f"type f = (_: {{\nx: {text},\n}}) => any;" in rendering.text


def test_reasoning_effort_of_a_conversation() -> None:
    messages = [{**PLAIN[1], "reasoning_effort": "high"}, PLAIN[2]]
    assert "\n\nReasoning: high\n\n" in TEMPLATES["gpt-oss"].render(messages).text


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1", "deepseek-v3.1", "gpt-oss"])
@pytest.mark.parametrize("answer", [{"content": "<think>\nLet me"}, {"content": "", "reasoning_content": "Let me"}])
def test_a_thought_that_was_cut_off_ends_with_it(name: str, answer: dict[str, str]) -> None:
    opening = {"qwen3": "⟦<think>\n", "deepseek-r1": "<think>\n⟦", "deepseek-v3.1": "<think>⟦"}
    rendering = TEMPLATES[name].render([PLAIN[1], {"role": "assistant", **answer, "finish_reason": "length"}])
    expected = opening.get(name, "⟦<|channel|>analysis<|message|>") + "Let me⟧"
    assert marked(rendering).endswith(expected)


# ----------------------------------------------------------------------------------------- the tokenizer's own template

LOOP = "{% for m in messages %}"
CHATML = LOOP + (
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Smol.<|im_end|>\n{% endif %}" + CHATML
)  # a default system prompt
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    + LOOP
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    "{% set content = m.content %}{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ content }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "<s>" + LOOP + "{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
V31 = (
    "<s>" + LOOP + "{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|></think>"
    "{{ m.content.split('</think>', 1)[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
LLAMA = (
    "<s>{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n" + LOOP + "<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
MISTRAL = (
    "<s>" + LOOP + "{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
GLM = (
    LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)  # the target ends its turn with the header of the next one
PARTS = (
    LOOP + "<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROMPT = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"  # add_generation_prompt ignored
NO_TOKENS = (
    LOOP + "{{ m.role | upper }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QA: list[dict[str, Any]] = [m for m in PLAIN if m["role"] != "system"]
_USER_1, _USER_2 = "<|im_start|>user\nHi there<|im_end|>\n", "<|im_start|>user\n1+1?<|im_end|>\n"
_HEAD = "<|im_start|>assistant\n"
OWN: dict[str, tuple[str, str]] = {
    "chatml": (CHATML, f"{_USER_1}{_HEAD}⟦Hello.<|im_end|>⟧\n{_USER_2}{_HEAD}⟦It is 2.<|im_end|>⟧\n"),
    "default system prompt": (
        SMOL,
        "<|im_start|>system\nYou are Smol.<|im_end|>\n"
        f"{_USER_1}{_HEAD}⟦Hello.<|im_end|>⟧\n{_USER_2}{_HEAD}⟦It is 2.<|im_end|>⟧\n",
    ),
    "thinks": (
        QWEN3,
        f"{_USER_1}{_HEAD}⟦Hello.<|im_end|>⟧\n{_USER_2}{_HEAD}⟦<think>\nAdd.\n</think>\n\nIt is 2.<|im_end|>⟧\n",
    ),
    "thought opened by the prompt, stripped from history": (
        R1,
        "<s><|user|>Hi there<|assistant|>⟦Hello.</s>⟧<|user|>1+1?<|assistant|><think>\n"
        "⟦Add.\n</think>\n\nIt is 2.</s>⟧",
    ),
    "thought opened by a switch": (
        V31,
        "<s><|user|>Hi there<|assistant|></think>⟦Hello.</s>⟧"
        "<|user|>1+1?<|assistant|><think>⟦Add.</think>It is 2.</s>⟧",
    ),
    "date and strip": (
        LLAMA,
        "<s>Today: 05 Aug 2025\n<|im_start|>user\n\nHi there<|eot|><|im_start|>assistant\n\n⟦Hello.<|eot|>⟧"
        "<|im_start|>user\n\n1+1?<|eot|><|im_start|>assistant\n\n⟦It is 2.<|eot|>⟧",
    ),
    "leading space": (
        MISTRAL,
        "<s> [INST] Hi there [/INST]⟦ Hello.</s>⟧ [INST] 1+1? [/INST]⟦ It is 2.</s>⟧",
    ),
    "ends with the next header": (
        GLM,
        "<|user|>\nHi there<|assistant|>⟦\nHello.<|user|>⟧\n1+1?<|assistant|>⟦\nIt is 2.⟧",
    ),
    "content in parts": (PARTS, f"{_USER_1}{_HEAD}⟦Hello.<|im_end|>⟧\n{_USER_2}{_HEAD}⟦It is 2.<|im_end|>⟧\n"),
    "no generation prompt": (NO_PROMPT, f"{_USER_1}{_HEAD}⟦Hello.<|im_end|>⟧\n{_USER_2}{_HEAD}⟦It is 2.<|im_end|>⟧\n"),
    "no control tokens": (NO_TOKENS, "USER: Hi there\nASSISTANT:⟦ Hello.⟧\nUSER: 1+1?\nASSISTANT:⟦ It is 2.⟧\n"),
}


@pytest.mark.parametrize("name", OWN)
def test_own_template(name: str) -> None:
    source, expected = OWN[name]
    assert marked(own(source, eos_token="</s>").render(QA)) == expected


@pytest.mark.parametrize("name", ["chatml", "default system prompt", "thinks", "leading space", "no control tokens"])
def test_own_text_is_what_transformers_renders(name: str) -> None:
    source = OWN[name][0]
    messages = [*QA[:3], {**QA[3], "content": "  It is\n2.\n\n"}]
    text = byte_level().apply_chat_template(messages, chat_template=source, tokenize=False)
    assert own(source).render(messages).text == text


@pytest.mark.parametrize("name", [n for n in TEXT if n != "deepseek-r1"])  # R1's thought is opened by the prompt
def test_marks_find_what_generation_blocks_say(name: str) -> None:
    """Every family without its generation blocks, as if it came with a tokenizer: the same text, the same spans."""
    messages = PLAIN if name != "qwen3-no-think" else [*PLAIN[:4], {**PLAIN[4], "reasoning_content": None}]
    source = re.sub(r"\{%- (?:end)?generation -%\}", "", TEMPLATES[name].source)
    template = replace(TEMPLATES[name], name="own", source=source, added_tokens=tuple(control_tokens()))
    assert marked(template.render(messages)) == TEXT[name]
    if name in TOOL_TEXT:
        assert marked(template.render(TOOLS, [TOOL])) == TOOL_TEXT[name]


def test_empty_thought_is_not_trained() -> None:
    rendering = own(QWEN3).render([*QA[:3], {"role": "assistant", "content": "It is 2."}])
    assert marked(rendering).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n⟦It is 2.<|im_end|>⟧\n")


@pytest.mark.parametrize("name", ["thinks", "thought opened by the prompt, stripped from history"])
@pytest.mark.parametrize("content", ["<think>\nAdd.\n</think>\n\nIt is 2.", "Add.\n</think>\n\nIt is 2."])
def test_reasoning_inside_content(name: str, content: str) -> None:
    source, expected = OWN[name]
    assert marked(own(source).render([*QA[:3], {"role": "assistant", "content": content}])) == expected


@pytest.mark.parametrize(
    ("source", "answer", "ending"),
    [
        (CHATML, {"content": "In the heart of"}, "assistant\n⟦In the heart of⟧"),
        (CHATML, {"content": "<think>\nLet me"}, "assistant\n⟦<think>\nLet me⟧"),
        (QWEN3, {"content": "<think>\nLet me"}, "assistant\n⟦<think>\nLet me⟧"),
        (QWEN3, {"content": "", "reasoning_content": "Let me"}, "assistant\n⟦<think>\nLet me⟧"),
        (QWEN3, {"content": "It", "reasoning_content": "Add."}, "assistant\n⟦<think>\nAdd.\n</think>\n\nIt⟧"),
        (R1, {"content": "Let me"}, "<|assistant|><think>\n⟦Let me⟧"),  # a server returns it without the prompt's tag
        (R1, {"content": "", "reasoning_content": "Let me"}, "<|assistant|><think>\n⟦Let me⟧"),
        (R1, {"content": "It", "reasoning_content": "Add."}, "<|assistant|><think>\n⟦Add.\n</think>\n\nIt⟧"),
        (V31, {"content": "", "reasoning_content": "Let me"}, "<|assistant|><think>⟦Let me⟧"),
        (GLM, {"content": "Let me"}, "<|assistant|>⟦\nLet me⟧"),
    ],
)
def test_own_template_of_an_answer_that_was_cut_off(source: str, answer: dict[str, str], ending: str) -> None:
    cut = own(source).render([*QA[:3], {"role": "assistant", **answer, "finish_reason": "length"}])
    assert marked(cut).endswith(ending)


def test_reasoning_of_a_target_whose_template_only_has_the_switch() -> None:
    """It keeps thoughts inside of content, and closes one in the prompt when thinking is off."""
    source = CHATML.replace(
        "assistant\n{% endif %}", "assistant\n{{ '<think>\n\n</think>\n' if enable_thinking is false }}{% endif %}"
    )
    expected = f"{_HEAD}⟦<think>\nAdd.\n</think>\n\nIt is 2.<|im_end|>⟧\n"
    assert marked(own(source).render(QA)).endswith(expected)


def test_reasoning_that_a_template_has_no_place_for() -> None:
    assert own(CHATML).render(QA).lost_reasoning
    assert not own(QWEN3).render(QA).lost_reasoning
    with pytest.raises(DataError, match="no form for reasoning without an answer"):
        own(CHATML).render([QA[0], {"role": "assistant", "content": "", "reasoning_content": "Add."}])


XML_CALLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}<name>{{ t.function.name }}</name>{% endfor %}<|im_end|>\n"
    "{% endif %}" + LOOP + "{% if m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant\n{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>{{ v }}</parameter>\n{% endfor %}"
    "</function></tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("arguments", [{"at": "Rome"}, '{"at": "Rome"}'])
def test_tool_calls_are_rendered_as_the_target_writes_them(arguments: Any) -> None:
    """Not as the family that its plain turns look like; arguments as the object that servers make of them."""
    call = {"id": "c", "type": "function", "function": {"name": "sky", "arguments": arguments}}
    messages = [TOOLS[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *TOOLS[2:]]
    assert marked(own(XML_CALLS).render(messages, [TOOL])) == (
        "<|im_start|>system\n<name>sky</name><|im_end|>\n<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<tool_call>\n<function=sky>\n<parameter=at>Rome</parameter>\n</function></tool_call><|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>blue</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
    )


TEXT_CALLS = LOOP + (  # arguments are added to text; calls need ids; the name is printed again with the result
    "{% if m.tool_calls %}<|assistant|>{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length < 9 %}"
    "{{ raise_exception('ids of 9 characters') }}{% endif %}{{ c.id }} {{ c.function.name + c.function.arguments }}"
    "{% set ns.name = c.function.name %}{% endfor %}<|eot|>{% elif m.role == 'tool' %}<|observation|>{{ ns.name }}: "
    "{{ m.tool_call_id }} {{ m.content }}{% else %}<|{{ m.role }}|>{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_calls_without_ids_get_some_and_end_with_their_own_token() -> None:
    call = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Rome"}}}
    messages = [TOOLS[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "b"}]
    source = "{% set ns = namespace(name='') %}" + TEXT_CALLS
    assert marked(own(source, eos_token="</s>").render([*messages, TOOLS[3]], [TOOL])) == (
        '<|user|>Sun?</s><|assistant|>⟦000000000 sky{"at": "Rome"}<|eot|>⟧<|observation|>sky: 000000000 b'
        "<|assistant|>⟦Yes.</s>⟧"
    )


def test_what_a_template_has_no_form_for_is_refused() -> None:
    with pytest.raises(DataError, match="no form for tool calls"):
        own(CHATML).render(TOOLS, [TOOL])
    with pytest.raises(DataError, match="no form for tool results"):
        own(CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}")).render([*TOOLS[:1], *TOOLS[2:]])
    with pytest.raises(DataError, match="refuses this conversation: No system role!"):
        own("{% if messages[0].role == 'system' %}{{ raise_exception('No system role!') }}{% endif %}" + CHATML).render(
            PLAIN
        )


def test_a_text_that_the_template_looks_into() -> None:
    """Marks do not stand where templates look: at the ends of questions and results."""
    source = CHATML.replace("{{ m.content }}", "{{ 'X' if m.content.startswith('Hi') }}{{ m.content }}")
    assert marked(own(source).render(QA)).startswith("<|im_start|>user\nXHi there<|im_end|>")
    source = CHATML.replace("{{ m.content }}", "{{ m.content | length }} {{ m.content }}")
    assert "changes the text" in str(own(source).problem)


# -------------------------------------------------------------------------------------------------- choice of template


def test_auto_takes_the_tokenizers_own() -> None:
    for source, name in ((SMOL, "own"), (JINJA, "generation")):
        assert choose_template("auto", spec_with(source, ("<|im_start|>", "<|im_end|>"))).name == name
    assert choose_template("own", spec_with(SMOL)).name == "own"
    with pytest.raises(DataError, match="own cannot be used: it has no chat template"):
        choose_template("own", spec_with(None))


def test_auto_falls_back_to_a_family_where_the_own_one_changes_answers() -> None:
    spec = spec_with(CHATML.replace("m.content }}", "m.content | upper }}"), ("<|im_start|>", "<|im_end|>"))
    template = choose_template("auto", spec)
    assert template.name == "chatml"
    warning = str(template_warning(template, spec))
    assert "renders other text than the tokenizer's own (with a system prompt, at character" in warning
    assert "that cannot be used: the tokenizer's chat template leaves out turns" in warning


def test_a_named_family_that_differs_is_reported_with_the_remedy() -> None:
    tokens = ("<|im_start|>", "<|im_end|>")
    warning = str(template_warning(TEMPLATES["chatml"], spec_with(SMOL, tokens)))
    assert "without a system prompt, at character" in warning
    assert warning.endswith("--chat-template auto takes the tokenizer's own")
    assert "with tool calls" in str(difference_from_own(TEMPLATES["chatml"], XML_CALLS, {}))
    assert template_warning(TEMPLATES["minicpm4"], spec_with(CHATML, tokens)) is None


def test_auto_without_a_template_goes_by_tokens() -> None:
    assert choose_template("auto", spec_with(None, ("<|im_start|>", "<|im_end|>"))).name == "chatml"
    assert choose_template("auto", spec_with(None, ("<start_of_turn>", "<end_of_turn>"))).name == "gemma"
    with pytest.raises(DataError, match=r"its tokens fit llama3, llama3\.1; give one"):
        choose_template("auto", spec_with(None, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")))
    with pytest.raises(DataError, match=r"not recognised \(it has no chat template\); give --chat-template"):
        choose_template("auto", spec_with(None, ("<s>", "</s>")))
    with pytest.raises(DataError, match=r"not recognised \(the tokenizer's chat template leaves out turns"):
        choose_template("auto", spec_with("{{ messages[0].content }}"))


def test_names() -> None:
    with pytest.raises(DataError, match=r"unknown template 'lama3'; did you mean 'llama3'\?; known: auto"):
        choose_template("lama3", spec_with(None))
    with pytest.raises(DataError, match=r"has no \{% generation %\} block"):
        choose_template("generation", spec_with(CHATML))
    assert choose_template("qwen", spec_with(SMOL)) is TEMPLATES["qwen2"]
    assert choose_template("llama4", spec_with(SMOL)).name == "own"
    assert set(ALIASES.values()) <= {"own", *TEMPLATES}


def test_a_template_for_tools_is_used_with_tools() -> None:
    needs_tools = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + XML_CALLS.partition("{% endif %}")[2]
    tokenizer = ConversationTokenizer(spec_with(CHATML, ("<|im_start|>", "<|im_end|>"), needs_tools), TokenizeOptions())
    decode = byte_level(all_control=False, extra=("<|im_start|>", "<|im_end|>")).decode
    assert decode(tokenizer(Conversation("x", TOOLS, [TOOL])).input_ids).startswith("sky<|im_start|>user")
    assert decode(tokenizer(Conversation("x", QA)).input_ids).startswith("<|im_start|>user")


def test_fingerprint_tells_templates_apart() -> None:
    sources = [own(JINJA), own(JINJA.replace("\n", " "))]
    prints = {template.fingerprint for template in [*TEMPLATES.values(), *sources]}
    assert len(prints) == len(TEMPLATES) + 2


# ------------------------------------------------------------------------------- templates that mark what is generated

JINJA = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("variable", ["message", "m", "turn"])
def test_generation_mask_agrees_with_transformers(variable: str) -> None:
    """On plain text, where transformers' own mask is right, both agree token for token: every answer is trained,
    whatever the loop variable is called."""
    source = re.sub(r"\bmessage\b", variable, JINJA)
    tokenizer = byte_level(trim_offsets=False)
    spec = TokenizerSpec(TokenizerSpec.from_tokenizer(tokenizer).tokenizer_json, source, ())
    chooser = random.Random(3)
    words = ["Be", "kind", "there", "1+1", "é", "\n", "two", "it"]
    for _ in range(10):
        messages = [
            {"role": role, "content": "x" + " ".join(chooser.choices(words, k=chooser.randint(1, 6))) + "."}
            for role in ["system", *["user", "assistant"] * chooser.randint(1, 3)]
        ]
        row = ConversationTokenizer(spec, TokenizeOptions())(Conversation("x", messages))
        oracle = tokenizer.apply_chat_template(
            messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
        )
        assert row.input_ids.tolist() == oracle["input_ids"]
        assert row.loss_mask.astype(int).tolist() == oracle["assistant_masks"]


def test_generation_template_of_one_turn_and_of_a_cut_off_one() -> None:
    template = own(JINJA)
    answers = [QA[0], {**QA[1], "weight": 0}, QA[2], {"role": "assistant", "content": "It", "finish_reason": "length"}]
    assert marked(template.render(answers)).endswith(
        "assistant\nHello.<|im_end|><|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦It⟧"
    )
    last = template.render(QA, train_only_last_turn=True)
    assert [last.text[slice(*span)] for span in last.spans] == ["It is 2.<|im_end|>"]


def test_template_errors_are_one_line() -> None:
    with pytest.raises(DataError, match="chat template, line 1"):
        own("{% generation %}{% if %}").render(PLAIN)
    evil = "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}"
    with pytest.raises(DataError, match="refuses this conversation: access to attribute '__class__'"):
        own(evil).render(PLAIN)
