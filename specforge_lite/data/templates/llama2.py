"""Llama 2 chat: `<s>[INST] <<SYS>>...<</SYS>> question [/INST] answer </s><s>[INST] ...`.

Source: `chat_template` of meta-llama/Llama-2-7b-chat-hf. `[INST]` is ordinary text for its tokenizer; the answer's
leading space is part of its first token.
"""

from __future__ import annotations

from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate

BOS, EOS = "<s>", "</s>"


def draw(chat: Chat, canvas: Canvas) -> None:
    """All turns; every question opens a new sequence, the system prompt is part of the first."""
    system, rest = chat.split_system()
    preface = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None else ""
    for index, message in rest:
        content = str(message["content"])
        if message["role"] == "user":
            canvas.add(f"{BOS}[INST] {(preface + content).strip()} [/INST]")
            preface = ""
        else:
            canvas.add(f" {content.strip()} {EOS}", trained=index >= chat.train_from)


TEMPLATES = {
    "llama2": ChatTemplate(
        "llama2",
        draw,
        (BOS, EOS),
        marks=(("[INST]", "<<SYS>>"),),
        needs_tokens=(BOS, EOS),
        roles=frozenset({"system", "user", "assistant"}),
    )
}
