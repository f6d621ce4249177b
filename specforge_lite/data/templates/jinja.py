"""The tokenizer's own Jinja template, where it marks what the assistant says with `{% generation %}`.

transformers can return a mask for such templates, but it measures every block by joining all blocks before it, looks
tokens up by the character they start at (which loses a token whose leading space is trimmed), and cannot be combined
with its protection against control tokens in user text (`tokenization_utils_base.apply_chat_template`, 5.23). Here the
`generation` tag writes two marks around its block; one pass over the finished text turns them into spans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.templates.base import FIXED_DATE, Canvas, Chat, ChatTemplate, to_json

# Unicode noncharacters, never meant for interchange; `encoding.clean` replaces them in data.
MARK_START, MARK_SPLIT, MARK_END = "\ufdd2", "\ufdd3", "\ufdd4"

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def marks_generation(template: str | None) -> bool:
    """True if a Jinja template says itself what the assistant produces."""
    return bool(template and GENERATION_TAG.search(template))


class _Message(dict[str, Any]):
    """A message that knows its place in the conversation; the sandbox hides underscored names from templates."""

    _index = -1


@dataclass(frozen=True)
class _Renderer:
    source: str
    variables: tuple[tuple[str, str], ...]

    def __call__(self, chat: Chat, canvas: Canvas) -> None:
        """Draw the rendered text. Blocks of messages before `train_from` are not trained; where a template hides
        which message it is at (no variable called `message`), its last block counts as the last message."""
        text = render_source(self.source, chat, dict(self.variables))
        for message in chat.messages:
            names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
            if any(name not in text for name in names):
                raise DataError("the tokenizer's chat template has no form for tool calls")
            if message["role"] == "tool" and message["content"].strip() not in text:
                raise DataError("the tokenizer's chat template has no form for tool results")
        pieces = re.split(f"{MARK_START}(-?[0-9]+){MARK_SPLIT}(.*?){MARK_END}", text, flags=re.DOTALL)
        for at in range(0, len(pieces) - 1, 3):
            before, index, block = pieces[at], int(pieces[at + 1]), pieces[at + 2]
            canvas.add(before)
            is_last = at + 3 == len(pieces) - 1
            canvas.add(block, trained=index >= chat.train_from or (index < 0 and is_last))
        canvas.add(pieces[-1])


def without_marks(text: str) -> str:
    """Rendered text without the marks of generation blocks."""
    return re.sub(f"{MARK_START}-?[0-9]+{MARK_SPLIT}|{MARK_END}", "", text)


def generation_template(source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """A `ChatTemplate` that renders the tokenizer's own Jinja `source`; `special_tokens` such as `bos_token` are
    its variables. Rendering raises DataError with the template's own complaint."""
    return ChatTemplate("generation", _Renderer(source, tuple(sorted(special_tokens.items()))), ())


_COMPILED: dict[str, Any] = {}


def render_source(source: str, chat: Chat, variables: Mapping[str, str], prompt: bool = False) -> str:
    """Render Jinja `source`, with marks around generation blocks; `prompt`: up to where the assistant goes on.
    Sandboxed: a template is somebody's code."""
    import jinja2

    try:
        if source not in _COMPILED:
            _COMPILED[source] = _environment().from_string(source)
        messages = [_Message({k: v for k, v in message.items() if v is not None}) for message in chat.messages]
        for index, message in enumerate(messages):
            message._index = index
        tools = list(chat.tools) or None
        rendered = _COMPILED[source].render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **variables
        )
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise DataError(f"the tokenizer's chat template, line {error.lineno}: {error.message}") from None
    except (jinja2.exceptions.TemplateError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"the tokenizer's chat template refuses this conversation: {error}") from None
    return str(rendered)


def _environment() -> Any:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` writes its block between the two marks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            message = jinja2.nodes.Name("message", "load")
            return jinja2.nodes.CallBlock(self.call_method("_mark", [message]), [], [], body).set_lineno(line)

        def _mark(self, message: Any, caller: Any) -> str:
            index = message._index if isinstance(message, _Message) else -1
            return f"{MARK_START}{index}{MARK_SPLIT}{caller()}{MARK_END}"

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: to_json(value, indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment
