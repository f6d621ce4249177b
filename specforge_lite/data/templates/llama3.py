"""Llama 3, and Llama 3.1 / 3.2 / 3.3, whose system turn always names two dates.

Sources: `chat_template` of meta-llama/Meta-Llama-3-8B-Instruct and of Llama-3.1-8B, 3.2-3B and 3.3-70B-Instruct. The
date is the one 3.1 and 3.3 print when nobody gives another (3.2 prints today's, which a cache must not depend on).
"""

from __future__ import annotations

from functools import partial

from specforge_lite.core.errors import DataError
from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate, Message, to_json, tool_functions

BEGIN, START, STOP, END = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
TOOLS_BEFORE = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best"
    " answers the given prompt.\n\nRespond in the format"
    ' {"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
)


def _header(role: str) -> str:
    return f"{START}{role}{STOP}\n\n"


def _answer(message: Message) -> str:
    calls = tool_functions(message)
    if len(calls) > 1:
        raise DataError("Llama 3 has no form for several tool calls in one turn")
    if calls:
        name, arguments = calls[0]
        return f'{{"name": "{name}", "parameters": {arguments}}}{END}'
    return str(message["content"]).strip() + END


def draw(chat: Chat, canvas: Canvas, dates: str) -> None:
    """All turns; content is stripped, tools stand in the first user turn, results are turns of `ipython`, always
    quoted: the official template takes text for a list of characters and calls `tojson` on it."""
    system, rest = chat.split_system()
    canvas.add(BEGIN)
    if system is not None or dates:
        environment = "Environment: ipython\n" if chat.tools else ""
        canvas.add(f"{_header('system')}{environment}{dates}{(system or '').strip()}{END}")
    tools = "".join(f"{to_json(tool, indent=4)}\n\n" for tool in chat.tools)
    for index, message in rest:
        content = str(message["content"]).strip()
        if message["role"] == "assistant":
            canvas.add(_header("assistant"))
            canvas.add(_answer(message), trained=index >= chat.train_from)
        elif message["role"] == "tool":
            canvas.add(f"{_header('ipython')}{to_json(message['content'])}{END}")
        else:
            preface, tools = (TOOLS_BEFORE + tools if tools else ""), ""
            canvas.add(f"{_header(message['role'])}{preface}{content}{END}")


_CONTROL = (BEGIN, START, STOP, END, "<|eom_id|>", "<|end_of_text|>")
_NEEDS = (START, STOP, END)

TEMPLATES = {
    "llama3": ChatTemplate("llama3", partial(draw, dates=""), _CONTROL, ((START, END),), _NEEDS),
    "llama3.1": ChatTemplate(
        "llama3.1", partial(draw, dates=DATES), _CONTROL, ((START, END, "Cutting Knowledge Date"),), _NEEDS
    ),
}
