"""Chat templates by name, for tokenizers without a usable one of their own and for people who name one.

A new family is one Jinja file with generation blocks in `assets/chat_templates` and an entry of `families.yaml` beside
it; a test fails until it has a golden.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from specforge_lite.core.errors import DataError, suggest
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.templates.marks import Message
from specforge_lite.data.templates.probes import PROBE_TOOL
from specforge_lite.data.templates.rendering import ChatTemplate, own_template

_DIRECTORY = resources.files("specforge_lite.assets") / "chat_templates"


def _family(
    name: str,
    control: list[str],
    file: str = "",
    needs: list[str] | None = None,
    tools: bool = True,
    variables: dict[str, Any] | None = None,
) -> ChatTemplate:
    source = (_DIRECTORY / f"{file or name}.jinja").read_text("utf-8")
    parameters = tuple((variables or {}).items())
    return ChatTemplate(name, source, parameters, tuple(control), tools, needs=tuple(needs or control))


_known = yaml.safe_load((_DIRECTORY / "families.yaml").read_text("utf-8"))
TEMPLATES: dict[str, ChatTemplate] = {name: _family(name, **facts) for name, facts in _known["families"].items()}
ALIASES: dict[str, str] = _known["aliases"]


def named_template(name: str) -> ChatTemplate | None:
    """The family of that name, or of which it is an alias; None for another name of the tokenizer's own template.
    Raises DataError for an unknown name."""
    name = ALIASES.get(name, name)
    if name in TEMPLATES or name == "own":
        return TEMPLATES.get(name)
    hint = suggest(name, ["auto", "own", "generation", *TEMPLATES, *ALIASES])
    known = f"; known: auto, own, generation, {', '.join(TEMPLATES)}"
    raise DataError(f"chat_template: unknown template '{name}'{hint if hint.startswith('; did') else ''}{known}")


def family_of(spec: TokenizerSpec, problem: str) -> ChatTemplate:
    """The family whose tokens are in the vocabulary and, where the tokenizer has a template, that renders the same."""
    weights = {t.name: len({*t.needs} - {"<s>", "</s>"}) for t in TEMPLATES.values()}  # these two say nothing
    fitting = [t for t in TEMPLATES.values() if weights[t.name] and all(n in spec.vocabulary for n in t.needs)]
    if not fitting:
        raise DataError(
            f"chat_template auto: the tokenizer is not recognised ({problem}); give --chat-template, one of:"
            f" {', '.join(TEMPLATES)}"
        )
    best = [t for t in fitting if weights[t.name] == max(weights[t.name] for t in fitting)]
    names = [template.name for template in best]
    if spec.chat_template:
        special = dict(spec.special_tokens)
        return next((t for t in best if difference_from_own(t, spec.chat_template, special) is None), best[0])
    if len(names) > 1 and "chatml" not in names:
        raise DataError(
            f"chat_template auto: the tokenizer has no chat template, and its tokens fit {', '.join(names)};"
            " give one of them as --chat-template"
        )
    return best[0]


_PLAIN: list[Message] = [
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Second answer."},
]
_CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "Rome"}}}
_CALLS: list[Message] = [
    _PLAIN[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "blue", "tool_call_id": "call00001", "name": "look"},
    _PLAIN[1],
]
_SYSTEM: Message = {"role": "system", "content": "Be brief."}


def difference_from_own(
    template: ChatTemplate, own_source: str | None, special_tokens: Mapping[str, str]
) -> str | None:
    """What the family `template` renders otherwise than the tokenizer's own Jinja text: the first difference with a
    system prompt, without one, and in tool calls. None: no difference, or nothing to compare with."""
    if not own_source or template.name not in TEMPLATES:
        return None
    own = ChatTemplate("own", own_source, tuple(special_tokens.items()))
    probes = {
        "with a system prompt": ([_SYSTEM, *_PLAIN], []),
        "without a system prompt": (_PLAIN, []),
        "with tool calls": ([_SYSTEM, *_CALLS], [PROBE_TOOL]),
    }
    for name, (messages, tools) in probes.items():
        try:
            theirs = own.render_plain(messages, tools)
        except DataError:  # a template may refuse system prompts or tools
            continue
        if tools and not ("look" in theirs and "Rome" in theirs):  # or leave tool calls out
            continue
        try:
            ours = template.render(messages, tools).text.rstrip()
        except DataError as error:
            return f"{name}: {error}"
        if not theirs.startswith(ours):  # some own templates end with an end-of-text token that nobody generates
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            here, there = ours[at : at + 40], theirs[at : at + 40]
            return f"{name}, at character {at}: {here!r} here, {there!r} in the tokenizer's own"
    return None


def template_warning(template: ChatTemplate, spec: TokenizerSpec) -> str | None:
    """One line where training would see other text than a server renders, with the remedy; None where it would not."""
    difference = difference_from_own(template, spec.chat_template, dict(spec.special_tokens))
    if difference is None:
        return None
    own = own_template(spec)
    problem = own.problem if own is not None else None
    remedy = f"that cannot be used: {problem}" if problem else "--chat-template auto takes the tokenizer's own"
    return f"chat template '{template.name}' renders other text than the tokenizer's own ({difference}); {remedy}"
