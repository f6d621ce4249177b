"""What a chat template is here: a function that draws a conversation on a canvas and says, piece by piece, what the
target itself would have produced.

The spans that are trained come from the drawing, never from searching the finished text, so text that a user wrote
can look like anything without ever being trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from specforge_lite.core.errors import DataError

Message = dict[str, Any]

# Templates that print today's date print this one: a cache must not depend on the day it is built.
FIXED_DATE = date(2025, 8, 5)


@dataclass(frozen=True)
class Rendering:
    """A drawn conversation: `text`, and the ascending, disjoint character spans [start, end) that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Canvas:
    """Collects pieces of text in order; linear in the text, whatever the number of turns."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._length = 0

    def add(self, text: str, trained: bool = False) -> None:
        """Append `text`; `trained` marks it as produced by the target. Touching spans become one."""
        if not text:
            return
        start, self._length = self._length, self._length + len(text)
        self._pieces.append(text)
        if not trained:
            return
        if self._spans and self._spans[-1][1] == start:
            start = self._spans.pop()[0]
        self._spans.append((start, self._length))

    def finish(self) -> Rendering:
        """The text so far and its trained spans."""
        return Rendering("".join(self._pieces), tuple(self._spans))


@dataclass(frozen=True)
class Chat:
    """One conversation as a template sees it.

    messages: roles system, user, assistant, tool; `content` is always a string. train_from: assistant messages with
    a smaller index are drawn but not trained (0: all are).
    """

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    train_from: int = 0

    @cached_property
    def last_user_index(self) -> int:
        """Index of the last user message, -1 if there is none."""
        return max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=-1)

    def split_system(self) -> tuple[str | None, list[tuple[int, Message]]]:
        """The text of a leading system message (None if there is none) and the (index, message) pairs after it."""
        numbered = list(enumerate(self.messages))
        if numbered and numbered[0][1]["role"] == "system":
            return str(numbered[0][1]["content"]), numbered[1:]
        return None, numbered


@dataclass(frozen=True)
class ChatTemplate:
    """A family of chat templates.

    draw: puts a `Chat` on a `Canvas`. control_tokens: strings of this family that separate turns; written by a user
    they stay ordinary text. marks: the family is recognised when the tokenizer's own template holds all of one
    alternative (`needs_tokens`: and the vocabulary all of these). roles: what it can draw.
    """

    name: str
    draw: Callable[[Chat, Canvas], None]
    control_tokens: tuple[str, ...]
    marks: tuple[tuple[str, ...], ...] = ()
    needs_tokens: tuple[str, ...] = ()
    roles: frozenset[str] = frozenset({"system", "user", "assistant", "tool"})

    def render(self, chat: Chat) -> Rendering:
        """Draw `chat`. Raises DataError when the family has no form for a role or for tool calls."""
        for message in chat.messages:
            if message["role"] not in self.roles:
                raise DataError(f"template '{self.name}' has no form for role '{message['role']}'")
            if message.get("tool_calls") and "tool" not in self.roles:
                raise DataError(f"template '{self.name}' has no form for tool calls")
        canvas = Canvas()
        self.draw(chat, canvas)
        return canvas.finish()


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the `tojson` filter of chat templates writes it (transformers `chat_template_utils.tojson`)."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def tool_functions(message: Message) -> list[tuple[str, str]]:
    """(name, arguments as JSON text) of a message's tool calls; a string is kept as the target wrote it."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        calls.append((function["name"], arguments if isinstance(arguments, str) else to_json(arguments)))
    return calls


def split_reasoning(message: Message) -> tuple[str, str]:
    """(reasoning, answer) of an assistant message: `reasoning_content`, or a leading `<think>...</think>` block."""
    content = str(message["content"])
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        return reasoning, content
    if "</think>" in content:
        before, _, after = content.rpartition("</think>")
        return before.rpartition("<think>")[2].strip("\n"), after.lstrip("\n")
    return "", content
