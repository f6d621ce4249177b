"""DeepSeek V2.5 / V3, R1 and V3.1: `<｜User｜>question<｜Assistant｜>answer<｜end▁of▁sentence｜>`.

Source: `chat_template` of deepseek-ai/DeepSeek-V3-0324, DeepSeek-R1 and DeepSeek-V3.1. R1 and V3.1 open the last answer
with `<think>` in the prompt, so the model produces what follows it; earlier answers show no reasoning. V3.1 without
thinking has `</think>` in the prompt.
"""

from __future__ import annotations

from functools import partial

from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate, Message, split_reasoning, tool_functions

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
OUTPUTS, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"


def _calls_text(message: Message, compact: bool) -> str:
    """`compact`: V3.1's form without the fenced JSON block."""
    calls = [
        f"{CALL}{name}{SEP}{arguments}{CALL_END}"
        if compact
        else f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{CALL_END}"
        for name, arguments in tool_functions(message)
    ]
    return f"{CALLS}{('' if compact else chr(10)).join(calls)}{CALLS_END}" if calls else ""


def _draw_result(chat: Chat, canvas: Canvas, index: int) -> None:
    """V3 and R1: neighbouring results share one block."""
    is_tool = [0 <= i < len(chat.messages) and chat.messages[i]["role"] == "tool" for i in (index - 1, index + 1)]
    canvas.add("\n" if is_tool[0] else OUTPUTS)
    canvas.add(f"{OUTPUT}{chat.messages[index]['content']}{OUTPUT_END}")
    canvas.add("" if is_tool[1] else OUTPUTS_END)


def draw(chat: Chat, canvas: Canvas, variant: str) -> None:
    """All turns; `variant` is v3, r1 or v3.1. An answer after tool results has no header of its own."""
    system, rest = chat.split_system()
    canvas.add(BOS + (system or ""))
    for index, message in rest:
        if message["role"] == "user":
            canvas.add(f"{USER}{message['content']}")
        elif message["role"] == "tool" and variant == "v3.1":
            canvas.add(f"{OUTPUT}{message['content']}{OUTPUT_END}")
        elif message["role"] == "tool":
            _draw_result(chat, canvas, index)
        else:
            _draw_answer(chat, canvas, index, variant)


def _draw_answer(chat: Chat, canvas: Canvas, index: int, variant: str) -> None:
    message = chat.messages[index]
    trained = index >= chat.train_from
    reasoning, content = ("", str(message["content"])) if variant == "v3" else split_reasoning(message)
    after_user = index == 0 or chat.messages[index - 1]["role"] != "tool"
    thinks = bool(reasoning) and after_user and index > chat.last_user_index
    canvas.add(ASSISTANT if after_user else "")
    if thinks and variant == "r1":
        canvas.add("<think>\n")
        canvas.add(f"{reasoning}\n</think>\n\n", trained)
    elif thinks:
        canvas.add("<think>")
        canvas.add(f"{reasoning}</think>", trained)
    elif variant == "v3.1" and after_user:
        canvas.add("</think>")
    canvas.add(content + _calls_text(message, compact=variant == "v3.1") + EOS, trained)


_CONTROL = (BOS, EOS, USER, ASSISTANT, CALLS, CALLS_END, CALL, CALL_END, SEP, OUTPUTS, OUTPUTS_END, OUTPUT, OUTPUT_END)
_NEEDS = (USER, ASSISTANT)

TEMPLATES = {
    "deepseek": ChatTemplate("deepseek", partial(draw, variant="v3"), _CONTROL, ((USER, ASSISTANT),), _NEEDS),
    "deepseek-r1": ChatTemplate(
        "deepseek-r1", partial(draw, variant="r1"), _CONTROL, ((USER, ASSISTANT, "</think>"),), _NEEDS
    ),
    "deepseek-v3.1": ChatTemplate(
        "deepseek-v3.1",
        partial(draw, variant="v3.1"),
        _CONTROL,
        ((USER, ASSISTANT, "</think>", "thinking", "is_last_user"),),
        _NEEDS,
    ),
}
