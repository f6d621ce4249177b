"""Mistral's instruct formats, which differ in spaces and in the place of the system prompt.

    mistral-v1      7B-Instruct v0.1 / v0.2, Mixtral      <s> [INST] q [/INST] a</s>        system: first question
    mistral         7B-Instruct v0.3, Mixtral 8x22B       <s>[INST] q[/INST] a</s>          system: last question
    mistral-tekken  Nemo, Ministral                       <s>[INST]q[/INST]a</s>            system: last question
    mistral-v7      Small 3 and later, Large 2411         <s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]q[/INST]a</s>

Source: the `chat_template` of these models. A tool call without an id of nine characters gets its number as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate, Message, to_json, tool_functions

BOS, EOS = "<s>", "</s>"
ID_LENGTH = 9


@dataclass(frozen=True)
class Form:
    """What goes around a question, before an answer and after a tool marker; where the system prompt stands."""

    before_question: str
    after_question: str
    before_answer: str
    after_marker: str
    system_place: str


V1 = Form(" [INST] ", " [/INST]", " ", " ", "first")
V3 = Form("[INST] ", "[/INST]", " ", " ", "last")
TEKKEN = Form("[INST]", "[/INST]", "", "", "last")
V7 = Form("[INST]", "[/INST]", "", " ", "turn")


def _call_id(message: Message, number: int) -> str:
    given = (message.get("tool_calls") or [{}])[number].get("id", "")
    return given[-ID_LENGTH:] if len(given) >= ID_LENGTH else f"{number:0{ID_LENGTH}d}"


def _calls_text(message: Message, form: Form) -> str:
    calls = [
        f'{{"name": {to_json(name)}, "arguments": {arguments}, "id": "{_call_id(message, number)}"}}'
        for number, (name, arguments) in enumerate(tool_functions(message))
    ]
    return f"[TOOL_CALLS]{form.after_marker}[{', '.join(calls)}]{EOS}"


def _result_id(chat: Chat, index: int) -> str:
    """The id of the call that the tool result at `index` answers."""
    first = index
    while first > 0 and chat.messages[first - 1]["role"] == "tool":
        first -= 1
    given = str(chat.messages[index].get("tool_call_id", ""))
    caller = chat.messages[first - 1]
    number = min(index - first, len(caller.get("tool_calls") or [{}]) - 1)
    return given[-ID_LENGTH:] if len(given) >= ID_LENGTH else _call_id(caller, number)


def draw(chat: Chat, canvas: Canvas, form: Form) -> None:
    """All turns of one form."""
    system, rest = chat.split_system()
    first_user = next((i for i, message in rest if message["role"] == "user"), -1)
    system_at = {"first": first_user, "last": chat.last_user_index, "turn": -1}[form.system_place]
    tools = ", ".join(to_json({"type": "function", "function": tool["function"]}) for tool in chat.tools)
    canvas.add(BOS)
    if system is not None and form.system_place == "turn":
        canvas.add(f"[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT]")
    for index, message in rest:
        content = str(message["content"])
        trained = index >= chat.train_from
        if message["role"] == "user":
            if tools and index == chat.last_user_index:
                canvas.add(f"[AVAILABLE_TOOLS]{form.after_marker}[{tools}][/AVAILABLE_TOOLS]")
            preface = f"{system}\n\n" if system is not None and index == system_at else ""
            canvas.add(f"{form.before_question}{preface}{content}{form.after_question}")
        elif message["role"] == "tool":
            result = f'{{"content": {content}, "call_id": "{_result_id(chat, index)}"}}'
            canvas.add(f"[TOOL_RESULTS]{form.after_marker}{result}[/TOOL_RESULTS]")
        elif message.get("tool_calls"):
            canvas.add(_calls_text(message, form), trained)
        else:
            canvas.add(form.before_answer + (content.strip() if form is V3 else content) + EOS, trained)


_TOOL_TOKENS = (
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
_CONTROL = (BOS, EOS, "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", *_TOOL_TOKENS)
_NO_TOOLS = frozenset({"system", "user", "assistant"})

TEMPLATES = {
    "mistral-v1": ChatTemplate(
        "mistral-v1", partial(draw, form=V1), (BOS, EOS), ((" [INST] ", " [/INST]"),), (BOS, EOS), _NO_TOOLS
    ),
    "mistral": ChatTemplate(
        "mistral", partial(draw, form=V3), _CONTROL, (('"[INST] "', "[TOOL_CALLS]"),), (BOS, EOS, "[INST]", "[/INST]")
    ),
    "mistral-tekken": ChatTemplate(
        "mistral-tekken",
        partial(draw, form=TEKKEN),
        _CONTROL,
        (('"[INST]"', "[TOOL_CALLS]["), ("'[INST]'", "[TOOL_CALLS][")),
        (BOS, EOS, "[INST]", "[/INST]"),
    ),
    "mistral-v7": ChatTemplate(
        "mistral-v7",
        partial(draw, form=V7),
        _CONTROL,
        (("[SYSTEM_PROMPT]", "[INST]"),),
        (BOS, EOS, "[INST]", "[/INST]", "[SYSTEM_PROMPT]"),
    ),
}
