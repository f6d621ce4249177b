"""Marks around the texts of a conversation, found again in what a template made of it."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

Message = dict[str, Any]

# A mark between two noncharacters (`encoding.clean` replaces them in data): index of the message, kind (r reasoning,
# c content, n name of a call, o another role's text), number in the message: a template may print a text twice.
_MARK = re.compile("\ufdd2([0-9]+)([rcno])[0-9]+\ufdd3")
_PLACEHOLDER = re.compile("\ufdd5[0-9]+\ufdd6")  # of `TextEncoder.quote`
_THINK_TAG = re.compile(r"(</?think>)")


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

    def places(self, index: int) -> list[int]:
        return [position for position, i, _ in self.marks if i == index]


def mark_texts(message: Message, index: int, mark_others: bool = True) -> Message:
    """A copy with marks: on both sides of every text of an answer, inside the white space at its ends (templates strip
    it); in the middle of other texts (templates look at their beginning and end)."""
    number = count()

    def mark(kind: str) -> str:
        return f"\ufdd2{index}{kind}{next(number)}\ufdd3"

    def hug(text: str, kind: str) -> str:
        core = text.strip()
        return text.replace(core, f"{mark(kind)}{core}{mark(kind)}", 1) if core else text

    text = message["content"]
    if message["role"] == "assistant":
        pieces = _THINK_TAG.split(text)  # texts at even places
        for i in range(0, len(pieces), 2):
            pieces[i] = hug(pieces[i], "r" if "</think>" in pieces[i + 1 :] else "c")
        text = "".join(pieces)
    elif not mark_others:
        return message
    elif text.strip():
        at = len(text) // 2
        at = next((match.end() for match in _PLACEHOLDER.finditer(text) if match.start() < at < match.end()), at)
        text = f"{text[:at]}{mark('o')}{text[at:]}"
    result = {**message, "content": text}
    if message.get("reasoning_content"):
        result["reasoning_content"] = hug(message["reasoning_content"], "r")
    if message.get("tool_calls"):
        result["tool_calls"] = [
            {**call, "function": {**call["function"], "name": hug(call["function"]["name"], "n")}}
            for call in message["tool_calls"]
        ]
    return result
