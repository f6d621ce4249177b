"""Which template a tokenizer wants: its own where that marks generation, else a family it is recognised by."""

from __future__ import annotations

from collections.abc import Mapping

from specforge_lite.data.templates import TEMPLATES
from specforge_lite.data.templates.base import ChatTemplate
from specforge_lite.data.templates.jinja import generation_template, marks_generation
from specforge_lite.errors import DataError, suggest


def choose_template(
    name: str, own_template: str | None, special_tokens: Mapping[str, str], vocabulary: Mapping[str, int]
) -> ChatTemplate:
    """The template called `name`; `auto` decides from the tokenizer's own Jinja template and its added tokens.

    Raises DataError for an unknown name, or when `auto` recognises nothing.
    """
    if name == "auto":
        return recognise(own_template, special_tokens, vocabulary)
    if name == "generation":
        if not marks_generation(own_template):
            raise DataError("chat template 'generation': the tokenizer's template has no {% generation %} block")
        return generation_template(own_template or "", special_tokens)
    if name not in TEMPLATES:
        hint = suggest(name, ["auto", "generation", *TEMPLATES])
        known = f"; known: auto, generation, {', '.join(TEMPLATES)}"
        raise DataError(f"chat_template: unknown template '{name}'{hint if hint.startswith('; did') else ''}{known}")
    return TEMPLATES[name]


def recognise(
    own_template: str | None, special_tokens: Mapping[str, str], vocabulary: Mapping[str, int]
) -> ChatTemplate:
    """The most specific family whose marks are all in the tokenizer's template; without one, by its added tokens."""
    if own_template and marks_generation(own_template):
        return generation_template(own_template, special_tokens)
    best: tuple[int, ChatTemplate] | None = None
    for template in TEMPLATES.values():
        if any(token not in vocabulary for token in template.needs_tokens):
            continue
        if own_template:
            weight = max(
                (sum(map(len, marks)) for marks in template.marks if all(mark in own_template for mark in marks)),
                default=0,
            )
        else:
            weight = len(template.needs_tokens)
        if weight and (best is None or weight > best[0]):
            best = (weight, template)
    if best is None:
        what = "its chat template is of no known family" if own_template else "it has no chat template"
        raise DataError(
            f"chat_template auto: the tokenizer is not recognised ({what});"
            f" give --chat-template, one of: {', '.join(TEMPLATES)}"
        )
    return best[1]
