"""What a template does, learned from short conversations: where prompts end, what ends a turn, which forms it takes."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import CONTENT_TOKENS
from specforge_lite.data.templates.marks import Drawing, Message, mark_texts

if TYPE_CHECKING:
    from specforge_lite.data.templates.rendering import ChatTemplate

OPEN_THOUGHT = re.compile(r"<think>\s*$")
# How templates name the switch that opens or closes a thought in the prompt; {}: what a server does by default.
SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": True, "thinking": True},
    {"enable_thinking": False, "thinking": False},
)
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look up.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "Where"}}},
    },
}
_QUESTION: Message = {"role": "user", "content": "One?"}
_ANSWER: Message = {"role": "assistant", "content": "Alpha."}
_TALK = [_QUESTION, _ANSWER, {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Beta."}]
_RESULT: Message = {"role": "tool", "content": "blue", "tool_call_id": "probe0001", "name": "look"}


def _call(arguments: Any) -> Message:
    call = {"id": "probe0001", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_CALL = _call({"at": "Rome"})


@dataclass(frozen=True)
class Probes:
    """What short conversations tell about a template.

    problem: why it cannot be used, None where it can. prompt_ends: texts that may stand between a question and what
    the target produces. end_tokens: what ends a turn. opens_thought: a server's prompt ends with `<think>`.
    strips_thoughts: `<think>...</think>` in an earlier answer is left out. content_parts: content as a list of parts.
    arguments: form of a tool call's arguments, "as-is", "object" or "text".
    """

    problem: str | None = None
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
        is_text = isinstance(arguments, str)
        if self.arguments == "text":
            return arguments if is_text else json.dumps(arguments, ensure_ascii=False)
        try:
            parsed = json.loads(arguments) if is_text else arguments
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments


def probe(template: ChatTemplate) -> Probes:
    probes = Probes()
    if problem := _problem_with(template, probes):
        probes = Probes(content_parts=True)
        if _problem_with(template, probes):
            return Probes(problem)
    forms = {}
    for form, arguments in (("object", {"at": "Rome"}), ("text", '{"at": "Rome"}')):
        try:
            forms[form] = template.jinja(probes, [_QUESTION, _call(arguments)], [PROBE_TOOL])[0]
        except DataError:
            continue
    if len(set(forms.values())) != 1 or len(forms) != 2:
        probes = replace(probes, arguments=next(iter(forms), "as-is"))
    try:
        prompt, _ = template.jinja(probes, [_QUESTION], (), True)
        thought = {**_ANSWER, "content": "<think>\nGamma\n</think>\n\nAlpha."}
        stripped = "Gamma" not in template.jinja(probes, [_QUESTION, thought, *_TALK[2:]])[0]
        probes = replace(probes, opens_thought=OPEN_THOUGHT.search(prompt) is not None, strips_thoughts=stripped)
    except DataError:
        pass
    if template.marks_generation:
        return probes
    return replace(probes, prompt_ends=_prompt_ends(template, probes), end_tokens=_end_tokens(template, probes))


def _problem_with(template: ChatTemplate, probes: Probes) -> str | None:
    try:
        drawing = _talk_drawing(template, probes)
        plain, _ = template.jinja(probes, _TALK)
    except DataError as error:
        return str(error)
    if any(drawing.kinds(index) != {kind} for index, kind in enumerate("ococ")):
        return f"{template.what} leaves out turns"
    return None if drawing.text == plain else f"{template.what} changes the text of an answer"


def _talk_drawing(template: ChatTemplate, probes: Probes) -> Drawing:
    return Drawing.of(*template.jinja(probes, [mark_texts(message, index) for index, message in enumerate(_TALK)]))


def _prompt_ends(template: ChatTemplate, probes: Probes) -> tuple[str, ...]:
    """What stands after a question or a tool result in prompts, with thinking on and off, from the last added token
    on; and the part of it that earlier answers share (their header, without the thought that the prompt opens)."""
    after_question: set[str] = set()
    after_result: set[str] = set()
    for found, messages in ((after_question, [_QUESTION]), (after_result, [_QUESTION, _CALL, _RESULT])):
        text, tools = messages[-1]["content"], [PROBE_TOOL] if found is after_result else []
        for switch in SWITCHES[: 3 if "thinking" in template.source else 1]:
            try:
                _, place, end = template.jinja(probes, messages, tools, True, **switch)[0].rpartition(text)
            except DataError:
                continue
            if place:
                found.add(end)
    drawing = _talk_drawing(template, probes)
    gap = drawing.text[: drawing.places(1)[0]].rpartition(_QUESTION["content"])[2]
    close = template.jinja(probes, [_QUESTION])[0].rpartition(_QUESTION["content"])[2]
    # ... up to a whole tag: `<think>` and `</think>` share their bracket
    shared = {
        re.sub(r"<[^<>]*$", "", os.path.commonprefix([gap, end]))  # noqa: RUF071  (characters are meant)
        for end in after_question
    }
    ends = after_question | after_result | {end for end in shared if len(end) > len(close) or end == gap}
    if after_question <= {close, ""} and gap[len(close) :].strip():  # the template ignores add_generation_prompt
        ends.add(gap)
    pattern = _any_of(template.added_tokens)
    starts = {end: max((match.start() for match in pattern.finditer(end)), default=0) for end in ends}
    return tuple(sorted({end[start:] for end, start in starts.items()} - {""}, key=len))


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches an added token, but none of those that are part of an answer."""
    names = sorted((token for token in tokens if token not in CONTENT_TOKENS), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _end_tokens(template: ChatTemplate, probes: Probes) -> tuple[str, ...]:
    """What ends a turn: the tokenizer's end of text where that follows an answer in the middle of a conversation, else
    the first added token there; likewise for the last answer, and for a tool call (gpt-oss has a token for each)."""
    pattern = _any_of(template.added_tokens)
    drawing = _talk_drawing(template, probes)
    ends = {dict(template.variables).get("eos_token") or ""}

    def has_end(text: str) -> bool:
        return any(end and end in text for end in ends)

    after_first = drawing.text[drawing.places(1)[-1] : drawing.text.rfind(_TALK[2]["content"])]
    for tail in (after_first, drawing.text[drawing.places(3)[-1] :]):
        if not has_end(tail):
            ends |= set(pattern.findall(tail)[:1])
    for messages, place in (([_QUESTION, _CALL], -1), ([_QUESTION, _CALL, _RESULT, _ANSWER], 0)):
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
