"""Conversation -> the text that a server would have rendered, and which characters of it the target produces.

The target's own Jinja template decides. Where it has `{% generation %}` blocks, those are the spans (transformers
tracks them). Otherwise marks are put around the texts of a conversation before it is rendered:

    <|im_start|>assistant\\n<think>\\n|why|\\n</think>\\n\\n|because|<|im_end|>\\n        | a mark
    prompt                  ^---------- what the target produces -------^

A span starts where the generation prompt ends and ends with the end-of-turn token; both are learned from short probe
conversations. Rendering again without marks must give the same text. Named families are Jinja files with generation
blocks (`assets/chat_templates`), for tokenizers without a usable template and for people who name one.
"""

from __future__ import annotations

import hashlib
import json
import os.path
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import accumulate, count
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import CONTENT_TOKENS, Rendering

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
_EMPTY_THOUGHT = re.compile(r"\s*<([\w:]*think\w*)>\s*</\1>\s*|\s*</think>\s*")
_OPEN_THOUGHT = re.compile(r"<think>\s*$")
# How templates name the switch that opens or closes a thought in the prompt; {}: what a server does by default.
_SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": True, "thinking": True},
    {"enable_thinking": False, "thinking": False},
)


def marks_generation(source: str) -> bool:
    """True if a Jinja template says itself what the assistant produces."""
    return _GENERATION.search(source) is not None


