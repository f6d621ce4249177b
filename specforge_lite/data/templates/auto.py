"""Which template a tokenizer wants: its own where that marks generation, else a family it is recognised by."""

from __future__ import annotations

from collections.abc import Mapping

from specforge_lite.core.errors import DataError, suggest
from specforge_lite.data.templates import TEMPLATES
from specforge_lite.data.templates.base import Chat, ChatTemplate, Message
from specforge_lite.data.templates.jinja import generation_template, marks_generation, render_source, without_marks


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
    """The family whose marks are in the tokenizer's own template; without one, whose tokens are in its vocabulary.

    Of several, the first that draws exactly what the own template does, most marks first; where none does, the one
    with most marks (`difference_from_own` then has something to tell).
    """
    if own_template and marks_generation(own_template):
        return generation_template(own_template, special_tokens)
    candidates = [
        (weight, template)
        for template in TEMPLATES.values()
        if all(token in vocabulary for token in template.needs_tokens)
        and (weight := _weight(template, own_template)) > 0
    ]
    candidates.sort(key=lambda pair: -pair[0])
    if not candidates:
        what = "its chat template is of no known family" if own_template else "it has no chat template"
        raise DataError(
            f"chat_template auto: the tokenizer is not recognised ({what});"
            f" give --chat-template, one of: {', '.join(TEMPLATES)}"
        )
    tied = [template.name for weight, template in candidates if weight == candidates[0][0]]
    if own_template is None and len(tied) > 1 and "chatml" not in tied:
        raise DataError(
            f"chat_template auto: the tokenizer has no chat template, and its tokens fit {', '.join(tied)};"
            " give one of them as --chat-template"
        )
    exact = [pair for pair in candidates if difference_from_own(pair[1], own_template, special_tokens) is None]
    return (exact or candidates)[0][1]


_COMMON_TOKENS = {"<s>", "</s>", "<bos>", "<eos>"}  # say nothing about a family


def _weight(template: ChatTemplate, own_template: str | None) -> int:
    if own_template is None:
        return len(set(template.needs_tokens) - _COMMON_TOKENS)
    found = [marks for marks in template.marks if all(mark in own_template for mark in marks)]
    return max((sum(map(len, marks)) for marks in found), default=0)


_PROBES: dict[str, list[Message]] = {
    "with a system prompt": [{"role": "system", "content": "Be brief."}],
    "without a system prompt": [],
}


def difference_from_own(
    template: ChatTemplate, own_template: str | None, special_tokens: Mapping[str, str]
) -> str | None:
    """Compare the prompt that `template` draws for a two-turn chat with what the tokenizer's own Jinja template gives.

    Returns a description of the first difference, None if there is none or nothing to compare with.
    """
    if not own_template or template.name not in TEMPLATES:
        return None
    turns: list[Message] = [
        {"role": "user", "content": "First question?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Second question?"},
    ]
    variables = {**special_tokens, "date_string": "26 Jul 2024"}  # Llama 3.2 asks for today's date without it
    for name, system in _PROBES.items():
        answered = [*system, *turns, {"role": "assistant", "content": "Second answer."}]
        rendering = template.render(Chat(answered))
        ours = rendering.text[: rendering.spans[-1][0]]
        try:
            own = without_marks(render_source(own_template, Chat([*system, *turns]), variables, prompt=True))
        except DataError:  # a template may refuse system prompts
            continue
        # Reasoning models open or close a thought in the prompt; which one is the user's choice of template.
        own = own.removesuffix("<think>\n").removesuffix("<think>")
        ours = ours.removesuffix("<think>\n\n</think>\n\n")
        if ours.removesuffix("</think>").rstrip() != own.removesuffix("</think>").rstrip():
            at = next((i for i, (a, b) in enumerate(zip(ours, own)) if a != b), min(len(ours), len(own)))
            return (
                f"{name}, at character {at}: {ours[at : at + 40]!r} here, {own[at : at + 40]!r} in the tokenizer's own"
            )
    return None
