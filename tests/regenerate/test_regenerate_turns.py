"""Which questions are asked for a conversation, and what comes of the answers; input rows and their ids."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.data.reading import RowFile
from specforge_lite.regenerate.rows import InputRow, RowSource
from specforge_lite.regenerate.turns import (
    Answer,
    Question,
    Regenerated,
    RequestFailed,
    Sampling,
    regenerate,
    row_sampling,
)
from specforge_lite.types import Conversation

GREEDY = Sampling(100, 0.0, 1.0, 0)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, call_id: str = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


def answered(text: str, finish_reason: str = "stop", **more: Any) -> dict[str, Any]:
    """An assistant message as regeneration writes it."""
    return {"role": "assistant", "content": text, **more, "finish_reason": finish_reason}


class Target:
    """Gives the scripted answers in turn and remembers the questions."""

    def __init__(self, *answers: Answer | RequestFailed) -> None:
        self.answers = list(answers)
        self.questions: list[Question] = []

    async def ask(self, question: Question) -> Answer:
        self.questions.append(Question([dict(m) for m in question.messages], question.tools, question.sampling))
        answer = self.answers.pop(0)
        if isinstance(answer, RequestFailed):
            raise answer
        return answer


def run(messages: list[dict[str, Any]], target: Target, **options: Any) -> Regenerated:
    conversation = Conversation("x", messages, options.pop("tools", None))
    options = {"system_prompt": None, "sampling": GREEDY, "keep_reasoning": True, **options}
    return asyncio.run(regenerate(conversation, ask=target.ask, **options))


def test_each_turn_is_replaced_and_later_turns_see_it() -> None:
    target = Target(Answer("A1", "stop", completion_tokens=3), Answer("A2", "stop", completion_tokens=4))
    result = run([user("q1"), assistant("old1"), user("q2"), assistant("old2")], target)
    assert result.messages == [user("q1"), answered("A1"), user("q2"), answered("A2")]
    assert [q.messages for q in target.questions] == [[user("q1")], [user("q1"), assistant("A1"), user("q2")]]
    assert (result.finish_reason, result.completion_tokens, result.num_recorded_turns_left) == ("stop", 7, 0)


def test_last_user_turn_without_an_answer_is_answered() -> None:
    target = Target(Answer("A1", "stop"), Answer("A2", "stop"))
    result = run([user("q1"), assistant("old"), user("q2")], target)
    assert [m["content"] for m in result.messages] == ["q1", "A1", "q2", "A2"]


def test_system_prompt_only_where_there_is_none() -> None:
    target = Target(Answer("A", "stop"), Answer("A", "stop"))
    assert run([user("q")], target, system_prompt="be kind").messages[0] == {"role": "system", "content": "be kind"}
    own = {"role": "system", "content": "be brief"}
    assert run([own, user("q")], target, system_prompt="be kind").messages == [own, user("q"), answered("A")]


def test_an_answer_cut_off_ends_the_conversation() -> None:
    target = Target(Answer("A1 and", "length"))
    result = run([user("q1"), assistant("old1"), user("q2"), assistant("old2")], target)
    assert result.messages == [user("q1"), answered("A1 and", "length")]
    assert (result.finish_reason, result.num_recorded_turns_left) == ("length", 2)


def test_reasoning_is_kept_but_not_sent_back() -> None:
    answers = [Answer("A1", "stop", reasoning="hm"), Answer("A2", "stop", reasoning="so")]
    messages = [user("q1"), assistant("old1", reasoning_content="theirs"), user("q2"), assistant("old2")]
    target = Target(*answers)
    result = run(messages, target)
    assert result.messages[1] == answered("A1", reasoning_content="hm")
    assert result.messages[3] == answered("A2", reasoning_content="so")
    assert target.questions[1].messages == [user("q1"), assistant("A1"), user("q2")]
    dropped = run(messages, Target(*answers), keep_reasoning=False)
    assert dropped.messages == [user("q1"), answered("A1"), user("q2"), answered("A2")]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RequestFailed("prompt-too-long", "5000 tokens, the target takes 4096"), "prompt-too-long"),
        (RequestFailed("http-400", "no"), "http-400"),
        (Answer(" ", "stop"), "empty-answer"),
    ],
)
def test_a_later_turn_that_cannot_be_answered_keeps_the_answered_ones(failure: Any, reason: str) -> None:
    messages = [user("q1"), assistant("old1"), user("q2"), assistant("old2"), user("q3"), assistant("old3")]
    result = run(messages, Target(Answer("A1", "stop"), failure))
    assert result.messages == [user("q1"), answered("A1")]
    assert (result.num_recorded_turns_left, result.left_out_reason) == (4, reason)


def test_a_fault_that_another_run_may_not_meet_gives_up_the_row() -> None:
    with pytest.raises(RequestFailed, match="timeout"):
        run(
            [user("q1"), assistant("old1"), user("q2")],
            Target(Answer("A1", "stop"), RequestFailed("timeout", "", True)),
        )
    with pytest.raises(RequestFailed, match="prompt-too-long"):  # nothing is answered yet
        run([user("q1"), assistant("old1")], Target(RequestFailed("prompt-too-long", "")))


def test_an_answer_that_says_nothing_is_an_error() -> None:
    with pytest.raises(RequestFailed, match="empty-answer: turn 2"):
        run([user("q")], Target(Answer(" \n", "stop")))
    assert run([user("q")], Target(Answer("", "length", reasoning="long thought"))).messages[1]["content"] == ""
    with pytest.raises(RequestFailed, match="empty-answer"):
        run([user("q")], Target(Answer("", "length", reasoning="long thought")), keep_reasoning=False)
    with pytest.raises(RequestFailed, match="empty-answer"):  # not cut off: the target ended it inside its thought
        run([user("q")], Target(Answer("", "stop", reasoning="long thought")))


TOOL_CHAT = [
    user("weather?"),
    assistant("", tool_calls=[call("get_weather", "old_id")]),
    {"role": "tool", "content": "sunny", "tool_call_id": "old_id"},
    assistant("It is sunny."),
]
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]


def test_tool_results_follow_the_targets_own_call() -> None:
    target = Target(Answer("", "tool_calls", tool_calls=[call("get_weather", "new_id")]), Answer("Sun!", "stop"))
    result = run(TOOL_CHAT, target, tools=TOOLS)
    assert [m["role"] for m in result.messages] == ["user", "assistant", "tool", "assistant"]
    assert result.messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "new_id"}
    assert result.messages[3] == answered("Sun!")
    assert target.questions[1].messages[2]["tool_call_id"] == "new_id"
    assert all(q.tools == TOOLS for q in target.questions)
    assert TOOL_CHAT[2]["tool_call_id"] == "old_id"  # the input is not changed


@pytest.mark.parametrize(
    "answer",
    [
        Answer("I cannot know.", "stop"),
        Answer("", "tool_calls", tool_calls=[call("search")]),
        Answer("", "tool_calls", tool_calls=[call("get_weather"), call("get_weather", "c2")]),
    ],
)
def test_a_recorded_tool_result_that_no_longer_fits_ends_the_conversation(answer: Answer) -> None:
    result = run(TOOL_CHAT, Target(answer), tools=TOOLS)
    assert len(result.messages) == 2
    assert result.num_recorded_turns_left == 2


def test_an_unexpected_tool_call_has_no_result_and_ends_the_conversation() -> None:
    target = Target(Answer("", "tool_calls", tool_calls=[call("f")]))
    result = run([user("q1"), assistant("old"), user("q2"), assistant("old")], target)
    assert len(result.messages) == 2


def test_temperature_mix_depends_on_seed_and_id_only() -> None:
    mix = (0.0, 0.7, 1.0)
    drawn = [row_sampling(f"row{i}", 0, mix, 10, 0.9) for i in range(3000)]
    assert drawn == [row_sampling(f"row{i}", 0, mix, 10, 0.9) for i in range(3000)]
    counts = Counter(s.temperature for s in drawn)
    assert set(counts) == set(mix)
    assert all(900 < count < 1100 for count in counts.values())
    assert len({s.seed for s in drawn}) == 3000
    assert all(0 <= s.seed < 2**31 for s in drawn)
    other = [row_sampling(f"row{i}", 1, mix, 10, 0.9).temperature for i in range(3000)]
    assert other != [s.temperature for s in drawn]


def rows_of(tmp_path: Path, text: str, limit: int | None = None) -> list[InputRow]:
    path = tmp_path / "in.jsonl"
    path.write_text(text, encoding="utf-8")
    with RowFile(path) as file:
        source = RowSource(file, limit)
        rows = list(source)
        assert source.estimated_total == source.num_rows == len(rows)
        return rows


def test_input_rows_are_numbered_named_and_never_lost(tmp_path: Path) -> None:
    lines = [
        json.dumps({"id": "a", "conversations": [user("q")]}),
        "{broken",
        json.dumps({"id": "a", "conversations": [user("other")]}),
        json.dumps({"id": "b", "conversations": []}),
        json.dumps({"prompt": "no id"}),
        json.dumps({"id": "a~2", "prompt": "taken"}),
        json.dumps([1, 2]),
    ]
    rows = rows_of(tmp_path, "\n".join(lines) + "\n")
    assert [row.number for row in rows] == list(range(7))
    assert [row.id for row in rows[:4]] == ["a", "line-2", "a~2", "b"]
    assert [row.id for row in rows[5:]] == ["a~2~2", "line-7"]
    assert len({row.id for row in rows}) == 7
    assert [row.reason for row in rows] == ["", "not-json", "", "no-turns", "", "", "not-an-object"]
    assert rows[2].conversation is not None
    assert rows[2].conversation.id == "a~2"
    assert rows_of(tmp_path, "\n".join(lines) + "\n") == rows


def test_sample_size(tmp_path: Path) -> None:
    text = "".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(10))
    assert len(rows_of(tmp_path, text, limit=4)) == 4
    assert len(rows_of(tmp_path, text, limit=40)) == 10