@dataclass(frozen=True)
class ChatTemplate:
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

    def render(self, messages: Sequence[Message], tools: Tools = (), train_only_last_turn: bool = False) -> Rendering:
        """Text and trained spans of messages in the normal form.

        Not trained: turns with `weight` 0, the end of a turn whose `finish_reason` is "length", an empty thought.
        Raises DataError where the template refuses the conversation, changes it, or has no form for a part of it.
        """
        if not self.has_tools and any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
            raise DataError(f"{self.what} has no form for tool calls and results")
        first_error: DataError | None = None
        for form in self._forms(list(messages)):
            try:
                drawing = self._draw(form, tools)
                break
            except DataError as error:
                first_error = first_error or error
        else:
            assert first_error is not None
            raise first_error
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = set(answers[-1:] if train_only_last_turn else answers)
        wanted -= {i for i in wanted if messages[i].get("weight") == 0}
        spans: list[tuple[int, int]] = []
        for index, start, end in sorted(drawing.spans, key=lambda span: span[1]):
            if index not in wanted or start >= end:
                continue
            if spans and spans[-1][1] >= start:
                start = spans.pop()[0]
            spans.append((start, end))
        return Rendering(drawing.text, tuple(spans), drawing.lost_reasoning)

    def render_plain(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Text alone, without marks and checks: what a server shows its model. Raises DataError."""
        return self._jinja([self._probes.shape(message) for message in messages], tools)[0]

    @property
    def problem(self) -> str | None:
        """Why spans cannot be found in what the template renders; None where they can."""
        return self._probes.problem

    def _forms(self, messages: list[Message]) -> Iterator[list[Message]]:
        """Forms of the conversation, best first: a thought that was cut off as reasoning, then as it is; each without
        and with ids for the tool calls that have none (Mistral's templates refuse those)."""
        last, forms = messages[-1], [messages]
        if last["role"] == "assistant" and _is_cut_off(last) and not last.get("reasoning_content"):
            _, opened, thought = last["content"].rpartition("<think>")
            if "</think>" not in last["content"] and (opened or self._probes.opens_thought):
                forms.insert(0, [*messages[:-1], {**last, "content": "", "reasoning_content": thought.lstrip("\n")}])
        for form in forms:
            yield form
            if any("id" not in call for message in form for call in message.get("tool_calls") or ()):
                yield _with_call_ids(form)

    def _draw(self, messages: list[Message], tools: Tools) -> _Drawing:
        """Text, and the span of every answer whether it is trained or not."""
        shaped = [self._probes.shape(message) for message in messages]
        plain, _ = self._jinja(shaped, tools)
        for mark_others in (True, False):
            marked = [_marked(message, index, mark_others) for index, message in enumerate(shaped)]
            drawing = _Drawing.of(*self._jinja(marked, tools))
            if drawing.text == plain:
                break
        else:
            raise DataError(f"{self.what} changes the text of an answer")
        self._check_complete(messages, drawing, mark_others)
        if not marks_generation(self.source):
            drawing = replace(drawing, spans=tuple(self._find_spans(messages, drawing)))
        last, index = messages[-1], len(messages) - 1
        if last["role"] == "assistant" and _split_reasoning(last)[0].strip() and "r" not in drawing.kinds(index):
            drawing = self._with_reasoning(messages, tools, drawing)
            if drawing.lost_reasoning and not last["content"].strip() and not last.get("tool_calls"):
                raise DataError(f"{self.what} has no form for reasoning without an answer")
        return _without_cut_ends(messages, drawing)

    def _check_complete(self, messages: list[Message], drawing: _Drawing, others_marked: bool) -> None:
        for index, message in enumerate(messages):
            kinds, content = drawing.kinds(index), message["content"].strip()
            if message.get("tool_calls") and "n" not in kinds:
                raise DataError(f"{self.what} has no form for tool calls")
            if message["role"] == "tool" and content and others_marked and not kinds:
                raise DataError(f"{self.what} has no form for tool results")
            if message["role"] == "assistant" and _split_reasoning(message)[1].strip() and not kinds:
                raise DataError(f"{self.what} leaves out turn {index + 1}")

    def _find_spans(self, messages: list[Message], drawing: _Drawing) -> Iterator[tuple[int, int, int]]:
        """(message, start, end) of every answer, from marks, generation prompts and end tokens."""
        text, probes, previous = drawing.text, self._probes, 0
        for index, message in enumerate(messages):
            own = [position for position, i, _ in drawing.marks if i == index]
            if not own:
                continue
            first, last = own[0], own[-1]
            if message["role"] != "assistant":
                previous = last
                continue
            gap = text[previous:first]
            ends = [gap.rfind(prompt) + len(prompt) for prompt in probes.prompt_ends if prompt in gap]
            start = previous + max(ends, default=len(gap))
            empty = _EMPTY_THOUGHT.match(text, start, first)
            if empty is not None and "r" not in drawing.kinds(index):
                start = empty.end()
            limit = min((position for position, i, _ in drawing.marks if i > index), default=len(text))
            found = [(text.find(token, last, limit), len(token)) for token in probes.end_tokens]
            at, length = min((pair for pair in found if pair[0] >= 0), default=(last, 0))
            if not length and message.get("tool_calls"):
                raise DataError(f"{self.what} ends a tool call with no token that is known as an end")
            previous = at + length
            yield index, start, previous

    def _with_reasoning(self, messages: list[Message], tools: Tools, drawing: _Drawing) -> _Drawing:
        """The reasoning of the last answer, which the template strips from its history: prompt, thought, answer, as
        the target produced it. `lost_reasoning` where the prompt of that turn opens no thought."""
        lost, last = replace(drawing, lost_reasoning=True), len(messages) - 1
        thought = _split_reasoning(messages[last])[0].strip("\n")
        own = [span for span in drawing.spans if span[0] == last]
        if messages[last - 1]["role"] == "tool" or marks_generation(self.source):
            return lost
        shaped = [self._probes.shape(message) for message in messages[:last]]
        prompts = [self._jinja(shaped, tools, True, **switch)[0] for switch in _SWITCHES[:2]]
        prompt = next((text for text in prompts if _OPEN_THOUGHT.search(text)), prompts[0])
        opened = _OPEN_THOUGHT.search(prompt)
        if opened is None and not self._probes.strips_thoughts:
            return lost
        breaks = opened is None or opened[0].endswith("\n")  # DeepSeek V3.1 thinks without line ends around
        head = f"{prompt}{'' if opened else '<think>' + chr(10)}{thought}"
        close = "\n</think>\n\n" if breaks else "</think>"
        start = own[0][1] if own else len(drawing.text)
        kept = [span for span in drawing.spans if span[0] != last]
        if any(prompt[:end] != drawing.text[:end] for _, _, end in kept):
            return lost
        answer = drawing.text[start:].lstrip("\n")
        shift = len(head + close) + len(answer) - len(drawing.text)
        marks = [m for m in drawing.marks if m[1] != last] + [(len(head), last, "r")]
        marks += [(position + shift, i, kind) for position, i, kind in drawing.marks if i == last]
        end = own[-1][2] + shift if own else len(head)
        return _Drawing(head + close + answer, tuple(marks), (*kept, (last, len(prompt), end)))

    def _jinja(
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

    @cached_property
    def _probes(self) -> _Probes:
        return _probe(self)


@dataclass(frozen=True)
class _Drawing:
    """A rendered conversation. marks: (position, message, kind), ascending. spans: (message, start, end) of what the
    target produces. lost_reasoning: the template has no place for reasoning that the last answer has."""

    text: str
    marks: tuple[tuple[int, int, str], ...]
    spans: tuple[tuple[int, int, int], ...]
    lost_reasoning: bool = False

    @classmethod
    def of(cls, marked: str, blocks: list[tuple[int, int]]) -> _Drawing:
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


def _without_cut_ends(messages: Sequence[Message], drawing: _Drawing) -> _Drawing:
    """An answer that was cut off by a token limit ends with the last text that the target produced."""
    spans = []
    for index, start, end in drawing.spans:
        if 0 <= index < len(messages) and _is_cut_off(messages[index]):
            end = min(end, max((position for position, i, _ in drawing.marks if i == index), default=start))
        spans.append((index, start, end))
    text, last = drawing.text, len(messages) - 1
    if _is_cut_off(messages[last]) and spans and spans[-1][0] == last:
        text = text[: spans[-1][2]]
    return replace(drawing, text=text, spans=tuple(spans))


def _is_cut_off(message: Message) -> bool:
    return message.get("finish_reason") == "length"


def _split_reasoning(message: Message) -> tuple[str, str]:
    """(reasoning, answer) of a message: `reasoning_content`, or what stands before `</think>`."""
    if message.get("reasoning_content"):
        return message["reasoning_content"], message["content"]
    before, closed, after = message["content"].rpartition("</think>")
    return (before.rpartition("<think>")[2], after) if closed else ("", message["content"])


def _with_call_ids(messages: list[Message]) -> list[Message]:
    """Tool calls numbered with ids of nine digits, and their results with the id of the call they answer."""
    result, waiting, number = [], [], 0
    for message in messages:
        if message.get("tool_calls"):
            calls = [{"id": f"{number + i:09d}", **call} for i, call in enumerate(message["tool_calls"])]
            message, waiting = {**message, "tool_calls": calls}, [call["id"] for call in calls]
            number += len(calls)
        elif message["role"] == "tool" and waiting:
            message = {"tool_call_id": waiting.pop(0), **message}
        result.append(message)
    return result


def _marked(message: Message, index: int, mark_others: bool = True) -> Message:
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


# -------------------------------------------------------------------------------------------------------------- probes


@dataclass(frozen=True)
class _Probes:
    """What short conversations tell about a template.

    problem: why it cannot be used, None where it can. prompt_ends: texts that may stand between a question and what
    the target produces. end_tokens: what ends a turn. opens_thought: a server's prompt ends with `<think>`.
    strips_thoughts: `<think>...</think>` in an answer is left out. content_parts: content as a list of parts.
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
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look up.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "Where"}}},
    },
}


def _call(arguments: Any) -> Message:
    call = {"id": "probe0001", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_RESULT: Message = {"role": "tool", "content": "blue", "tool_call_id": "probe0001", "name": "look"}


def _probe(template: ChatTemplate) -> _Probes:
    probes = _Probes(None)
    problem = _problem_with(template, probes)
    if problem is not None:
        in_parts = replace(probes, content_parts=True)
        if _problem_with(template, in_parts) is not None:
            return _Probes(problem)
        probes = in_parts
    forms = {}
    for form, arguments in (("object", {"at": "Rome"}), ("text", '{"at": "Rome"}')):
        try:
            shaped = [probes.shape(message) for message in (_TALK[0], _call(arguments))]
            forms[form] = template._jinja(shaped, [PROBE_TOOL])[0]
        except DataError:
            continue
    if len(set(forms.values())) != 1 or len(forms) != 2:
        probes = replace(probes, arguments=next(iter(forms), "as-is"))
    try:
        prompt, _ = template._jinja([probes.shape(_TALK[0])], (), True)
        thought = {**_TALK[1], "content": "<think>\nGamma\n</think>\n\nAlpha."}
        stripped = "Gamma" not in template._jinja([probes.shape(_TALK[0]), probes.shape(thought)], ())[0]
        probes = replace(probes, opens_thought=_OPEN_THOUGHT.search(prompt) is not None, strips_thoughts=stripped)
    except DataError:
        pass
    if marks_generation(template.source):
        return probes
    return replace(probes, prompt_ends=_prompt_ends(template, probes), end_tokens=_end_tokens(template, probes))


def _problem_with(template: ChatTemplate, probes: _Probes) -> str | None:
    try:
        drawing = _render_marked(template, probes, _TALK)
        plain, _ = template._jinja([probes.shape(message) for message in _TALK], ())
    except DataError as error:
        return str(error)
    if any(drawing.kinds(index) != {kind} for index, kind in enumerate("ococ")):
        return f"{template.what} leaves out turns"
    return None if drawing.text == plain else f"{template.what} changes the text of an answer"


def _render_marked(template: ChatTemplate, probes: _Probes, messages: Sequence[Message], tools: Tools = ()) -> _Drawing:
    marked = [_marked(probes.shape(message), index) for index, message in enumerate(messages)]
    return _Drawing.of(*template._jinja(marked, tools))


def _prompt_ends(template: ChatTemplate, probes: _Probes) -> tuple[str, ...]:
    """What stands after a question or a tool result in prompts, with thinking on and off, from the last added token
    on; and the part of it that earlier answers share (their header, without the thought that the prompt opens)."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for messages, tools in (([_TALK[0]], []), ([_TALK[0], _call({"at": "Rome"}), _RESULT], [PROBE_TOOL])):
        text = messages[-1]["content"]
        for switch in _SWITCHES[: 3 if "thinking" in template.source else 1]:
            try:
                prompt, _ = template._jinja([probes.shape(message) for message in messages], tools, True, **switch)
            except DataError:
                continue
            if text in prompt:
                found[not tools].add(prompt[prompt.rfind(text) + len(text) :])
    drawing = _render_marked(template, probes, _TALK)
    question = _TALK[0]["content"]
    first_answer = next(position for position, index, _ in drawing.marks if index == 1)
    gap = drawing.text[:first_answer].rpartition(question)[2]
    close = template._jinja([probes.shape(_TALK[0])], ())[0].rpartition(question)[2]
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


def _end_tokens(template: ChatTemplate, probes: _Probes) -> tuple[str, ...]:
    """What ends a turn: the tokenizer's end of text where that follows an answer in the middle of a conversation, else
    the first added token there; likewise for the last answer, and for a tool call (gpt-oss has a token for each)."""
    pattern, eos = _any_of(template.added_tokens), dict(template.variables).get("eos_token") or ""
    drawing = _render_marked(template, probes, _TALK)
    last_marks = [max(p for p, i, _ in drawing.marks if i == index) for index in (1, 3)]
    ends = {eos}
    tails = [drawing.text[last_marks[0] : drawing.text.rfind(_TALK[2]["content"])], drawing.text[last_marks[1] :]]
    for tail in tails:
        if not any(end and end in tail for end in ends):
            ends |= set(pattern.findall(tail)[:1])
    call = _call({"at": "Rome"})
    for messages, place in (([_TALK[0], call], -1), ([_TALK[0], call, _RESULT, _TALK[1]], 0)):
        try:
            text, _ = template._jinja([probes.shape(message) for message in messages], [PROBE_TOOL])
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
