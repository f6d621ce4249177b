"""ChatML: Qwen 2 and 2.5, and every model whose turns are `<|im_start|>role\\n...<|im_end|>`.

Source of the forms: `chat_template` of Qwen/Qwen2-7B-Instruct and Qwen/Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

from functools import partial

from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate, to_json, tool_functions

START, END = "<|im_start|>", "<|im_end|>"

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within"
    " <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def draw_system(chat: Chat, canvas: Canvas, system: str | None) -> None:
    """The system turn, with the tool signatures where there are tools; nothing without either."""
    if chat.tools:
        canvas.add(f"{START}system\n")
        canvas.add(f"{system}\n\n" if system else "")
        canvas.add(TOOLS_BEFORE + "".join("\n" + to_json(tool) for tool in chat.tools) + TOOLS_AFTER)
        canvas.add(f"{END}\n")
    elif system is not None:
        canvas.add(f"{START}system\n{system}{END}\n")


def draw_tool_result(chat: Chat, canvas: Canvas, index: int) -> None:
    """Neighbouring tool results share one user turn."""
    is_tool = [0 <= i < len(chat.messages) and chat.messages[i]["role"] == "tool" for i in (index - 1, index + 1)]
    canvas.add("" if is_tool[0] else f"{START}user")
    canvas.add(f"\n<tool_response>\n{chat.messages[index]['content']}\n</tool_response>")
    canvas.add("" if is_tool[1] else f"{END}\n")


def tool_call_text(message: dict, content: str) -> str:
    """`<tool_call>` blocks of an assistant message, separated from its content and one another by line ends."""
    blocks = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in tool_functions(message)
    ]
    return "\n".join(([""] if content and blocks else []) + blocks)


def draw(chat: Chat, canvas: Canvas, default_system: str | None = None) -> None:
    """All turns; `default_system` stands in where the conversation has no system turn."""
    system, rest = chat.split_system()
    draw_system(chat, canvas, default_system if system is None else system)
    for index, message in rest:
        content = str(message["content"])
        if message["role"] == "assistant":
            canvas.add(f"{START}assistant\n")
            canvas.add(content + tool_call_text(message, content) + END, trained=index >= chat.train_from)
            canvas.add("\n")
        elif message["role"] == "tool":
            draw_tool_result(chat, canvas, index)
        else:
            canvas.add(f"{START}{message['role']}\n{content}{END}\n")


QWEN2_SYSTEM = "You are a helpful assistant."
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

TEMPLATES = {
    "chatml": ChatTemplate("chatml", draw, (START, END), marks=((START, END),), needs_tokens=(START, END)),
    "qwen2": ChatTemplate(
        "qwen2",
        partial(draw, default_system=QWEN2_SYSTEM),
        (START, END),
        marks=((START, f"{START}system\\n{QWEN2_SYSTEM}"), (START, f"{START}system\n{QWEN2_SYSTEM}")),
        needs_tokens=(START, END),
    ),
    "qwen2.5": ChatTemplate(
        "qwen2.5",
        partial(draw, default_system=QWEN25_SYSTEM),
        (START, END),
        marks=((START, QWEN25_SYSTEM),),
        needs_tokens=(START, END),
    ),
}
