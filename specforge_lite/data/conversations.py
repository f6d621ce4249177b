"""A row of any form people have -> the normal form `{"id", "conversations": [{"role", "content"}], "tools"?}`.

`forms` recognises a row's form by content. Tool calls, tool results, reasoning, system prompts, `weight: 0` (a turn
that is shown, not trained) and `finish_reason: "length"` (an answer that a token limit cut off) are kept. What cannot
be read is refused with a reason that can be counted.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import clean, map_strings
from specforge_lite.types import Conversation

ID_KEYS = ("id", "conversation_id", "prompt_id", "question_id", "uuid", "seq_id", "task_id")
# What a row in the normal form may have besides turns; the last four are a recorder's.
PLAIN_KEYS = {"id", "conversations", "finish_reason", "model", "sampling", "recorded_at"}
CUT_OFF = ("length", "max_tokens")  # finish reasons of an answer that a token limit cut off


class RowRejected(DataError):
    """A row that cannot be used; `reason` is the short name it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(one_line(detail))
        self.reason = reason


def one_line(text: str, limit: int = 300) -> str:
    """Text that may quote data, as one printable line."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return shown if len(text) <= limit else shown[:limit] + "..."


def to_conversation(row: Any) -> Conversation:
    """Recognise and normalise one row. Raises RowRejected."""
    expect(row, dict, "not-an-object", "expected a JSON object per row")
    try:
        if is_plain_row(row):
            messages, tools = [map_strings(turn, clean_text) for turn in row["conversations"]], None
        else:
            from specforge_lite.data.forms import check_messages, messages_of, tools_of

            messages = check_messages(messages_of(row))
            tools = map_strings(tools_of(row.get("tools")), clean_text)
    except RecursionError:
        raise RowRejected("nested-too-deeply", "more levels of nesting than a row can have") from None
    if row.get("finish_reason") in CUT_OFF and messages[-1]["role"] == "assistant":
        messages[-1]["finish_reason"] = "length"
    return Conversation(_id_of(row, messages, tools), messages, tools)


def is_plain_row(row: Any) -> bool:
    """True for a row in the normal form with nothing but texts, user and assistant in turn, after a system prompt or
    none; `forms` reads all others, and mends them."""
    turns = row.get("conversations") if isinstance(row, dict) and row.keys() <= PLAIN_KEYS else None
    if not isinstance(turns, list) or not all(map(_is_text, turns)):
        return False
    roles = [turn["role"] for turn in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    return bool(talk) and talk == [("user", "assistant")[i % 2] for i in range(len(talk))]


def _is_text(turn: Any) -> bool:
    plain = isinstance(turn, dict) and turn.keys() == {"role", "content"} and isinstance(turn["content"], str)
    return plain and bool(turn["content"].strip())


def to_row(conversation: Conversation) -> dict[str, Any]:
    """The normal form of a conversation, ready for `json.dumps`."""
    row: dict[str, Any] = {"id": conversation.id, "conversations": conversation.messages}
    return {**row, "tools": conversation.tools} if conversation.tools else row


def is_fim_row(row: Any) -> bool:
    """True for `{prefix, middle, suffix}` and for HumanEval-Infilling's `{prompt, suffix, canonical_solution}`."""
    return isinstance(row, dict) and "suffix" in row and ("prefix" in row or "canonical_solution" in row)


def content_digest(conversation: Conversation) -> str:
    """Hash of what is said (not of the id); equal conversations have equal digests."""
    text = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def is_empty(message: dict[str, Any]) -> bool:
    """No text, no tool call, no reasoning."""
    return not (str(message["content"]).strip() or message.get("tool_calls") or message.get("reasoning_content"))


def clean_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRejected("lone-surrogate", f"half a surrogate pair (\\u{ord(text[error.start]):04x})") from None
    return clean(text)


def _id_of(row: dict[str, Any], messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    for key in ID_KEYS:
        value = row.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return clean_text(str(value))
    return content_digest(Conversation("", messages, tools))[:16]


def expect(value: Any, kinds: Any, reason: str, what: str) -> None:
    """Raise RowRejected unless a value is of one of these kinds."""
    if not isinstance(value, kinds):
        raise RowRejected(reason, f"{what}, found {kind_of(value)}")


def kind_of(value: Any) -> str:
    """A JSON value in a message."""
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "nothing", "bool": "true/false"}
    return names.get(type(value).__name__, "a number")
