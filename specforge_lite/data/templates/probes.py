"""What a template does, learned from short conversations: where prompts end, what ends a turn, which forms it takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specforge_lite.core.errors import DataError
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
QUESTION: Message = {"role": "user", "content": "One?"}
ANSWER: Message = {"role": "assistant", "content": "Alpha."}
TALK = [QUESTION, ANSWER, {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Beta."}]
RESULT: Message = {"role": "tool", "content": "blue", "tool_call_id": "probe0001", "name": "look"}


def _call(arguments: Any) -> Message:
    call = {"id": "probe0001", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


CALL = _call({"at": "Rome"})


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
            from specforge_lite.data.templates.forms import shape_calls

            result["tool_calls"] = shape_calls(message["tool_calls"], self.arguments)
        return result


def probe(template: ChatTemplate) -> Probes:
    probes = Probes()
    if problem := _problem_with(template, probes):
        probes = Probes(content_parts=True)
        if _problem_with(template, probes):
            return Probes(problem)
    forms = {}
    for form, arguments in (("object", {"at": "Rome"}), ("text", '{"at": "Rome"}')):
        try:
            forms[form] = template.jinja(probes, [QUESTION, _call(arguments)], [PROBE_TOOL])[0]
        except DataError:
            continue
    if len(set(forms.values())) != 1 or len(forms) != 2:
        probes = replace(probes, arguments=next(iter(forms), "as-is"))
    try:
        prompt, _ = template.jinja(probes, [QUESTION], (), True)
        thought = {**ANSWER, "content": "<think>\nGamma\n</think>\n\nAlpha."}
        stripped = "Gamma" not in template.jinja(probes, [QUESTION, thought, *TALK[2:]])[0]
        probes = replace(probes, opens_thought=OPEN_THOUGHT.search(prompt) is not None, strips_thoughts=stripped)
    except DataError:
        pass
    if template.marks_generation:
        return probes
    from specforge_lite.data.templates.spans import end_tokens, prompt_ends

    return replace(probes, prompt_ends=prompt_ends(template, probes), end_tokens=end_tokens(template, probes))


def _problem_with(template: ChatTemplate, probes: Probes) -> str | None:
    try:
        drawing = talk_drawing(template, probes)
        plain, _ = template.jinja(probes, TALK)
    except DataError as error:
        return str(error)
    if any(drawing.kinds(index) != {kind} for index, kind in enumerate("ococ")):
        return f"{template.what} leaves out turns"
    return None if drawing.text == plain else f"{template.what} changes the text of an answer"


def talk_drawing(template: ChatTemplate, probes: Probes) -> Drawing:
    """Two questions and answers, with marks."""
    return Drawing.of(*template.jinja(probes, [mark_texts(message, index) for index, message in enumerate(TALK)]))
