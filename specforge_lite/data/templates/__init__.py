"""Chat templates by name. A new family is one file with a `TEMPLATES` dict and one line here; a test fails until it
has a golden."""

from __future__ import annotations

from specforge_lite.data.templates import (
    chatml,
    deepseek,
    gemma,
    gpt_oss,
    llama2,
    llama3,
    minicpm4,
    mistral,
    phi,
    qwen3,
)
from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate, Rendering

TEMPLATES: dict[str, ChatTemplate] = {
    **chatml.TEMPLATES,
    **qwen3.TEMPLATES,
    **llama3.TEMPLATES,
    **llama2.TEMPLATES,
    **mistral.TEMPLATES,
    **gemma.TEMPLATES,
    **phi.TEMPLATES,
    **deepseek.TEMPLATES,
    **gpt_oss.TEMPLATES,
    **minicpm4.TEMPLATES,
}

__all__ = ["TEMPLATES", "Canvas", "Chat", "ChatTemplate", "Rendering"]
