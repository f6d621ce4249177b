"""Conversation -> the text that a server would have rendered, and which characters of it the target produces.

The target's own Jinja template decides. Where it has `{% generation %}` blocks, those are the spans (transformers
tracks them); otherwise `spans` finds them. Marks are put around the texts of a conversation before it is rendered, and
rendering again without marks must give the same text. Named families are Jinja files with generation
blocks (`assets/chat_templates`), for tokenizers without a usable template and for people who name one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import CONTENT_TOKENS, Rendering, TokenizerSpec
from specforge_lite.data.templates.marks import Drawing, Message, mark_texts
from specforge_lite.data.templates.probes import PROBE_TOOL, Probes, probe

Tools = Sequence[dict[str, Any]]

# Templates that print today's date print this one: a cache must not depend on the day it is built.
FIXED_DATE = date(2025, 8, 5)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """One Jinja template, and what of a conversation its target produces.

    source: Jinja text. variables: what it is rendered with besides messages and tools. control_tokens: tokens that
    separate turns; written by a user they stay ordinary text. has_tools: it has a form for tool calls. added_tokens:
    of the tokenizer, among them those that end a turn. for_tools: it is rendered with tools always. needs: of a family:
    a tokenizer without a template that has all of these tokens is of it.
    """

    name: str
    source: str
    variables: tuple[tuple[str, Any], ...] = ()
    control_tokens: tuple[str, ...] = ()
    has_tools: bool = True
    added_tokens: tuple[str, ...] = ()
    for_tools: bool = False
    needs: tuple[str, ...] = ()

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

    @property
    def marks_generation(self) -> bool:
        """It says itself what the assistant produces."""
        return _GENERATION.search(self.source) is not None

    @property
    def problem(self) -> str | None:
        """Why spans cannot be found in what the template renders; None where they can."""
        return self.probes.problem

    @cached_property
    def probes(self) -> Probes:
        """What short conversations tell about it."""
        return probe(self)

    def render(self, messages: Sequence[Message], tools: Tools = (), train_only_last_turn: bool = False) -> Rendering:
        """Text and trained spans of messages in the normal form.

        Not trained: turns with `weight` 0, the end of a turn whose `finish_reason` is "length", an empty thought.
        Raises DataError where the template refuses the conversation, changes it, or has no form for a part of it.
        """
        if not self.has_tools and any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
            raise DataError(f"{self.what} has no form for tool calls and results")
        drawing = self._drawn(list(messages), tools)
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
        return self.jinja(self.probes, messages, tools)[0]

    def jinja(
        self, probes: Probes, messages: Sequence[Message], tools: Tools = (), prompt: bool = False, **switch: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """What transformers renders (sandboxed: a template is somebody's code), and the generation blocks in it."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        source = _DATE_CALL.sub(lambda match: json.dumps(FIXED_DATE.strftime(match[2])), self.source)
        efforts = [message["reasoning_effort"] for message in messages if "reasoning_effort" in message]
        variables = {**dict(self.variables), **switch, **({"reasoning_effort": efforts[0]} if efforts else {})}
        try:
            result: Any = render_jinja_template(
                [[probes.shape(message) for message in messages]],
                list(tools) or ([PROBE_TOOL] if self.for_tools else None),
                chat_template=source,
                return_assistant_tokens_mask=self.marks_generation,
                add_generation_prompt=prompt,
                **variables,
            )
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise DataError(f"{self.what}, line {error.lineno}: {error.message}") from None
        except (jinja2.exceptions.TemplateError, TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{self.what} refuses this conversation: {error}") from None
        texts, blocks = result
        return texts[0], blocks[0] if blocks else []

    def _drawn(self, messages: list[Message], tools: Tools) -> Drawing:
        """The first form of a conversation that the template takes."""
        forms = [messages]
        if any(is_cut_off(message) or message.get("tool_calls") for message in messages):
            from specforge_lite.data.templates.forms import forms_of

            forms = forms_of(self, messages)
        first_error: DataError | None = None
        for form in forms:
            try:
                return self._draw(form, tools)
            except DataError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _draw(self, messages: list[Message], tools: Tools) -> Drawing:
        """Text, and the span of every answer whether it is trained or not."""
        plain, _ = self.jinja(self.probes, messages, tools)
        for mark_others in (True, False):
            marked = [mark_texts(message, index, mark_others) for index, message in enumerate(messages)]
            drawing = Drawing.of(*self.jinja(self.probes, marked, tools))
            if drawing.text == plain:
                break
        else:
            raise DataError(f"{self.what} changes the text of an answer")
        for index, message in enumerate(messages):
            kinds = drawing.kinds(index)
            if message.get("tool_calls") and "n" not in kinds:
                raise DataError(f"{self.what} has no form for tool calls")
            if message["role"] == "tool" and message["content"].strip() and mark_others and not kinds:
                raise DataError(f"{self.what} has no form for tool results")
            if message["role"] == "assistant" and split_reasoning(message)[1].strip() and not kinds:
                raise DataError(f"{self.what} leaves out turn {index + 1}")
        if not self.marks_generation:
            from specforge_lite.data.templates.spans import find_spans

            drawing = replace(drawing, spans=tuple(find_spans(self, messages, drawing)))
        last, index = messages[-1], len(messages) - 1
        if last["role"] == "assistant" and split_reasoning(last)[0].strip() and "r" not in drawing.kinds(index):
            from specforge_lite.data.templates.spans import with_last_reasoning

            drawing = with_last_reasoning(self, messages, tools, drawing)
        if any(map(is_cut_off, messages)):
            from specforge_lite.data.templates.forms import without_cut_ends

            drawing = without_cut_ends(messages, drawing)
        return drawing


def choose_template(name: str, spec: TokenizerSpec) -> ChatTemplate:
    """The template called `name`. auto: the tokenizer's own where spans can be found in what it renders, else a family
    by its tokens. own: the tokenizer's, or an error. generation: the same, and it must mark what is generated.

    Raises DataError for an unknown name, and where nothing fits.
    """
    if name not in ("auto", "own", "generation"):
        from specforge_lite.data.templates.families import named_template

        named = named_template(name)
        if named is not None:
            return named
        name = "own"
    own = own_template(spec)
    if name == "generation" and (own is None or not own.marks_generation):
        raise DataError("chat_template generation: the tokenizer's template has no {% generation %} block")
    problem = "it has no chat template" if own is None else own.problem
    if own is not None and problem is None:
        return own
    if name != "auto":
        raise DataError(f"chat_template {name}: the tokenizer's own cannot be used: {problem}")
    from specforge_lite.data.templates.families import family_of

    return family_of(spec, str(problem))


def own_template(spec: TokenizerSpec, for_tools: bool = False) -> ChatTemplate | None:
    """The tokenizer's own template (the one for tools, where it has one of its own), None if there is none."""
    source = spec.tool_template if for_tools else spec.chat_template
    if not source:
        return None
    control = tuple(t for t in spec.added_tokens if t in source and t not in CONTENT_TOKENS)
    own = ChatTemplate("own", source, spec.special_tokens, control, True, spec.added_tokens, for_tools)
    return replace(own, name="generation") if own.marks_generation else own


def is_cut_off(message: Message) -> bool:
    """A token limit ended it."""
    return message.get("finish_reason") == "length"


def split_reasoning(message: Message) -> tuple[str, str]:
    """(reasoning, answer) of a message: `reasoning_content`, or what stands before `</think>`."""
    if message.get("reasoning_content"):
        return message["reasoning_content"], message["content"]
    before, closed, after = message["content"].rpartition("</think>")
    return (before.rpartition("<think>")[2], after) if closed else ("", message["content"])
