"""Microsoft Phi: phi-3 and 3.5 (`<|user|>\\n...<|end|>\\n`), phi-4 (ChatML with `<|im_sep|>`), phi-4-mini.

Source: `chat_template` of microsoft/Phi-3.5-mini-instruct, phi-4 and Phi-4-mini-instruct. The end-of-text token that
the templates of phi-3 and phi-4-mini put after the last turn is not produced by the model and is left out.
"""

from __future__ import annotations

from functools import partial

from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate, Message, to_json, tool_functions

END = "<|end|>"
IM_START, IM_SEP, IM_END = "<|im_start|>", "<|im_sep|>", "<|im_end|>"
TOOLS_AFTER = (
    "You are a helpful assistant with some tools.\nTo use a tool, respond in this format:"
    ' <|tool_call|>{"name": "foo", "arguments": {"a": 1}}<|/tool_call|>'
)


def _draw_phi3(chat: Chat, canvas: Canvas) -> None:
    for index, message in enumerate(chat.messages):
        canvas.add(f"<|{message['role']}|>\n")
        is_answer = message["role"] == "assistant"
        canvas.add(f"{message['content']}{END}", trained=is_answer and index >= chat.train_from)
        canvas.add("\n")


def _draw_phi4(chat: Chat, canvas: Canvas) -> None:
    for index, message in enumerate(chat.messages):
        canvas.add(f"{IM_START}{message['role']}{IM_SEP}")
        is_answer = message["role"] == "assistant"
        canvas.add(f"{message['content']}{IM_END}", trained=is_answer and index >= chat.train_from)


def _mini_calls(message: Message) -> str:
    return "".join(
        f'<|tool_call|>{{"name": {to_json(name)}, "arguments": {arguments}}}<|/tool_call|>'
        for name, arguments in tool_functions(message)
    )


def _draw_phi4_mini(chat: Chat, canvas: Canvas) -> None:
    system, rest = chat.split_system()
    if system is not None or chat.tools:
        tools = "".join(f"<|tool|>{to_json(tool['function'])}<|/tool|>" for tool in chat.tools)
        guide = TOOLS_AFTER if chat.tools and "<|tool_call|>" not in (system or "") else ""
        canvas.add(f"<|system|>{system or ''}{tools}{guide}{END}")
    for index, message in rest:
        if message["role"] == "tool":
            canvas.add(f"<|tool_response|>{to_json(message['content'])}{END}")
            continue
        canvas.add(f"<|{message['role']}|>")
        is_answer = message["role"] == "assistant"
        canvas.add(f"{message['content']}{_mini_calls(message)}{END}", trained=is_answer and index >= chat.train_from)


_HEADERS = ("<|system|>", "<|user|>", "<|assistant|>", END)
_NO_TOOLS = frozenset({"system", "user", "assistant"})

TEMPLATES = {
    "phi3": ChatTemplate(
        "phi3",
        _draw_phi3,
        _HEADERS,
        marks=(("<|user|>\\n", END), ("<|user|>\n", END), ("'<|' + message['role'] + '|>' + '\\n'", END)),
        needs_tokens=("<|user|>", "<|assistant|>", END),
        roles=_NO_TOOLS,
    ),
    "phi4": ChatTemplate(
        "phi4",
        _draw_phi4,
        (IM_START, IM_SEP, IM_END),
        marks=((IM_START, IM_SEP, IM_END),),
        needs_tokens=(IM_START, IM_SEP, IM_END),
        roles=_NO_TOOLS,
    ),
    "phi4-mini": ChatTemplate(
        "phi4-mini",
        partial(_draw_phi4_mini),
        (*_HEADERS, "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"),
        marks=(("'<|' + message['role'] + '|>'", END, "<|tool|>"),),
        needs_tokens=(END, "<|tool|>", "<|tool_call|>"),
    ),
}
