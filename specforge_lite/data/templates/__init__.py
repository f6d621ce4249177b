"""Chat templates by name. A new family is one file with a `TEMPLATES` dict and one line here; a test fails until it
has a golden."""

from __future__ import annotations

from specforge_lite.data.templates import chatml
from specforge_lite.data.templates.base import Canvas, Chat, ChatTemplate, Rendering

TEMPLATES: dict[str, ChatTemplate] = {
    **chatml.TEMPLATES,
}

__all__ = ["TEMPLATES", "Canvas", "Chat", "ChatTemplate", "Rendering"]
