"""A row of any form people have -> the normal form `{"id", "conversations": [{"role", "content"}], "tools"?}`.

Forms are recognised by content: ShareGPT (`from`/`value`), OpenAI (`role`/`content`), Alpaca, prompt/response and its
relatives (GSM8K's question/answer), and lists of alternating strings (UltraChat). Tool calls, tool results, reasoning,
system prompts, `weight: 0` (a turn that is shown, not trained) and `finish_reason: "length"` (an answer that a token
limit cut off) are kept. What cannot be read is refused with a reason that can be counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import clean, map_strings
from specforge_lite.types import Conversation

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user", "customer": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
    "function_call": "function_call", "tool_call": "function_call",
    # SpecForge's names for the channels of gpt-oss
    "assistant_analysis": "analysis", "assistant_final": "assistant", "assistant_commentary": "commentary",
    "assistant_reasoning_effort": "effort",
}  # fmt: skip
ID_KEYS = ("id", "conversation_id", "prompt_id", "question_id", "uuid", "seq_id", "task_id")
PROMPT_KEYS = ("prompt", "question", "problem", "query", "instruction")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Fields of a turn that say whether it is trained: OpenAI, Mistral, Together and Fireworks write weight, ms-swift loss,
# axolotl train and training.
SUPERVISION_KEYS = ("weight", "loss", "train", "training", "trainable")
_SUPERVISION = re.compile(r"weight|loss|train|mask|supervis", re.IGNORECASE)
CUT_OFF = ("length", "max_tokens")  # finish reasons of an answer that a token limit cut off
KNOWN_FORMS = (
    "conversations/messages of role+content or from+value, instruction/input/output, prompt/response, question/answer"
)


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
    _expect(row, dict, "not-an-object", "expected a JSON object per row")
    try:
        messages = check_messages(_messages_of(row))
        tools = map_strings(_tools_of(row.get("tools")), clean_text)
    except RecursionError:
        raise RowRejected("nested-too-deeply", "more levels of nesting than a row can have") from None
    if row.get("finish_reason") in CUT_OFF and messages[-1]["role"] == "assistant":
        messages[-1]["finish_reason"] = "length"
    return Conversation(_id_of(row, messages, tools), messages, tools)


def to_row(conversation: Conversation) -> dict[str, Any]:
    """The normal form of a conversation, ready for `json.dumps`."""
    row: dict[str, Any] = {"id": conversation.id, "conversations": conversation.messages}
    return {**row, "tools": conversation.tools} if conversation.tools else row


def is_fim_row(row: Any) -> bool:
    """True for `{prefix, middle, suffix}` and for HumanEval-Infilling's `{prompt, suffix, canonical_solution}`."""
    return isinstance(row, dict) and "suffix" in row and ("prefix" in row or "canonical_solution" in row)


def ignored_fields(row: Any) -> set[str]:
    """Fields of a row that look as if they decided what is trained, and have no effect here."""
    if not isinstance(row, dict):
        return set()
    found = {f"{key} of the row" for key in row if isinstance(key, str) and _SUPERVISION.search(key)}
    for turns in (row.get("conversations"), row.get("messages")):
        for turn in turns if isinstance(turns, list) else ():
            for key, value in turn.items() if isinstance(turn, dict) else ():
                if not isinstance(key, str) or not _SUPERVISION.search(key) or value is None:
                    continue
                trained = _is_trained(value)
                if key not in SUPERVISION_KEYS:
                    found.add(f"{key} of a turn")
                elif trained is None:
                    found.add(f"{key} {one_line(repr(value), 20)}")
                elif trained and ROLES.get(str(turn.get("role", turn.get("from"))).lower()) != "assistant":
                    found.add(f"{key} of a turn that is no answer")
    return found


def _is_trained(value: Any) -> bool | None:
    """What `weight: 0`, `loss: false` and the like say; None for what is neither yes nor no."""
    text = str(value).lower()
    return False if text in ("0", "0.0", "false") else True if text in ("1", "1.0", "true") else None


def content_digest(conversation: Conversation) -> str:
    """Hash of what is said (not of the id); equal conversations have equal digests."""
    text = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    for key in ("conversations", "messages", "conversation", "dialog"):
        if row.get(key) is not None:
            return turns_of(row[key], key, row)
    if isinstance(row.get("data"), list) and all(isinstance(turn, str) for turn in row["data"]):
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(row["data"])]
    if any(key in row for key in PROMPT_KEYS):
        from specforge_lite.data.other_forms import prompt_and_answer

        return prompt_and_answer(row)
    found = ", ".join(sorted(map(str, row))[:8]) or "no keys"
    raise RowRejected("unknown-form", f"found keys {found}; expected {KNOWN_FORMS}")


