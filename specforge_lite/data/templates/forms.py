"""Conversations that a template may take in another form only: answers that were cut off, tool calls without ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specforge_lite.data.templates.marks import Drawing, Message
from specforge_lite.data.templates.rendering import ChatTemplate, is_cut_off


def forms_of(template: ChatTemplate, messages: list[Message]) -> list[list[Message]]:
    """A thought that was cut off as reasoning, then as it is; each without and with ids for the tool calls that have
    none (Mistral's refuse those)."""
    last, forms = messages[-1], [messages]
    if last["role"] == "assistant" and is_cut_off(last) and not last.get("reasoning_content"):
        _, opened, thought = last["content"].rpartition("<think>")
        if "</think>" not in last["content"] and (opened or template.probes.opens_thought):
            forms.insert(0, [*messages[:-1], {**last, "content": "", "reasoning_content": thought.lstrip("\n")}])
    if any("id" not in call for message in messages for call in message.get("tool_calls") or ()):
        forms = [with_ids for form in forms for with_ids in (form, _with_call_ids(form))]
    return forms


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


def shape_calls(calls: list[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments in the form that a template takes, "object" or "text", where they have it."""

    def shaped(arguments: Any) -> Any:
        is_text = isinstance(arguments, str)
        if form == "text":
            return arguments if is_text else json.dumps(arguments, ensure_ascii=False)
        try:
            parsed = json.loads(arguments) if is_text else arguments
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments

    functions = [{**call["function"], "arguments": shaped(call["function"]["arguments"])} for call in calls]
    return [{**call, "function": function} for call, function in zip(calls, functions)]


def without_cut_ends(messages: Sequence[Message], drawing: Drawing) -> Drawing:
    """An answer that was cut off by a token limit ends with the last text that the target produced."""
    spans = []
    for index, start, end in drawing.spans:
        if 0 <= index < len(messages) and is_cut_off(messages[index]):
            end = min(end, max(drawing.places(index), default=start))
        spans.append((index, start, end))
    text, last = drawing.text, len(messages) - 1
    if is_cut_off(messages[last]) and spans and spans[-1][0] == last:
        text = text[: spans[-1][2]]
    return replace(drawing, text=text, spans=tuple(spans))
