"""Rows of any form people have -> messages in the normal form.

Forms are recognised by content: ShareGPT (`from`/`value`), OpenAI (`role`/`content`), Alpaca, prompt/response and its
relatives (GSM8K's question/answer), and lists of alternating strings (UltraChat).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from specforge_lite.data.conversations import CUT_OFF, RowRejected, clean_text, expect, is_empty, kind_of, one_line
from specforge_lite.data.encoding import map_strings

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
PROMPT_KEYS = ("prompt", "question", "problem", "query", "instruction")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Fields of a turn that say whether it is trained: OpenAI, Mistral, Together and Fireworks write weight, ms-swift loss,
# axolotl train and training.
SUPERVISION_KEYS = ("weight", "loss", "train", "training", "trainable")
_SUPERVISION = re.compile(r"weight|loss|train|mask|supervis", re.IGNORECASE)
KNOWN_FORMS = (
    "conversations/messages of role+content or from+value, instruction/input/output, prompt/response, question/answer"
)
ANSWER_KEYS = ("response", "completion", "answer", "solution", "output", "chosen")


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


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a row, as they are. Raises RowRejected."""
    for key in ("conversations", "messages", "conversation", "dialog"):
        if row.get(key) is not None:
            return turns_of(row[key], key, row)
    if isinstance(row.get("data"), list) and all(isinstance(turn, str) for turn in row["data"]):
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(row["data"])]
    if any(key in row for key in PROMPT_KEYS):
        return prompt_and_answer(row)
    found = ", ".join(sorted(map(str, row))[:8]) or "no keys"
    raise RowRejected("unknown-form", f"found keys {found}; expected {KNOWN_FORMS}")


def turns_of(turns: Any, key: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a list of turns under `key`. Raises RowRejected."""
    if isinstance(turns, str):  # some parquet exports hold JSON text
        turns = _from_json(turns, f"'{key}'")
    expect(turns, list, "not-a-list", f"'{key}': expected a list of turns")
    if not turns:
        raise RowRejected("no-turns", f"'{key}' is empty")
    messages = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) else []
    effort: dict[str, str] = {}
    for number, turn in enumerate(turns, 1):
        expect(turn, dict, "turn-not-an-object", f"turn {number}: expected an object")
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
        found = f"'{name}'" if isinstance(name, str) else kind_of(name)
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
    expect(content, str, "content-not-text", f"turn {number}: expected text")
    return str(content)


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """OpenAI form; arguments that are text stay as the model wrote them."""
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowRejected(
                "bad-tool-call", f"turn {number}: expected a tool call with a name, found {kind_of(call)}"
            )
        expect(arguments, (dict, str), "bad-tool-call", f"turn {number}: expected arguments of a tool call")
        extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def tools_of(tools: Any) -> list[dict[str, Any]] | None:
    """Tools of a row in OpenAI's form. Raises RowRejected."""
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "'tools'")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowRejected("bad-tools", f"'tools': expected a list of objects, found {kind_of(tools)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowRejected("not-json", f"{what}: expected JSON, found '{text[:40]}'") from None


def prompt_and_answer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a row with a prompt and, where it has one, an answer. Raises RowRejected."""
    prompt_key = next(key for key in PROMPT_KEYS if key in row)
    answer_key = next((key for key in ANSWER_KEYS if row.get(key) is not None), "")
    messages: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.append({"role": "system", "content": row["system"]})
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRejected("bad-history", "'history': expected [question, answer] pairs")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = row[prompt_key]
    if isinstance(prompt, list):
        messages += turns_of(prompt, prompt_key, {})
    else:
        extra = row.get("input") if prompt_key == "instruction" else None
        joined = f"{prompt}\n\n{extra}" if isinstance(prompt, str) and isinstance(extra, str) and extra else prompt
        messages.append({"role": "user", "content": joined})
    answer = row.get(answer_key)
    if isinstance(answer, list):
        messages += turns_of(answer, answer_key, {})
    elif answer_key:
        messages.append({"role": "assistant", "content": answer})
    for message in messages:
        message["content"] = text_of(message["content"], len(messages), bool(message.get("tool_calls")))
    return messages


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


def joined(first: dict[str, Any], second: dict[str, Any], number: int) -> dict[str, Any]:
    """Two neighbouring messages of one role as one. Two whole answers, and turns of two speakers, are refused."""
    role = first["role"]
    if role == "assistant" and is_empty(first):
        return second
    two_answers = role == "assistant" and str(first["content"]).strip() and not second.get("tool_calls")
    two_speakers = len({message["name"] for message in (first, second) if "name" in message}) > 1
    if two_speakers or (two_answers and not is_empty(second)):
        raise RowRejected("bad-order", f"turn {number}: {role} after {role}; expected user and assistant in turn")
    result = {**first, **second}
    separators = {"content": "\n" if role == "assistant" else "\n\n", "reasoning_content": "\n"}
    for key, separator in separators.items():
        if texts := [message[key] for message in (first, second) if message.get(key)]:
            result[key] = separator.join(texts)
    if calls := [*first.get("tool_calls", []), *second.get("tool_calls", [])]:
        result["tool_calls"] = calls
    if "finish_reason" not in second:  # the end of the second is the end of both
        result.pop("finish_reason", None)
    if first.get("weight") == 0 and not is_empty(second):
        result["weight"] = 0
    return result
