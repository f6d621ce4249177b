"""Gemma 1, 2 and 3: `<start_of_turn>user\\n...<end_of_turn>`; the system prompt opens the first question.

Source: `chat_template` of google/gemma-3-4b-it (gemma-2-9b-it is the same without a system prompt).
"""

from __future__ import annotations

from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate

BOS, START, END = "<bos>", "<start_of_turn>", "<end_of_turn>"


def draw(chat: Chat, canvas: Canvas) -> None:
    """All turns; content is stripped."""
    system, rest = chat.split_system()
    preface = f"{system}\n\n" if system is not None else ""
    canvas.add(BOS)
    for index, message in rest:
        content = str(message["content"]).strip()
        if message["role"] == "user":
            canvas.add(f"{START}user\n{preface}{content}{END}\n")
            preface = ""
        else:
            canvas.add(f"{START}model\n")
            canvas.add(content + END, trained=index >= chat.train_from)
            canvas.add("\n")


TEMPLATES = {
    "gemma": ChatTemplate(
        "gemma",
        draw,
        (BOS, START, END, "<eos>"),
        marks=((START, END),),
        needs_tokens=(START, END),
        roles=frozenset({"system", "user", "assistant"}),
    )
}
