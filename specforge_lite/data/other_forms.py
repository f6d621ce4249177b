"""Rows that are not a list of turns: Alpaca, prompt/response and its relatives; and neighbouring turns of one role."""

from __future__ import annotations

from typing import Any

from specforge_lite.data.conversations import PROMPT_KEYS, RowRejected, is_empty, text_of, turns_of

ANSWER_KEYS = ("response", "completion", "answer", "solution", "output", "chosen")


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
