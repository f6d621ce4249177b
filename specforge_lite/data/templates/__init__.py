"""Chat templates: `rendering` finds what the target produces, `auto` holds the families and chooses."""

from specforge_lite.data.templates.auto import TEMPLATES
from specforge_lite.data.templates.rendering import ChatTemplate

__all__ = ["TEMPLATES", "ChatTemplate"]
