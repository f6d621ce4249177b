"""What a template does, learned from short conversations: where prompts end, what ends a turn, which forms it takes."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import CONTENT_TOKENS
from specforge_lite.data.templates.jinja import (
    PROBE_TOOL,
    Drawing,
    JinjaTemplate,
    Message,
    Tools,
    mark_texts,
    marks_generation,
)

OPEN_THOUGHT = re.compile(r"<think>\s*$")
# How templates name the switch that opens or closes a thought in the prompt; {}: what a server does by default.
SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": True, "thinking": True},
    {"enable_thinking": False, "thinking": False},
)


@dataclass(frozen=True)
class Probes:
    """What short conversations tell about a template.

    problem: why it cannot be used, None where it can. prompt_ends: texts that may stand between a question and what
    the target produces. end_tokens: what ends a turn. opens_thought: a server's prompt ends with `<think>`.
    strips_thoughts: `<think>...</think>` in an earlier answer is left out. content_parts: content as a list of parts.
    arguments: form of a tool call's arguments, "as-is", "object" or "text".
    """

    problem: str | None
    prompt_ends: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()
    opens_thought: bool = False
    strips_thoughts: bool = False
    content_parts: bool = False
    arguments: str = "as-is"

    def shape(self, message: Message) -> Message:
        """A message as the template takes it."""
        ours = ("weight", "finish_reason")
        result = {key: value for key, value in message.items() if key not in ours and value is not None}
        if self.content_parts:
            result["content"] = [{"type": "text", "text": message["content"]}]
        if message.get("tool_calls") and self.arguments != "as-is":
            result["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": self._shape_arguments(call["function"])}}
                for call in message["tool_calls"]
            ]
        return result

    def _shape_arguments(self, function: dict[str, Any]) -> Any:
        arguments = function["arguments"]
        if self.arguments == "text":
            return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments


_TALK: list[Message] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Alpha."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Beta."},
]


def _call(arguments: Any) -> Message:
    call = {"id": "probe0001", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_RESULT: Message = {"role": "tool", "content": "blue", "tool_call_id": "probe0001", "name": "look"}


def probe(template: JinjaTemplate) -> Probes:
    probes = Probes(None)
    problem = _problem_with(template, probes)
    if problem is not None:
        in_parts = replace(probes, content_parts=True)
        if _problem_with(template, in_parts) is not None:
            return Probes(problem)
        probes = in_parts
    forms = {}
    for form, arguments in (("object", {"at": "Rome"}), ("text", '{"at": "Rome"}')):
        try:
            shaped = [probes.shape(message) for message in (_TALK[0], _call(arguments))]
            forms[form] = template.jinja(shaped, [PROBE_TOOL])[0]
        except DataError:
            continue
    if len(set(forms.values())) != 1 or len(forms) != 2:
        probes = replace(probes, arguments=next(iter(forms), "as-is"))
    try:
        prompt, _ = template.jinja([probes.shape(_TALK[0])], (), True)
        thought = {**_TALK[1], "content": "<think>\nGamma\n</think>\n\nAlpha."}
        history = [probes.shape(message) for message in (_TALK[0], thought, *_TALK[2:])]
        stripped = "Gamma" not in template.jinja(history, ())[0]
        probes = replace(probes, opens_thought=OPEN_THOUGHT.search(prompt) is not None, strips_thoughts=stripped)
    except DataError:
        pass
    if marks_generation(template.source):
        return probes
    return replace(probes, prompt_ends=_prompt_ends(template, probes), end_tokens=_end_tokens(template, probes))


def _problem_with(template: JinjaTemplate, probes: Probes) -> str | None:
    try:
        drawing = _drawing_of(template, probes, _TALK)
        plain, _ = template.jinja([probes.shape(message) for message in _TALK], ())
    except DataError as error:
        return str(error)
    if any(drawing.kinds(index) != {kind} for index, kind in enumerate("ococ")):
        return f"{template.what} leaves out turns"
    return None if drawing.text == plain else f"{template.what} changes the text of an answer"


def _drawing_of(template: JinjaTemplate, probes: Probes, messages: Sequence[Message], tools: Tools = ()) -> Drawing:
    marked = [mark_texts(probes.shape(message), index) for index, message in enumerate(messages)]
    return Drawing.of(*template.jinja(marked, tools))


def _prompt_ends(template: JinjaTemplate, probes: Probes) -> tuple[str, ...]:
    """What stands after a question or a tool result in prompts, with thinking on and off, from the last added token
    on; and the part of it that earlier answers share (their header, without the thought that the prompt opens)."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for messages, tools in (([_TALK[0]], []), ([_TALK[0], _call({"at": "Rome"}), _RESULT], [PROBE_TOOL])):
        text = messages[-1]["content"]
        for switch in SWITCHES[: 3 if "thinking" in template.source else 1]:
            try:
                prompt, _ = template.jinja([probes.shape(message) for message in messages], tools, True, **switch)
            except DataError:
                continue
            if text in prompt:
                found[not tools].add(prompt[prompt.rfind(text) + len(text) :])
    drawing = _drawing_of(template, probes, _TALK)
    question = _TALK[0]["content"]
    first_answer = next(position for position, index, _ in drawing.marks if index == 1)
    gap = drawing.text[:first_answer].rpartition(question)[2]
    close = template.jinja([probes.shape(_TALK[0])], ())[0].rpartition(question)[2]
    # ... up to a whole tag: `<think>` and `</think>` share their bracket
    shared = {
        re.sub(r"<[^<>]*$", "", os.path.commonprefix([gap, end]))  # noqa: RUF071  (characters are meant)
        for end in found[True]
    }
    ends = found[True] | found[False] | {end for end in shared if len(end) > len(close) or end == gap}
    if found[True] <= {close, ""} and gap[len(close) :].strip():  # the template ignores add_generation_prompt
        ends.add(gap)
    pattern = _any_of(template.added_tokens)
    starts = {end: [match.start() for match in pattern.finditer(end)] or [0] for end in ends}
    return tuple(sorted({end[starts[end][-1] :] for end in ends} - {""}, key=len))


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches an added token, but none of those that are part of an answer."""
    names = sorted((token for token in tokens if token not in CONTENT_TOKENS), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _end_tokens(template: JinjaTemplate, probes: Probes) -> tuple[str, ...]:
    """What ends a turn: the tokenizer's end of text where that follows an answer in the middle of a conversation, else
    the first added token there; likewise for the last answer, and for a tool call (gpt-oss has a token for each)."""
    pattern, eos = _any_of(template.added_tokens), dict(template.variables).get("eos_token") or ""
    drawing = _drawing_of(template, probes, _TALK)
    last_marks = [max(p for p, i, _ in drawing.marks if i == index) for index in (1, 3)]
    ends = {eos}
    tails = [drawing.text[last_marks[0] : drawing.text.rfind(_TALK[2]["content"])], drawing.text[last_marks[1] :]]
    for tail in tails:
        if not any(end and end in tail for end in ends):
            ends |= set(pattern.findall(tail)[:1])
    call = _call({"at": "Rome"})
    for messages, place in (([_TALK[0], call], -1), ([_TALK[0], call, _RESULT, _TALK[1]], 0)):
        try:
            text, _ = template.jinja([probes.shape(message) for message in messages], [PROBE_TOOL])
        except DataError:
            break
        tail = text.rpartition("Rome")[2] if "Rome" in text else ""
        tokens = pattern.findall(tail)
        if any(end and end in tail for end in ends):
            break
        if tokens:
            ends.add(tokens[place])
            break
    return tuple(sorted(ends - {""}))
