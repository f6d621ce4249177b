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

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import Rendering
from specforge_lite.data.templates.jinja import Drawing, JinjaTemplate, Message, Tools, mark_texts, marks_generation
from specforge_lite.data.templates.probes import OPEN_THOUGHT, SWITCHES, Probes, probe

_EMPTY_THOUGHT = re.compile(r"\s*<([\w:]*think\w*)>\s*</\1>\s*|\s*</think>\s*")


class ChatTemplate(JinjaTemplate):
    """A template that knows what of a conversation its target produces."""

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
        return self.jinja([self._probes.shape(message) for message in messages], tools)[0]

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

    def _draw(self, messages: list[Message], tools: Tools) -> Drawing:
        """Text, and the span of every answer whether it is trained or not."""
        shaped = [self._probes.shape(message) for message in messages]
        plain, _ = self.jinja(shaped, tools)
        for mark_others in (True, False):
            marked = [mark_texts(message, index, mark_others) for index, message in enumerate(shaped)]
            drawing = Drawing.of(*self.jinja(marked, tools))
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

    def _check_complete(self, messages: list[Message], drawing: Drawing, others_marked: bool) -> None:
        for index, message in enumerate(messages):
            kinds, content = drawing.kinds(index), message["content"].strip()
            if message.get("tool_calls") and "n" not in kinds:
                raise DataError(f"{self.what} has no form for tool calls")
            if message["role"] == "tool" and content and others_marked and not kinds:
                raise DataError(f"{self.what} has no form for tool results")
            if message["role"] == "assistant" and _split_reasoning(message)[1].strip() and not kinds:
                raise DataError(f"{self.what} leaves out turn {index + 1}")

    def _find_spans(self, messages: list[Message], drawing: Drawing) -> Iterator[tuple[int, int, int]]:
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

    def _with_reasoning(self, messages: list[Message], tools: Tools, drawing: Drawing) -> Drawing:
        """The reasoning of the last answer, which the template strips from its history: prompt, thought, answer, as
        the target produced it. `lost_reasoning` where the prompt of that turn opens no thought."""
        lost, last = replace(drawing, lost_reasoning=True), len(messages) - 1
        thought = _split_reasoning(messages[last])[0].strip("\n")
        own = [span for span in drawing.spans if span[0] == last]
        if messages[last - 1]["role"] == "tool" or marks_generation(self.source):
            return lost
        shaped = [self._probes.shape(message) for message in messages[:last]]
        prompts = [self.jinja(shaped, tools, True, **switch)[0] for switch in SWITCHES[:2]]
        prompt = next((text for text in prompts if OPEN_THOUGHT.search(text)), prompts[0])
        opened = OPEN_THOUGHT.search(prompt)
        before = max((position for position, index, _ in drawing.marks if index < last), default=0)
        header = drawing.text[before : own[0][1] if own else len(drawing.text)]
        thinks = self._probes.strips_thoughts or any("think>" in text for text in (header, *self._probes.prompt_ends))
        if opened is None and not thinks:
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
        return Drawing(head + close + answer, tuple(marks), (*kept, (last, len(prompt), end)))

    @cached_property
    def _probes(self) -> Probes:
        return probe(self)


def _without_cut_ends(messages: Sequence[Message], drawing: Drawing) -> Drawing:
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
