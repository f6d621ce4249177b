"""A Jinja template and what transformers makes of it; marks around the texts of a conversation, found again in what was
rendered."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import accumulate, count
from typing import Any

from specforge_lite.core.errors import DataError

Message = dict[str, Any]
Tools = Sequence[dict[str, Any]]

# Templates that print today's date print this one: a cache must not depend on the day it is built.
FIXED_DATE = date(2025, 8, 5)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# A mark between two noncharacters (`encoding.clean` replaces them in data): index of the message, kind (r reasoning,
# c content, n name of a call, o another role's text), number in the message: a template may print a text twice.
_MARK = re.compile("\ufdd2([0-9]+)([rcno])[0-9]+\ufdd3")
_PLACEHOLDER = re.compile("\ufdd5[0-9]+\ufdd6")  # of `TextEncoder.quote`
_THINK_TAG = re.compile(r"(</?think>)")
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look up.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "Where"}}},
    },
}


def marks_generation(source: str) -> bool:
    """True if a Jinja template says itself what the assistant produces."""
    return _GENERATION.search(source) is not None


@dataclass(frozen=True)
class JinjaTemplate:
    """One Jinja template.

    source: Jinja text. variables: what it is rendered with besides messages and tools. control_tokens: tokens that
    separate turns; written by a user they stay ordinary text. has_tools: it has a form for tool calls. added_tokens:
    of the tokenizer, among them those that end a turn. for_tools: it is rendered with tools always.
    """

    name: str
    source: str
    variables: tuple[tuple[str, Any], ...] = ()
    control_tokens: tuple[str, ...] = ()
    has_tools: bool = True
    added_tokens: tuple[str, ...] = ()
    for_tools: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides text and spans."""
        parts = [self.name, self.source, self.variables, self.added_tokens, FIXED_DATE.isoformat()]
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()

    @property
    def what(self) -> str:
        """The template in a message."""
        return "the tokenizer's chat template" if self.is_own else f"template '{self.name}'"

    @property
    def is_own(self) -> bool:
        """It came with the tokenizer."""
        return self.name in ("own", "generation")

    def jinja(
        self, messages: Sequence[Message], tools: Tools, prompt: bool = False, **switch: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """What transformers renders (sandboxed: a template is somebody's code), and the generation blocks in it."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        tools = tools or ([PROBE_TOOL] if self.for_tools else [])
        source = _DATE_CALL.sub(lambda match: json.dumps(FIXED_DATE.strftime(match[2])), self.source)
        efforts = [message["reasoning_effort"] for message in messages if "reasoning_effort" in message]
        variables = {**dict(self.variables), **switch, **({"reasoning_effort": efforts[0]} if efforts else {})}
        try:
            result: Any = render_jinja_template(
                [list(messages)],
                list(tools) or None,
                chat_template=source,
                return_assistant_tokens_mask=marks_generation(source),
                add_generation_prompt=prompt,
                **variables,
            )
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise DataError(f"{self.what}, line {error.lineno}: {error.message}") from None
        except (jinja2.exceptions.TemplateError, TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{self.what} refuses this conversation: {error}") from None
        texts, blocks = result
        return texts[0], blocks[0] if blocks else []


@dataclass(frozen=True)
class Drawing:
    """A rendered conversation. marks: (position, message, kind), ascending. spans: (message, start, end) of what the
    target produces. lost_reasoning: the template has no place for reasoning that the last answer has."""

    text: str
    marks: tuple[tuple[int, int, str], ...]
    spans: tuple[tuple[int, int, int], ...]
    lost_reasoning: bool = False

    @classmethod
    def of(cls, marked: str, blocks: list[tuple[int, int]]) -> Drawing:
        """From text with marks and the generation blocks in it; a block belongs to the answer whose marks it holds."""
        found = list(_MARK.finditer(marked))
        removed = [0, *accumulate(len(match[0]) for match in found)]
        starts = [match.start() for match in found]
        first: dict[str, tuple[int, int, str]] = {}
        for i, match in enumerate(found):
            first.setdefault(match[0], (match.start() - removed[i], int(match[1]), match[2]))
        marks = tuple(first.values())
        answers = [(position, index) for position, index, kind in marks if kind != "o"]
        spans = []
        for block in blocks:
            start, end = (at - removed[bisect_right(starts, at - 1)] for at in block)
            inside = [index for position, index in answers if position >= start]
            spans.append((inside[0] if inside else answers[-1][1] if answers else -1, start, end))
        return cls(_MARK.sub("", marked), marks, tuple(spans))

    def kinds(self, index: int) -> set[str]:
        """What of a message is in the text."""
        return {kind for _, i, kind in self.marks if i == index}


def mark_texts(message: Message, index: int, mark_others: bool = True) -> Message:
    """A copy with marks: on both sides of every text of an answer, inside the white space at its ends (templates strip
    it); in the middle of other texts (templates look at their beginning and end)."""

    number = count()

    def mark(kind: str) -> str:
        return f"\ufdd2{index}{kind}{next(number)}\ufdd3"

    def hug(text: str, kind: str) -> str:
        core = text.strip()
        return text.replace(core, f"{mark(kind)}{core}{mark(kind)}", 1) if core else text

    def inside(text: str) -> str:
        at = len(text) // 2
        at = next((match.end() for match in _PLACEHOLDER.finditer(text) if match.start() < at < match.end()), at)
        return f"{text[:at]}{mark('o')}{text[at:]}" if text.strip() else text

    def content(text: str) -> str:
        if message["role"] != "assistant":
            return inside(text)
        pieces = _THINK_TAG.split(text)  # texts at even places
        kinds = ["r" if "</think>" in pieces[i + 1 :] else "c" for i in range(len(pieces))]
        return "".join(piece if i % 2 else hug(piece, kinds[i]) for i, piece in enumerate(pieces))

    if message["role"] != "assistant" and not mark_others:
        return message
    result = dict(message)
    if isinstance(message["content"], list):
        result["content"] = [{**part, "text": content(part["text"])} for part in message["content"]]
    else:
        result["content"] = content(message["content"])
    if message.get("reasoning_content"):
        result["reasoning_content"] = hug(message["reasoning_content"], "r")
    if message.get("tool_calls"):
        result["tool_calls"] = [
            {**call, "function": {**call["function"], "name": hug(call["function"]["name"], "n")}}
            for call in message["tool_calls"]
        ]
    return result
