"""What the target produces of a template without generation blocks: from marks around the texts of a conversation.

    <|im_start|>assistant\\n<think>\\n|why|\\n</think>\\n\\n|because|<|im_end|>\\n        | a mark
    prompt                  ^---------- what the target produces -------^

A span starts where the generation prompt ends and ends with the end-of-turn token; both are learned from the short
conversations of `probes`.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import CONTENT_TOKENS, any_of
from specforge_lite.data.templates.marks import Drawing, Message
from specforge_lite.data.templates.probes import (
    ANSWER,
    CALL,
    OPEN_THOUGHT,
    PROBE_TOOL,
    QUESTION,
    RESULT,
    SWITCHES,
    TALK,
    Probes,
    talk_drawing,
)
from specforge_lite.data.templates.rendering import ChatTemplate, split_reasoning

_EMPTY_THOUGHT = re.compile(r"\s*<([\w:]*think\w*)>\s*</\1>\s*|\s*</think>\s*")


def prompt_ends(template: ChatTemplate, probes: Probes) -> tuple[str, ...]:
    """What stands after a question or a tool result in prompts, with thinking on and off, from the last added token
    on; and the part of it that earlier answers share (their header, without the thought that the prompt opens)."""
    after_question: set[str] = set()
    after_result: set[str] = set()
    for found, messages in ((after_question, [QUESTION]), (after_result, [QUESTION, CALL, RESULT])):
        text, tools = messages[-1]["content"], [PROBE_TOOL] if found is after_result else []
        for switch in SWITCHES[: 3 if "thinking" in template.source else 1]:
            try:
                _, place, end = template.jinja(probes, messages, tools, True, **switch)[0].rpartition(text)
            except DataError:
                continue
            if place:
                found.add(end)
    drawing = talk_drawing(template, probes)
    gap = drawing.text[: drawing.places(1)[0]].rpartition(QUESTION["content"])[2]
    close = template.jinja(probes, [QUESTION])[0].rpartition(QUESTION["content"])[2]
    # ... up to a whole tag: `<think>` and `</think>` share their bracket
    shared = {
        re.sub(r"<[^<>]*$", "", os.path.commonprefix([gap, end]))  # noqa: RUF071  (characters are meant)
        for end in after_question
    }
    ends = after_question | after_result | {end for end in shared if len(end) > len(close) or end == gap}
    if after_question <= {close, ""} and gap[len(close) :].strip():  # the template ignores add_generation_prompt
        ends.add(gap)
    pattern = _ends_of_turns(template.added_tokens)
    starts = {end: max((match.start() for match in pattern.finditer(end)), default=0) for end in ends}
    return tuple(sorted({end[start:] for end, start in starts.items()} - {""}, key=len))


def _ends_of_turns(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches an added token, but none of those that are part of an answer."""
    return any_of(sorted((token for token in tokens if token not in CONTENT_TOKENS), key=len, reverse=True))


def end_tokens(template: ChatTemplate, probes: Probes) -> tuple[str, ...]:
    """What ends a turn: the tokenizer's end of text where that follows an answer in the middle of a conversation, else
    the first added token there; likewise for the last answer, and for a tool call (gpt-oss has a token for each)."""
    pattern = _ends_of_turns(template.added_tokens)
    drawing = talk_drawing(template, probes)
    ends = {dict(template.variables).get("eos_token") or ""}

    def has_end(text: str) -> bool:
        return any(end and end in text for end in ends)

    after_first = drawing.text[drawing.places(1)[-1] : drawing.text.rfind(TALK[2]["content"])]
    for tail in (after_first, drawing.text[drawing.places(3)[-1] :]):
        if not has_end(tail):
            ends |= set(pattern.findall(tail)[:1])
    for messages, place in (([QUESTION, CALL], -1), ([QUESTION, CALL, RESULT, ANSWER], 0)):
        try:
            _, call, tail = template.jinja(probes, messages, [PROBE_TOOL])[0].rpartition("Rome")
        except DataError:
            break
        tail = tail if call else ""
        tokens = pattern.findall(tail)
        if tokens and not has_end(tail):
            ends.add(tokens[place])
        if tokens or has_end(tail):
            break
    return tuple(sorted(ends - {""}))


