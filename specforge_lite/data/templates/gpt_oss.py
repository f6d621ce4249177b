"""gpt-oss, OpenAI's harmony format: channels for reasoning (analysis), tool calls (commentary) and answers (final).

Source: `chat_template` of openai/gpt-oss-120b. The prompt ends with `<|start|>assistant`, so the model produces the
channel headers too. Reasoning is drawn for the last turn only (and for tool calls that no answer followed yet). The
date in the system turn is fixed: a cache must not depend on the day it is built.
"""

from __future__ import annotations

from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.templates.base import (
    FIXED_DATE,
    Canvas,
    Chat,
    ChatTemplate,
    split_reasoning,
    to_json,
    tool_functions,
)

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    f"Current date: {FIXED_DATE:%Y-%m-%d}\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
TOOLS_NOTE = "\nCalls to these tools must go to the commentary channel: 'functions'."


def typescript_type(schema: dict[str, Any]) -> str:
    """A JSON schema as the TypeScript type that harmony shows the model."""
    kind = schema.get("type")
    nullable = " | null" if schema.get("nullable") else ""
    if isinstance(kind, list):
        return " | ".join(map(str, kind))
    if "oneOf" in schema:
        variants = schema["oneOf"]
        if len(variants) > 1 and any(variant.get("type") == "object" for variant in variants):
            return "any"
        return " | ".join(typescript_type(variant) for variant in variants)
    if kind == "array":
        inner = typescript_type(schema["items"]) if schema.get("items") else "any"
        return ("any" if len(inner) > 50 else inner.split(" | null")[0]) + "[]" + nullable
    if kind == "string" and schema.get("enum"):
        return '"' + '" | "'.join(map(str, schema["enum"])) + '"'
    if kind == "object" and schema.get("properties"):
        required = schema.get("required") or []
        fields = [
            f"{name}{'' if name in required else '?'}: {typescript_type(field)}"
            for name, field in schema["properties"].items()
        ]
        return "{\n" + ", ".join(fields) + "}"
    plain = {"string": "string" + nullable, "number": "number", "integer": "number", "boolean": "boolean"}
    return plain.get(str(kind), "object" if kind == "object" else "any")


def _tool_text(function: dict[str, Any]) -> str:
    parameters = function.get("parameters") or {}
    head = f"// {function.get('description', '')}\ntype {function['name']} = "
    if not parameters.get("properties"):
        return head + "() => any;\n\n"
    required = parameters.get("required") or []
    lines = []
    for name, schema in parameters["properties"].items():
        comment = f"// {schema['description']}\n" if schema.get("description") else ""
        default = f", // default: {to_json(schema['default'])}" if "default" in schema else ""
        lines.append(f"{comment}{name}{'' if name in required else '?'}: {typescript_type(schema)}{default},\n")
    return head + "(_: {\n" + "".join(lines) + "}) => any;\n\n"


def _developer_text(system: str | None, tools: Any) -> str:
    instructions = f"# Instructions\n\n{system}\n\n" if system else ""
    if not tools:
        return instructions
    functions = "".join(_tool_text(tool["function"]) for tool in tools)
    return f"{instructions}# Tools\n\n## functions\n\nnamespace functions {{\n\n{functions}}} // namespace functions"


def draw(chat: Chat, canvas: Canvas) -> None:
    """All turns, each as one or more harmony messages."""
    system, rest = chat.split_system()
    canvas.add(f"{START}system{MESSAGE}{SYSTEM}{TOOLS_NOTE if chat.tools else ''}{END}")
    developer = _developer_text(system, chat.tools)
    canvas.add(f"{START}developer{MESSAGE}{developer}{END}" if developer else "")
    called = ""
    answers = [i for i, m in rest if m["role"] == "assistant" and not m.get("tool_calls")]
    last_answer = answers[-1] if answers else -1
    for index, message in rest:
        if message["role"] == "user":
            canvas.add(f"{START}user{MESSAGE}{message['content']}{END}")
        elif message["role"] == "tool":
            if not called:
                raise DataError("harmony has no form for a tool result without a tool call")
            content = to_json(message["content"])
            canvas.add(f"{START}functions.{called} to=assistant{CHANNEL}commentary{MESSAGE}{content}{END}")
        else:
            _draw_answer(chat, canvas, index, last_answer)
            called = (tool_functions(message) or [("", "")])[0][0]


def _draw_answer(chat: Chat, canvas: Canvas, index: int, last_answer: int) -> None:
    message, trained = chat.messages[index], index >= chat.train_from
    reasoning, content = split_reasoning(message)
    calls = tool_functions(message)
    if len(calls) > 1:
        raise DataError("harmony has no form for several tool calls in one turn")
    is_last = index == len(chat.messages) - 1
    if calls:
        thought = (content or reasoning) if index > last_answer else ""
    else:
        thought = reasoning if is_last else ""
    canvas.add(f"{START}assistant")
    if thought:
        canvas.add(f"{CHANNEL}analysis{MESSAGE}{thought}{END}{START}assistant", trained)
    for name, arguments in calls:
        canvas.add(f" to=functions.{name}{CHANNEL}commentary json{MESSAGE}{arguments}{CALL}", trained)
    if not calls:
        canvas.add(f"{CHANNEL}final{MESSAGE}{content}{RETURN if is_last else END}", trained)


TEMPLATES = {
    "gpt-oss": ChatTemplate(
        "gpt-oss",
        draw,
        (START, CHANNEL, MESSAGE, END, RETURN, CALL),
        marks=((START, CHANNEL, MESSAGE),),
        needs_tokens=(START, CHANNEL, MESSAGE, END, RETURN),
    )
}
