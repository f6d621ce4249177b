"""MiniCPM 4: plain ChatML without a default system prompt and without tools.

Source: `chat_template` of openbmb/MiniCPM4-8B. Its tokenizer adds `<s>` to plain text, but chat prompts are tokenized
without special tokens of the tokenizer's own (transformers `apply_chat_template`, as SGLang and vLLM call it).
"""

from __future__ import annotations

from specforge_lite.data.templates.base import ChatTemplate
from specforge_lite.data.templates.chatml import END, START, draw

TEMPLATES = {
    "minicpm4": ChatTemplate("minicpm4", draw, (START, END), roles=frozenset({"system", "user", "assistant"})),
}
