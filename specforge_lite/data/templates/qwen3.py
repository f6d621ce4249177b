"""Qwen 3 (dense, MoE, Next): ChatML whose last answer starts with a `<think>` block.

Source: `chat_template` of Qwen/Qwen3-8B. Only answers after the last user turn show their reasoning; an earlier one is
drawn without, as the model sees it when the next turn is asked for. An empty `<think>` block is what the server puts
into the prompt when thinking is off, so it is never trained; a filled one is.
"""

from __future__ import annotations

from functools import partial

from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate, Message, split_reasoning
from specforge_lite.data.templates.chatml import END, START, draw_system, draw_tool_result, tool_call_text

NO_THOUGHT = "<think>\n\n</think>\n\n"


def _last_query_index(chat: Chat) -> int:
    """The last user turn that is not a tool result in disguise; the last turn where there is none."""
    for index in range(len(chat.messages) - 1, -1, -1):
        message = chat.messages[index]
        text = str(message["content"])
        is_result = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if message["role"] == "user" and not is_result:
            return index
    return len(chat.messages) - 1


def _draw_answer(message: Message, canvas: Canvas, trained: bool, shows_thought: bool, is_last: bool) -> None:
    reasoning, content = split_reasoning(message)
    canvas.add(f"{START}assistant\n")
    if shows_thought and reasoning:
        canvas.add(f"<think>\n{reasoning.strip(chr(10))}\n</think>\n\n", trained)
        content = content.lstrip("\n")
    elif shows_thought and is_last:
        canvas.add(NO_THOUGHT)
        content = content.lstrip("\n")
    canvas.add(content + tool_call_text(message, content) + END, trained)
    canvas.add("\n")


def draw(chat: Chat, canvas: Canvas, thinking: bool) -> None:
    """All turns; with `thinking` off, reasoning in the data is left out."""
    system, rest = chat.split_system()
    draw_system(chat, canvas, system)
    last_query = _last_query_index(chat)
    for index, message in rest:
        if message["role"] == "assistant":
            seen = message if thinking else {**message, "content": split_reasoning(message)[1], "reasoning_content": ""}
            is_last = index == len(chat.messages) - 1
            _draw_answer(seen, canvas, index >= chat.train_from, index > last_query, is_last)
        elif message["role"] == "tool":
            draw_tool_result(chat, canvas, index)
        else:
            canvas.add(f"{START}{message['role']}\n{message['content']}{END}\n")


_MARKS = ((START, "<think>", "enable_thinking"), (START, "<think>", "reasoning_content", "last_query_index"))

TEMPLATES = {
    "qwen3": ChatTemplate("qwen3", partial(draw, thinking=True), (START, END), _MARKS, (START, END)),
    "qwen3-no-think": ChatTemplate("qwen3-no-think", partial(draw, thinking=False), (START, END)),
}
