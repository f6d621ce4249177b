"""The text of an answer, special tokens included -> reasoning, content and tool calls, as servers report them.

Read here are `<think>` and `[THINK]`, gpt-oss's channels, and tool calls as Hermes and Qwen (JSON or XML), Phi-4-mini,
Mistral, DeepSeek and Llama 3 write them. What is left over and holds a special token is refused: as plain text it would
be trained as other tokens than the target's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from specforge_lite.regenerate.turns import RequestFailed

_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
THOUGHT_OPENERS = tuple(opening for opening, _ in _THOUGHTS)
# [to=functions.NAME] <|channel|> CHANNEL [to=functions.NAME] [<|constrain|> json] <|message|> TEXT <|end|>
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?(?P<to>[^<]*)<\|channel\|>(?P<channel>\w+)(?P<header>[^<]*)(?:<\|constrain\|>[^<]*)?"
    r"<\|message\|>(?P<text>.*?)(?:<\|(?:end|call|return)\|>|\Z)",
    re.DOTALL,
)
# What a call (or a list of calls) begins with -> all of it: a group `json`, or `name` and `arguments` (or `xml`).
_CALL_FORMS = {
    "<tool_call>": r"""<tool_call>\s*
        (?:<function=(?P<name>[^>\s]+)>(?P<xml>.*?)</function>|(?P<json>.*?))\s*</tool_call>""",
    "<|tool_call|>": r"<\|tool_call\|>(?P<json>.*?)<\|/tool_call\|>",
    "[TOOL_CALLS]": r"""(?:\[TOOL_CALLS\])?\s*
        (?:(?P<json>\[.*\])|(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>\w+))?(?:\[ARGS\])?(?P<arguments>\{.*?\}))
        (?=\s*(?:\[TOOL_CALLS\]|\Z))""",
    "<｜tool▁calls▁begin｜>": r"""(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?
        (?P<name>[^<\n]+)(?:<｜tool▁sep｜>|\n```json\n)(?P<arguments>.*?)(?:\n```)?<｜tool▁call▁end｜>
        (?:<｜tool▁calls▁end｜>)?""",
    "<|python_tag|>": r"(?:<\|python_tag\|>|;)\s*(?P<json>\{.*?\})(?=\s*(?:;\s*\{|\Z))",
}
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def split_answer(
    text: str, special_tokens: Iterable[str], opened: str = "", has_tools: bool = False, is_cut: bool = False
) -> tuple[str, str, list[dict[str, Any]]]:
    """(reasoning, content, tool calls in OpenAI's form). opened: what the prompt ended with, if that is one of
    THOUGHT_OPENERS; is_cut: a token limit ended the answer. Raises RequestFailed where the form is not known."""
    if "<|channel|>" in text:
        reasoning, content, calls = _split_channels(text, is_cut)
    else:
        reasoning, content = _split_thought(text, opened)
        content, calls = _split_calls(content, has_tools)
    token = next((t for t in special_tokens if t and (t in content or t in reasoning)), None)
    if token is not None:
        raise RequestFailed("answer-form", f"the answer holds {token}, in a form that is not known here: {text[:80]!r}")
    return reasoning, content, calls


def _split_thought(text: str, opened: str) -> tuple[str, str]:
    for opening, closing in _THOUGHTS:
        body = text.lstrip()
        if body.startswith(opening) or closing in text or opened == opening:
            reasoning, _, content = body.removeprefix(opening).partition(closing)
            return reasoning.strip(), content.lstrip()
    return "", text


def _split_channels(text: str, is_cut: bool) -> tuple[str, str, list[dict[str, Any]]]:
    found: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    at = 0
    while match := _CHANNEL.match(text, at):
        at, channel = match.end(), match["channel"]
        recipient = re.search(r"to=(\S+)", f"{match['to']} {match['header']}")
        if recipient is not None and recipient[1].startswith("functions."):
            calls.append(_call(recipient[1].removeprefix("functions."), match["text"]))
        elif recipient is None and channel in ("analysis", "final") and channel not in found:
            found[channel] = match["text"]
        else:
            where = f"{channel} to {recipient[1]}" if recipient else f"{channel} (a second time, or an unknown channel)"
            raise RequestFailed("answer-form", f"channel {where}; expected analysis, final and calls of functions")
    if not at or (("<|message|>" in text[at:] or not is_cut) and text[at:].strip()):
        raise RequestFailed("answer-form", f"not a sequence of channels: {text[at : at + 80]!r}")
    return found.get("analysis", ""), found.get("final", ""), calls


def _split_calls(text: str, has_tools: bool) -> tuple[str, list[dict[str, Any]]]:
    start, form = min(((at, form) for form in _CALL_FORMS if (at := text.find(form)) >= 0), default=(-1, ""))
    if start < 0 and has_tools and re.match(r'\s*\{\s*"name"\s*:', text):  # Llama 3 has no mark
        start, form, text = 0, "<|python_tag|>", "<|python_tag|>" + text
    if start < 0:
        return text, []
    calls: list[dict[str, Any]] = []
    content, rest = text[:start].rstrip(), text[start:].strip()
    while rest:
        match = re.match(_CALL_FORMS[form], rest, re.DOTALL | re.VERBOSE)
        if match is None:
            raise RequestFailed("answer-form", f"not a tool call: {rest[:80]!r}")
        calls += _calls_of(match.groupdict())
        rest = rest[match.end() :].strip()
    return content, calls


def _calls_of(groups: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    if groups.get("xml") is not None:
        yield _call(str(groups["name"]), dict(_PARAMETER.findall(str(groups["xml"]))))
    elif groups.get("json") is None:
        yield _call(str(groups["name"]), str(groups["arguments"]), groups.get("id"))
    else:
        value = _parsed(str(groups["json"]))
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                raise RequestFailed("answer-form", f"a tool call without a name: {str(groups['json'])[:80]!r}")
            yield _call(one["name"], one.get("arguments", one.get("parameters", {})), one.get("id"))


def _call(name: str, arguments: Any, call_id: Any = None) -> dict[str, Any]:
    if isinstance(arguments, str):
        _parsed(arguments)  # kept as the target wrote it, if it is JSON
    else:
        arguments = json.dumps(arguments, ensure_ascii=False)
    extra = {"id": call_id} if isinstance(call_id, str) else {}
    return {**extra, "type": "function", "function": {"name": name.strip(), "arguments": arguments}}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestFailed("answer-form", f"a tool call that is not JSON: {text[:80]!r}") from None
