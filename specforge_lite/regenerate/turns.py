"""One conversation, turn by turn: each assistant turn is replaced by the target's answer, and later turns see it.

recorded   system  user  ASSISTANT  user  ASSISTANT           an answer that was cut off, or that does not fit the
asked      [system user]  ->  A1                              recorded tool result after it, ends the conversation
           [system user       A1    user]  ->  A2             there: what follows belongs to another conversation

A later turn that cannot be answered (it no longer fits the target's context, the answer is empty) ends the conversation
too; the answered turns are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from specforge_lite.core.http import HttpFailure
from specforge_lite.types import Conversation

Message = dict[str, Any]


class RequestFailed(HttpFailure):
    """A row could not be answered. `reason` is a short name to count by; `retryable`: another attempt may work."""

    def __init__(self, reason: str, detail: str, retryable: bool = False) -> None:
        super().__init__(reason, detail, retryable=retryable)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Sampling:
    """How one row is answered."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Question:
    """One request: the conversation so far, ending with a user or tool turn, or the token ids of a prompt to go on
    with, and what ends the answer."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    sampling: Sampling
    prompt_ids: list[int] | None = None
    stop_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """The target's answer. finish_reason in the servers' terms: `stop`, `length`, `tool_calls`, ..."""

    content: str
    finish_reason: str
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    completion_tokens: int = 0


@dataclass
class Regenerated:
    """The messages with the target's answers, each with its `finish_reason`. num_recorded_turns_left: turns of the
    source that were left out; left_out_reason: why, where the target did not answer them."""

    messages: list[Message]
    finish_reason: str = ""
    completion_tokens: int = 0
    num_recorded_turns_left: int = 0
    left_out_reason: str = ""


async def regenerate(
    conversation: Conversation,
    system_prompt: str | None,
    sampling: Sampling,
    keep_reasoning: bool,
    ask: Callable[[Question], Awaitable[Answer]],
) -> Regenerated:
    """Answer every turn of `conversation` anew. Raises RequestFailed."""
    recorded = list(conversation.messages)
    if system_prompt is not None and recorded[0]["role"] != "system":
        recorded.insert(0, {"role": "system", "content": system_prompt})
    result = Regenerated([])
    at = 0
    while at < len(recorded):
        start, num_answered_messages = at, len(result.messages)
        while at < len(recorded) and recorded[at]["role"] != "assistant":
            result.messages.append(recorded[at])
            at += 1
        try:
            answer = await ask(Question([_sent(m) for m in result.messages], conversation.tools, sampling))
            reasoning = answer.reasoning if keep_reasoning and answer.reasoning.strip() else ""
            in_thought = answer.finish_reason == "length" and reasoning  # cut off while it reasoned
            if not (answer.content.strip() or answer.tool_calls or in_thought):
                raise RequestFailed("empty-answer", f"turn {len(result.messages) + 1}: the target's answer is empty")
        except RequestFailed as error:
            if error.retryable or not num_answered_messages:
                raise
            del result.messages[num_answered_messages:]
            at, result.left_out_reason = start, error.reason
            break
        message: Message = {"role": "assistant", "content": answer.content}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"tool_calls": answer.tool_calls} if answer.tool_calls else {}
        # finish_reason "length": the answer has no end token to train
        result.messages.append({**message, "finish_reason": answer.finish_reason})
        result.finish_reason = answer.finish_reason
        result.completion_tokens += answer.completion_tokens
        replaced = recorded[at] if at < len(recorded) else {}
        at += 1
        if not _goes_on(answer, replaced, recorded[at:]):
            break
        # Tool results name the call they answer: they get the ids of the target's own calls, in order.
        for i, call in enumerate(answer.tool_calls, at):
            if i < len(recorded) and recorded[i]["role"] == "tool" and isinstance(call.get("id"), str):
                recorded[i] = {**recorded[i], "tool_call_id": call["id"]}
    result.num_recorded_turns_left = max(0, len(recorded) - at)
    return result


def row_sampling(row_id: str, seed: int, temperatures: tuple[float, ...], max_tokens: int, top_p: float) -> Sampling:
    """The sampling of a row: its temperature and seed follow from `seed` and its id alone, in whatever order rows run.
    The seed fits into 31 bits, which every server accepts."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    number, row_seed = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:12], "little") >> 1
    return Sampling(max_tokens, temperatures[number % len(temperatures)], top_p, row_seed)


def _sent(message: Message) -> Message:
    """A message as a server is sent it: reasoning of earlier turns is not part of the prompt."""
    return {key: value for key, value in message.items() if key not in ("reasoning_content", "finish_reason")}


def _goes_on(answer: Answer, replaced: Message, rest: list[Message]) -> bool:
    """True if the recorded turns after an answer still fit it."""
    if not rest or answer.finish_reason == "length":
        return False
    if rest[0]["role"] != "tool":
        return not answer.tool_calls
    called, wanted = (
        [(call.get("function") or {}).get("name") for call in calls or []]
        for calls in (answer.tool_calls, replaced.get("tool_calls"))
    )
    return bool(called) and called == wanted
