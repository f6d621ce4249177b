"""Files to rows, rows of any form to conversations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_lite.core.errors import DataError
from specforge_lite.data import json_values, reading
from specforge_lite.data.conversations import RowRejected, content_digest, is_plain_row, to_conversation, to_row
from specforge_lite.data.forms import check_messages, ignored_fields, messages_of
from specforge_lite.data.reading import BadRow, Row, RowFile

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}

# ----------------------------------------------------------------------------------------------------------- the forms

FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "openai": ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    "normal form": ({"id": "7", "conversations": [USER, ANSWER]}, [USER, ANSWER]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [USER, ANSWER],
    ),
    "sharegpt with a system row key": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [{"role": "system", "content": "s"}, USER, ANSWER],
    ),
    "sharegpt that starts in the middle": (
        {"conversations": [{"from": "gpt", "value": "cut"}, {"from": "human", "value": "q"}]},
        [USER],
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
    "alpaca with input": (
        {"instruction": "q", "input": "i", "output": "a"},
        [{"role": "user", "content": "q\n\ni"}, ANSWER],
    ),
    "alpaca with history": (
        {"instruction": "q", "output": "a", "history": [["h", "g"]], "system": "s"},
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "h"},
            {"role": "assistant", "content": "g"},
            USER,
            ANSWER,
        ],
    ),
    "prompt and response": ({"prompt": "q", "response": "a"}, [USER, ANSWER]),
    "prompt and completion as messages": ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
    "prompt alone": ({"prompt": "q"}, [USER]),
    "gsm8k": ({"question": "q", "answer": "a"}, [USER, ANSWER]),
    "math": ({"problem": "q", "solution": "a", "level": 3}, [USER, ANSWER]),
    "ultrachat": ({"id": "0", "data": ["q", "a", "q"]}, [USER, ANSWER, USER]),
    "ultrachat_200k": ({"prompt": "q", "prompt_id": "p", "messages": [USER, ANSWER]}, [USER, ANSWER]),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        [USER, ANSWER],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, USER]},
        [{"role": "system", "content": "s"}, USER],
    ),
    "empty system prompt": ({"messages": [{"role": "system", "content": " "}, USER]}, [USER]),
    "reasoning": (
        {"messages": [USER, {**ANSWER, "reasoning": "r"}]},
        [USER, {**ANSWER, "reasoning_content": "r"}],
    ),
    "openai tools": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [{"id": "c", **CALL}]},
                {"role": "tool", "tool_call_id": "c", "content": "2"},
                ANSWER,
            ]
        },
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"id": "c", **CALL}]},
            {"role": "tool", "content": "2", "tool_call_id": "c"},
            ANSWER,
        ],
    ),
    "sharegpt tools": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [
            USER,
            {
                **ANSWER,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
            },
            {"role": "tool", "content": "2"},
            ANSWER,
        ],
    ),
}


THOUGHT = {"role": "assistant", "content": "", "reasoning_content": "r"}
FORMS |= {
    "system and developer": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, USER, ANSWER]},
        [{"role": "system", "content": "s\n\nd"}, USER, ANSWER],
    ),
    "the same system prompt twice": (
        {"system": "s", "messages": [{"role": "system", "content": "s"}, USER]},
        [{"role": "system", "content": "s"}, USER],
    ),
    "two questions": (
        {"messages": [USER, {"role": "user", "content": "more"}, ANSWER]},
        [{"role": "user", "content": "q\n\nmore"}, ANSWER],
    ),
    "no content but reasoning": (
        {"messages": [USER, {"role": "assistant", "content": None, "reasoning_content": "r"}]},
        [USER, THOUGHT],
    ),
    "gpt-oss channels": (
        {
            "conversations": [
                {"role": "assistant_reasoning_effort", "content": "High"},
                {"role": "user", "content": "q"},
                {"role": "assistant_analysis", "content": "r"},
                {"role": "assistant_final", "content": "a"},
            ]
        },
        [{**USER, "reasoning_effort": "high"}, {**ANSWER, "reasoning_content": "r"}],
    ),
    "an empty answer in the middle": (
        {"messages": [USER, {"role": "assistant", "content": ""}, USER, ANSWER]},
        [USER, {"role": "assistant", "content": "", "weight": 0}, USER, ANSWER],
    ),
    "an empty answer at the end": (
        {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": " "}]},
        [USER, ANSWER, USER],
    ),
    "an empty answer before the answer": (
        {"messages": [USER, {"role": "assistant", "content": ""}, ANSWER]},
        [USER, ANSWER],
    ),
    "turns that are not trained": (
        {
            "messages": [
                USER,
                {**ANSWER, "weight": 0},
                USER,
                {**ANSWER, "loss": False},
                USER,
                {**ANSWER, "train": "false"},
                USER,
                {**ANSWER, "weight": 1},
                USER,
                {**ANSWER, "loss": True},
            ]
        },
        [USER, {**ANSWER, "weight": 0}] * 3 + [USER, ANSWER] * 2,
    ),
    "cut off, said on the turn": (
        {"messages": [USER, {**ANSWER, "finish_reason": "length"}, USER, {**ANSWER, "finish_reason": "stop"}]},
        [USER, {**ANSWER, "finish_reason": "length"}, USER, ANSWER],
    ),
    "cut off, said on the row": (
        {"messages": [USER, ANSWER, USER, ANSWER], "finish_reason": "length"},
        [USER, ANSWER, USER, {**ANSWER, "finish_reason": "length"}],
    ),
    "an answer in parts": (
        {
            "messages": [
                USER,
                {**ANSWER, "reasoning_content": "r1", "finish_reason": "length"},
                {**THOUGHT, "reasoning_content": "r2", "tool_calls": [CALL], "name": "x", "weight": 0},
                {"role": "tool", "content": "2"},
            ]
        },
        [
            USER,
            {**ANSWER, "reasoning_content": "r1\nr2", "tool_calls": [CALL], "name": "x", "weight": 0},
            {"role": "tool", "content": "2"},
        ],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    row, messages = FORMS[name]
    assert to_conversation(row).messages == messages


@pytest.mark.parametrize("name", FORMS)
def test_normal_form_is_stable(name: str) -> None:
    conversation = to_conversation(FORMS[name][0])
    again = to_conversation(json.loads(json.dumps(to_row(conversation))))
    assert again == conversation


def test_fields_without_effect_are_named() -> None:
    row = {
        "loss_mask": [0, 1],
        "messages": [
            {**USER, "weight": 1},
            {**ANSWER, "weight": 0.5, "train_detail": [], "loss": None},
            {**USER, "train": False},
            {**ANSWER, "weight": 0, "train": True, "trainable": "no"},
        ],
    }
    assert ignored_fields(row) == {
        "loss_mask of the row",
        "weight of a turn that is no answer",
        "weight 0.5",
        "train_detail of a turn",
        "trainable 'no'",
    }
    assert ignored_fields({"messages": [USER, {**ANSWER, "weight": 0, "loss": True}]}) == set()
    assert ignored_fields([1]) == set()


def test_tools_are_kept_in_either_form() -> None:
    bare = {"name": "f", "parameters": {}}
    wrapped = {"type": "function", "function": bare}
    for tools in ([bare], [wrapped], json.dumps([bare])):
        assert to_conversation({"messages": [USER], "tools": tools}).tools == [wrapped]
    assert to_conversation({"messages": [USER], "tools": ""}).tools is None


def test_ids() -> None:
    assert to_conversation({"id": 7, "prompt": "q"}).id == "7"
    assert to_conversation({"prompt_id": "p", "prompt": "q"}).id == "p"
    unnamed = to_conversation({"prompt": "q"})
    assert unnamed.id == to_conversation({"question": "q", "id": ""}).id == content_digest(unnamed)[:16]
    assert to_conversation({"prompt": "other"}).id != unnamed.id


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ([], "not-an-object", "expected a JSON object per row, found a list"),
        (7, "not-an-object", "found a number"),
        ({}, "unknown-form", "found keys no keys; expected conversations/messages"),
        ({"text": "q"}, "unknown-form", "found keys text"),
        ({"messages": []}, "no-turns", "'messages' is empty"),
        ({"messages": {"role": "user"}}, "not-a-list", "expected a list of turns, found an object"),
        ({"messages": ["q"]}, "turn-not-an-object", "turn 1: expected an object, found text"),
        ({"messages": [{"role": "king", "content": "q"}]}, "unknown-role", "turn 1: role 'king'; expected one of"),
        ({"messages": [{"content": "q"}]}, "unknown-role", "turn 1: role nothing"),
        ({"messages": [{"role": "user", "content": 7}]}, "content-not-text", "turn 1: expected text, found a number"),
        ({"messages": [{"role": "user"}]}, "content-not-text", "turn 1: expected text, found nothing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "content-not-text",
            "content parts other than text",
        ),
        ({"messages": [{"role": "user", "content": " \n"}]}, "empty-turn", "turn 1: empty user turn"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty-turn", "turn 2: empty assistant turn"),
        (
            {"messages": [{**USER, "name": "Ann"}, {**USER, "name": "Bob"}]},
            "bad-order",
            "turn 2: user after user; expected user and assistant in turn",
        ),
        (
            {"messages": [USER, {"role": "assistant_commentary", "content": "looking"}]},
            "commentary-channel",
            "turn 2: commentary without a tool call",
        ),
        ({"messages": [USER, ANSWER, ANSWER]}, "bad-order", "turn 3: assistant after assistant"),
        (
            {"messages": [USER, {"role": "system", "content": "s"}]},
            "bad-order",
            "turn 2: a system turn after the start",
        ),
        ({"messages": [USER, {"role": "tool", "content": "2"}]}, "bad-order", "turn 2: tool after user"),
        ({"messages": [{"role": "tool", "content": "2"}]}, "bad-order", "turn 1: tool at the start"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no-user-turn", "no user turn"),
        ({"messages": [ANSWER]}, "no-user-turn", "no user turn"),
        ({"prompt": None}, "content-not-text", "found nothing"),
        ({"prompt": "q", "response": ["a"]}, "turn-not-an-object", "turn 1"),
        ({"instruction": "q", "history": ["h"]}, "bad-history", "expected .question, answer. pairs"),
        ({"messages": [USER], "tools": "no json"}, "not-json", "'tools': expected JSON, found 'no json'"),
        ({"messages": [USER], "tools": [7]}, "bad-tools", "expected a list of objects"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(1)"}]},
            "not-json",
            "turn 2: tool call: expected JSON",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]},
            "bad-tool-call",
            "turn 2: expected a tool call with a name",
        ),
        ({"prompt": "\ud83d"}, "lone-surrogate", "half a surrogate pair"),
        ({"messages": [USER], "tools": [{"\ud83d": 1}]}, "lone-surrogate", "half a surrogate pair"),
    ],
)
def test_rejected(row: Any, reason: str, message: str) -> None:
    with pytest.raises(RowRejected, match=message) as caught:
        to_conversation(row)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "conversations", "role", "from", "content", "value", "prompt", "tools", "data"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", "x"]) | JSON,
        "content": st.text(st.characters(), max_size=4) | JSON,
        "tool_calls": st.lists(st.just(CALL) | JSON, max_size=2) | JSON,
        "reasoning_content": st.text(max_size=2) | JSON,
    },
)


def test_plain_rows_are_what_the_other_reader_makes_of_them() -> None:
    system, talk = {"role": "system", "content": "Be brief."}, []
    for number in range(5):
        talk.append({"role": ("user", "assistant")[number % 2], "content": f" turn {number} \ufdd0\n"})
        for turns in (talk, [system, *talk]):
            row = {"id": "a", "conversations": turns, "model": "m", "sampling": {"temperature": 1}}
            assert is_plain_row(row)
            assert to_conversation(row).messages == check_messages(messages_of(row))
    for turns in ([], [system], talk[1:], [talk[0]] * 2, [talk[0], system], [{**talk[0], "content": " "}]):
        assert not is_plain_row({"conversations": turns})


@settings(max_examples=150, deadline=None)
@given(JSON | st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}, optional={"id": JSON, "tools": JSON}))
def test_any_row_is_a_conversation_or_refused(row: Any) -> None:
    refused: RowRejected | None = None
    try:
        conversation = to_conversation(row)
    except RowRejected as error:
        refused = error
    if refused is not None:
        assert refused.reason
        assert str(refused).isprintable()
        return
    assert all(isinstance(message["content"], str) for message in conversation.messages)
    text = json.dumps(to_row(conversation), ensure_ascii=False)
    text.encode("utf-8")
    assert to_conversation(json.loads(text)) == conversation


# ------------------------------------------------------------------------------------------------------------ the files

ROWS = [{"prompt": f"q{i}", "response": "ü\n\u2028"} for i in range(5)]


def read(path: Path) -> list[Row | BadRow]:
    with RowFile(path) as rows:
        return list(rows)


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_jsonl(tmp_path: Path, ending: str, mark: str) -> None:
    path = write(tmp_path / "a", mark + lines(ROWS).replace("\n", ending) + "\n\n" + json.dumps({"prompt": "last"}))
    rows = read(path)
    assert rows[:5] == [Row(i + 1, row) for i, row in enumerate(ROWS)]
    assert rows[5] == Row(8, {"prompt": "last"})


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n \n"])
def test_array(tmp_path: Path, indent: int | None, mark: str) -> None:
    rows = read(write(tmp_path / "a", mark + json.dumps(ROWS, indent=indent, ensure_ascii=False)))
    assert [row.value for row in rows if isinstance(row, Row)] == ROWS
    first = 2 * (mark == "\n \n") + (2 if indent else 1)
    assert [row.line for row in rows] == [first + (4 * i if indent else 0) for i in range(5)]


def test_pretty_printed_objects(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a", "".join(json.dumps(row, indent=1) + "\n" for row in ROWS)))
    assert rows == [Row(1 + 4 * i, row) for i, row in enumerate(ROWS)]


def test_gzip_by_content_not_by_name(tmp_path: Path) -> None:
    assert [r.line for r in read(write(tmp_path / "plain.jsonl", gzip.compress(lines(ROWS).encode())))] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [Row(i + 1, row) for i, row in enumerate(ROWS)]
    damaged = write(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="not a readable parquet file"):
        read(damaged)


def test_bad_lines_keep_their_place_and_the_others_are_read(tmp_path: Path) -> None:
    data = b'{"a": 1}\n{"a": \n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}\n'
    rows = read(write(tmp_path / "a", data))
    assert rows[0] == Row(1, {"a": 1})
    assert rows[4] == Row(5, {"a": 2})
    assert [(r.line, r.reason) for r in rows if isinstance(r, BadRow)] == [
        (2, "not-json"),
        (3, "not-utf8"),
        (4, "nested-too-deeply"),
    ]
    assert isinstance(rows[2], BadRow)
    assert rows[2].detail == "byte 0xff at column 8 is not UTF-8"


def test_a_huge_line_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reading, json_values):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(reading, "CHUNK", 64)
    rows = read(write(tmp_path / "a", lines([{"a": 1}, {"a": "x" * 5000}, {"a": 2}])))
    assert rows == [Row(1, {"a": 1}), BadRow(2, "row-too-large", "longer than 0 MiB"), Row(3, {"a": 2})]
    with pytest.raises(DataError, match=":1: a row longer than 0 MiB"):
        read(write(tmp_path / "b", json.dumps([{"a": "x" * 5000}])))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a: empty; expected rows of json or jsonl"),
        (b" \n\n", "a: empty"),
        (b'[{"a": 1},\n {"a": }]', "a:2: not valid JSON"),
        (b'[{"a": 1},\n', "a:2: the file ends inside its array"),
        (b'[{"a": 1}]\n]', "a:2: expected the end of the file"),
        (b'[{"a": 1},\n"\xff"]', "a:2: byte 0xff is not UTF-8"),
        (b"[" * 100_000, "a:1: more levels of nesting"),
        (b"[" + b"1" * 5000 + b"]", "a:1: not valid JSON: Exceeds the limit"),
        (gzip.compress(lines(ROWS).encode(), mtime=0)[:-12], "a: damaged or truncated gzip file"),
        (gzip.compress(lines(ROWS).encode(), mtime=0)[:20] + b"xx", "a: damaged or truncated gzip file"),
        (b"PK\x03\x04....", "a: a zip archive; expected UTF-8 json or jsonl"),
        ("\ufeff{}".encode("utf-16-le"), "a: UTF-16 text"),
        (b"\x28\xb5\x2f\xfd....", "a: zstd-compressed"),
    ],
)
def test_files_that_cannot_be_read_to_their_end(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a", data))


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: No such file"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match="Is a directory"):
        read(tmp_path)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=30), max_size=3), min_size=1, max_size=8))
def test_arrays_and_lines_read_the_same_whatever_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, rows: Any
) -> None:
    directory = tmp_path_factory.mktemp("rows")
    old = json_values.CHUNK
    try:
        for chunk in (1, 7, 1 << 16):
            json_values.CHUNK = chunk
            for ascii_only in (True, False):
                array = write(directory / "a", json.dumps(rows, ensure_ascii=ascii_only).encode("utf-8", "replace"))
                flat = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
                lined = write(directory / "l", flat.encode("utf-8", "replace"))
                expected = json.loads(array.read_bytes())
                assert [row.value for row in read(array) if isinstance(row, Row)] == expected
                assert [row.value for row in read(lined) if isinstance(row, Row)] == expected
    finally:
        json_values.CHUNK = old


def test_progress_reaches_the_size_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a", lines(ROWS))
    with RowFile(path) as rows:
        assert rows.num_bytes == path.stat().st_size
        list(rows)
        assert rows.bytes_read == rows.num_bytes