def find_spans(template: ChatTemplate, messages: list[Message], drawing: Drawing) -> Iterator[tuple[int, int, int]]:
    """(message, start, end) of every answer, from marks, generation prompts and end tokens."""
    text, probes, previous = drawing.text, template.probes, 0
    for index, message in enumerate(messages):
        own = drawing.places(index)
        if own and message["role"] != "assistant":
            previous = own[-1]
        elif own:
            gap = text[previous : own[0]]
            ends = [gap.rfind(prompt) + len(prompt) for prompt in probes.prompt_ends if prompt in gap]
            start = previous + max(ends, default=len(gap))
            empty = _EMPTY_THOUGHT.match(text, start, own[0])
            if empty is not None and "r" not in drawing.kinds(index):
                start = empty.end()
            limit = min((position for position, i, _ in drawing.marks if i > index), default=len(text))
            found = [(text.find(token, own[-1], limit), len(token)) for token in probes.end_tokens]
            at, length = min((pair for pair in found if pair[0] >= 0), default=(own[-1], 0))
            if not length and message.get("tool_calls"):
                raise DataError(f"{template.what} ends a tool call with no token that is known as an end")
            previous = at + length
            yield index, start, previous


def with_last_reasoning(
    template: ChatTemplate, messages: list[Message], tools: Sequence[dict[str, Any]], drawing: Drawing
) -> Drawing:
    """The drawing with the reasoning of the last answer, or marked as one that lost it. Raises DataError where nothing
    of the answer is left."""
    found = None if template.marks_generation else _with_reasoning(template, messages, tools, drawing)
    if found is None and not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise DataError(f"{template.what} has no form for reasoning without an answer")
    return found or replace(drawing, lost_reasoning=True)


def _with_reasoning(
    template: ChatTemplate, messages: list[Message], tools: Sequence[dict[str, Any]], drawing: Drawing
) -> Drawing | None:
    """The reasoning of the last answer, which the template strips from its history: prompt, thought, answer, as
    the target produced it. None where the prompt of that turn opens no thought."""
    last = len(messages) - 1
    if messages[last - 1]["role"] == "tool":
        return None
    thought = split_reasoning(messages[last])[0].strip("\n")
    kept = tuple(span for span in drawing.spans if span[0] != last)
    own = [span for span in drawing.spans if span[0] == last]
    prompts = [template.jinja(template.probes, messages[:last], tools, True, **switch)[0] for switch in SWITCHES[:2]]
    prompt = next((text for text in prompts if OPEN_THOUGHT.search(text)), prompts[0])
    opened = OPEN_THOUGHT.search(prompt)
    before = max((position for position, index, _ in drawing.marks if index < last), default=0)
    start = own[0][1] if own else len(drawing.text)
    header = drawing.text[before:start]
    thinks = template.probes.strips_thoughts or any("think>" in text for text in (header, *template.probes.prompt_ends))
    changed = any(prompt[:end] != drawing.text[:end] for _, _, end in kept)
    if changed or (opened is None and not thinks):
        return None
    breaks = opened is None or opened[0].endswith("\n")  # DeepSeek V3.1 thinks without line ends around
    head = f"{prompt}{'' if opened else '<think>' + chr(10)}{thought}"
    close = "\n</think>\n\n" if breaks else "</think>"
    answer = drawing.text[start:].lstrip("\n")
    shift = len(head + close) + len(answer) - len(drawing.text)
    marks = [m for m in drawing.marks if m[1] != last] + [(len(head), last, "r")]
    marks += [(position + shift, i, kind) for position, i, kind in drawing.marks if i == last]
    end = own[-1][2] + shift if own else len(head)
    return Drawing(head + close + answer, tuple(marks), (*kept, (last, len(prompt), end)))