def turns_of(turns: Any, key: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a list of turns under `key`. Raises RowRejected."""
    if isinstance(turns, str):  # some parquet exports hold JSON text
        turns = _from_json(turns, f"'{key}'")
    _expect(turns, list, "not-a-list", f"'{key}': expected a list of turns")
    if not turns:
        raise RowRejected("no-turns", f"'{key}' is empty")
    messages = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) else []
    effort: dict[str, str] = {}
    for number, turn in enumerate(turns, 1):
        _expect(turn, dict, "turn-not-an-object", f"turn {number}: expected an object")
        message = _turn(turn, number)
        if message["role"] == "effort":
            effort = {"reasoning_effort": message["content"].strip().lower()}
        elif message != (messages[0] if messages and number == 1 else None):  # system of the row and first turn alike
            messages.append({**message, **effort})
            effort = {}
    return messages


def _turn(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str) or name.lower() not in ROLES:
        found = f"'{name}'" if isinstance(name, str) else _kind(name)
        raise RowRejected("unknown-role", f"turn {number}: role {found}; expected one of {', '.join(sorted(ROLES))}")
    role = ROLES[name.lower()]
    content = turn["content"] if "content" in turn else turn.get("value")
    if role == "function_call":
        calls = _from_json(content, f"turn {number}: tool call") if isinstance(content, str) else content
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(calls, number)}
    if role == "analysis":
        return {"role": "assistant", "content": "", "reasoning_content": text_of(content, number, False)}
    if role == "commentary":
        raise RowRejected("commentary-channel", f"turn {number}: commentary without a tool call has no normal form")
    thoughts = [turn[key] for key in REASONING_KEYS if isinstance(turn.get(key), str)]
    may_be_empty = bool(turn.get("tool_calls") or thoughts)
    message: dict[str, Any] = {"role": role, "content": text_of(content, number, may_be_empty)}
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(turn["tool_calls"], number)
    if thought := next(filter(str.strip, thoughts), ""):
        message["reasoning_content"] = thought
    for key in ("name", "tool_call_id", "reasoning_effort"):
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    if role == "assistant" and any(_is_trained(turn.get(key)) is False for key in SUPERVISION_KEYS):
        message["weight"] = 0
    if role == "assistant" and turn.get("finish_reason") in CUT_OFF:
        message["finish_reason"] = "length"
    return message


def text_of(content: Any, number: int, may_be_empty: bool) -> str:
    """The text of a turn's content."""
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list):  # OpenAI content parts
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
        raise RowRejected("content-not-text", f"turn {number}: content parts other than text")
    _expect(content, str, "content-not-text", f"turn {number}: expected text")
    return str(content)


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """OpenAI form; arguments that are text stay as the model wrote them."""
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowRejected("bad-tool-call", f"turn {number}: expected a tool call with a name, found {_kind(call)}")
        _expect(arguments, (dict, str), "bad-tool-call", f"turn {number}: expected arguments of a tool call")
        extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools_of(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "'tools'")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowRejected("bad-tools", f"'tools': expected a list of objects, found {_kind(tools)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def check_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns in an order a chat can have, else RowRejected.

    Dropped on purpose: an empty system prompt, assistant turns before the first user turn (ShareGPT is full of
    conversations that were cut in the middle), and an empty last answer; an empty answer before that is kept and not
    trained. Neighbouring system turns become one, and user turns, and parts of one answer: reasoning, text, tool calls.
    """
    result: list[dict[str, Any]] = []
    first_empty = 0
    for number, message in enumerate(messages, 1):
        message = map_strings(message, clean_text)
        role, last = message["role"], result[-1]["role"] if result else None
        if role == "assistant" and last in (None, "system"):
            continue
        if is_empty(message) and role != "tool":
            if role == "system":
                continue
            if role == "user":
                raise RowRejected("empty-turn", f"turn {number}: empty user turn")
            first_empty = first_empty or number
            message["weight"] = 0
        if role == "system" and last not in (None, "system"):
            raise RowRejected("bad-order", f"turn {number}: a system turn after the start")
        if role == last and role != "tool":
            from specforge_lite.data.other_forms import joined

            result[-1] = joined(result[-1], message, number)
            continue
        if role == "tool" and last in (None, "system", "user"):
            found = "at the start" if last is None else f"after {last}"
            raise RowRejected("bad-order", f"turn {number}: {role} {found}; expected user and assistant in turn")
        result.append(message)
    while result and result[-1]["role"] == "assistant" and is_empty(result[-1]):
        result.pop()
    if not any(message["role"] == "user" for message in result):
        raise RowRejected("no-user-turn", "no user turn")
    if first_empty and not any(m["role"] == "assistant" and not is_empty(m) for m in result):
        raise RowRejected("empty-turn", f"turn {first_empty}: empty assistant turn")
    return result


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


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowRejected("not-json", f"{what}: expected JSON, found '{text[:40]}'") from None


def _expect(value: Any, kinds: Any, reason: str, what: str) -> None:
    if not isinstance(value, kinds):
        raise RowRejected(reason, f"{what}, found {_kind(value)}")


def _kind(value: Any) -> str:
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "nothing", "bool": "true/false"}
    return names.get(type(value).__name__, "a number")
