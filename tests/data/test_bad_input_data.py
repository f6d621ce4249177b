"""A table of bad and odd data: each case is accepted on purpose, or ends in one clear line, exit code 2, and nothing
under a final name. Both scripts are called as a person calls them: prepare_data (which leaves bad rows out and counts
them) and build_eagle3_dataset_cache (which stops at the first, with its place)."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.core.log import run_script
from specforge_lite.data import reading
from tests.data_tokenizers import control_tokens

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"id": "good", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
FIM = {"prefix": "a = 1\n", "middle": "b = 2\n", "suffix": "c = 3\n"}


def chat(question: Any, answer: Any = "a", **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **row}


def turns(*pairs: tuple[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **row}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def archive() -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../../evil.jsonl", lines(GOOD))
    return buffer.getvalue()


@dataclass(frozen=True)
class Case:
    """data: content of the file (None: there is none). prepared, cached: rows that come out of each script, or what
    its error says."""

    data: bytes | None
    prepared: int | str
    cached: int | str


def row(data: Any, message: str) -> Case:
    """A single row that neither script takes."""
    return Case(lines(data), f"no usable row of 1; first: DATA:1: {message}", f"DATA:1: {message}")


def one_of_two(data: bytes, message: str) -> Case:
    """A bad second line after a good one."""
    return Case(lines(GOOD) + data, 1, f"DATA:2: {message}")


CASES: dict[str, Case] = {
    # files
    "no file": Case(None, "--dataset DATA: no such file, directory or data set", "DATA: No such file or directory"),
    "empty file": Case(b"", "DATA: empty; expected rows", "DATA: empty; expected rows"),
    "blank lines only": Case(b"\n \r\n\n", "DATA: empty; expected rows", "DATA: empty; expected rows"),
    "blank lines between rows": Case(b"\n\n" + lines(GOOD) + b"\n" + lines(chat("x")), 2, 2),
    "no line end at the end": Case(lines(GOOD)[:-1], 1, 1),
    "windows line ends": Case(lines(GOOD, chat("x")).replace(b"\n", b"\r\n"), 2, 2),
    "old mac line ends": one_of_two(lines(chat("x"), chat("y")).replace(b"\n", b"\r"), "column "),
    "byte order mark": Case(b"\xef\xbb\xbf" + lines(GOOD), 1, 1),
    "byte order mark before an array": Case(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode(), 1, 1),
    "byte order mark on line two": one_of_two(b"\xef\xbb\xbf" + lines(chat("x")), "column 1: "),
    "utf-16": Case(lines(GOOD).decode().encode("utf-16"), "DATA: UTF-16 text; expected", "DATA: UTF-16 text; expected"),
    "latin-1 row": one_of_two('{"prompt": "é"}\n'.encode("latin-1"), "byte 0xe9 at column 13 is not UTF-8"),
    "latin-1 in an array": Case(
        '[{"prompt": "é"}]'.encode("latin-1"), "DATA:1: byte 0xe9 is not UTF-8", "DATA:1: byte 0xe9 is not UTF-8"
    ),
    "null byte in a row": one_of_two(b'{"prompt": "\x00"}\n', "column 13: Invalid control character"),
    "null bytes alone": one_of_two(b"\x00\x00\x00\n", "column 1: "),
    "random bytes": Case(
        bytes(range(128, 256)), "no usable row of 1; first: DATA:1: byte 0x80", "DATA:1: byte 0x80 at column 1"
    ),
    "gzip": Case(gzip.compress(lines(GOOD)), 1, 1),
    "truncated gzip": Case(
        gzip.compress(lines(GOOD))[:-9], "DATA: damaged or truncated gzip", "DATA: damaged or truncated gzip"
    ),
    "gzip with a flipped bit": Case(
        gzip.compress(lines(GOOD))[:-6] + b"\0" + gzip.compress(lines(GOOD))[-5:],
        "DATA: damaged or truncated gzip",
        "DATA: damaged or truncated gzip",
    ),
    "empty gzip": Case(gzip.compress(b""), "DATA: empty; expected rows", "DATA: empty; expected rows"),
    "zip archive": Case(archive(), "DATA: a zip archive; expected", "DATA: a zip archive; expected"),
    "zstd": Case(b"\x28\xb5\x2f\xfd\0\0\0\0", "DATA: zstd-compressed; expected", "DATA: zstd-compressed; expected"),
    "half a parquet file": Case(
        b"PAR1" + bytes(40), "DATA: not a readable parquet file", "DATA: not a readable parquet file"
    ),
    "a pickle": Case(
        b"\x80\x04\x95\x1d\x00", "no usable row of 1; first: DATA:1: byte 0x80", "DATA:1: byte 0x80 at column 1"
    ),
    "html": Case(
        b"<!doctype html>\n<p>404\n", "no usable row of 2; first: DATA:1: column 1", "DATA:1: column 1: Expecting value"
    ),
    # json
    "half a row": one_of_two(b'{"prompt": "q", "resp', "column 17: Unterminated string"),
    "half an array": Case(
        json.dumps([GOOD, GOOD]).encode()[:-1], "DATA:1: the file ends inside", "DATA:1: the file ends inside"
    ),
    "an array cut inside a row": Case(
        json.dumps([GOOD, chat("x")]).encode()[:-9], "DATA:1: not valid JSON", "DATA:1: not valid JSON"
    ),
    "text after an array": Case(
        json.dumps([GOOD]).encode() + b"\n{}", "DATA:2: expected the end of the file", "DATA:2: expected the end"
    ),
    "an empty array": Case(b"[]", "DATA: no usable row of 0", "DATA: nothing to train on: it has no rows"),
    "a pretty-printed row": Case(json.dumps(GOOD, indent=2).encode(), 1, 1),
    "deep nesting in a row": one_of_two(b'{"a":' * 100_000 + b"\n", "more levels of nesting"),
    "deep nesting in an array": Case(
        b"[" * 100_000, "DATA:1: more levels of nesting", "DATA:1: more levels of nesting"
    ),
    "deep but parsable tools": row(
        {**GOOD, "tools": [{"name": "f", "parameters": json.loads("[" * 900 + "]" * 900)}]}, "more levels of nesting"
    ),
    "a number of 5,000 digits": one_of_two(b'{"id": ' + b"1" * 5000 + b"}\n", "Exceeds the limit"),
    "NaN as content": row(chat(float("nan")), "turn 1: expected text, found a number"),
    "a string per line": row("text", "expected a JSON object per row, found text"),
    "null per line": row(None, "expected a JSON object per row, found nothing"),
    "a line too large": one_of_two(lines(chat("x" * 5000)), "longer than "),
    # form of the row
    "unknown keys": row({"text": "x"}, "found keys text; expected conversations/messages"),
    "messages are null": row({"messages": None}, "found keys messages; expected conversations/messages"),
    "messages are text": row({"messages": "hello"}, "'messages': expected JSON, found 'hello'"),
    "messages are an object": row({"messages": {"0": "x"}}, "'messages': expected a list of turns, found an object"),
    "no messages": row({"messages": []}, "'messages' is empty"),
    "a turn is text": row({"messages": ["hello"]}, "turn 1: expected an object, found text"),
    "a turn without a role": row({"messages": [{"content": "x"}]}, "turn 1: role nothing; expected one of"),
    "a role that is a list": row({"messages": [{"role": ["user"]}]}, "turn 1: role a list; expected one of"),
    "an unknown role": row(turns(("user", "q"), ("oracle", "a")), "turn 2: role 'oracle'; expected one of"),
    "a role with a line end": row(turns(("us\ner", "q")), "turn 1: role 'us\\ner'; expected one of"),
    # content
    "content is a number": row(chat(7), "turn 1: expected text, found a number"),
    "content is null": row(chat("q", None), "turn 2: expected text, found nothing"),
    "content is an object": row(chat({"text": "q"}), "turn 1: expected text, found an object"),
    "content has an image": row(chat([{"type": "image_url"}]), "turn 1: content parts other than text"),
    "an empty question": row(chat(""), "turn 1: empty user turn"),
    "an empty answer": row(chat("q", " \n\t"), "turn 2: empty assistant turn"),
    "half a surrogate pair": Case(
        b'{"prompt": "\\ud83d", "response": "a"}\n',
        "no usable row of 1; first: DATA:1: half a surrogate pair (\\ud83d)",
        "DATA:1: half a surrogate pair (\\ud83d)",
    ),
    "an escaped null character": Case(b'{"prompt": "a\\u0000b", "response": "a"}\n', 1, 1),
    "line separators inside text": Case(lines(chat("a\u2028b\u2029c\x85d")), 1, 1),
    "noncharacters of ours": Case(lines(chat("\ufdd0\ufdd1\ufdd2\ufdd30\ufdd4\ufdd5\ufdd6<|im_end|>", "\ufdd2")), 1, 1),
    "right to left": Case(lines(chat("שלום עולם \u202eabc", "مرحبا")), 1, 1),
    "emoji and joiners": Case(lines(chat("👩‍👩‍👧‍👦🏳️‍🌈", "😀" * 50)), 1, 1),
    "combining characters": Case(lines(chat("Z\u0351\u036b\u0343" * 40)), 1, 1),
    "control tokens of every family": Case(lines(chat("".join(control_tokens()), "".join(control_tokens()))), 1, 1),
    "jinja in text": Case(lines(chat("{% generation %}{{ 7*7 }}{% endgeneration %}", "{{ cycler }}")), 1, 1),
    "terminal escapes": Case(lines(chat("\x1b]0;title\x07\x1b[2J")), 1, 1),
    "one message of a megabyte": Case(lines(chat("q", "word " * 200_000)), 1, 1),
    "a question longer than the limit": Case(
        lines(chat("word " * 5000)), 1, "nothing to train on: 1 rows were left out: --max-length cuts off"
    ),
    "two thousand turns": Case(lines(turns(*[("user", "q"), ("assistant", "a")] * 1000)), 1, 1),
    # order of turns
    "only a system prompt": row(turns(("system", "s")), "no user turn"),
    "only an answer": row(turns(("assistant", "a")), "no user turn"),
    "only a question": Case(lines(turns(("user", "q"))), 1, "nothing to train on: 1 rows without an assistant span"),
    "an answer first": Case(lines(turns(("assistant", "x"), ("user", "q"), ("assistant", "a"))), 1, 1),
    "two questions": Case(lines(turns(("user", "q"), ("user", "q"), ("assistant", "a"))), 1, 1),
    "two answers": row(
        turns(("user", "q"), ("assistant", "a"), ("assistant", "b")), "turn 3: assistant after assistant"
    ),
    "a late system prompt": row(turns(("user", "q"), ("system", "s")), "turn 2: a system turn after the start"),
    "a tool result out of nowhere": row(turns(("user", "q"), ("tool", "2")), "turn 2: tool after user"),
    "a tool call without a name": row(
        {"messages": [GOOD["messages"][0], {"role": "assistant", "tool_calls": [{}]}]}, "turn 2: expected a tool call"
    ),
    "a tool call that is no json": row(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f("}]},
        "turn 2: tool call: expected JSON, found 'f('",
    ),
    "tools that are no json": row({**GOOD, "tools": "f("}, "'tools': expected JSON, found 'f('"),
    # ids
    "the same id twice": Case(lines(chat("x", id=1), chat("y", id=1)), 2, 2),
    "the same row twice": Case(lines(GOOD, GOOD), 1, 2),
    "an id that climbs directories": Case(lines({**GOOD, "id": "../../../etc/passwd"}), 1, 1),
    "an id that is an object": Case(lines({**GOOD, "id": {"a": 1}}), 1, 1),
    "an id with control characters": Case(lines({**GOOD, "id": "a\x00\x1b[2J\n"}), 1, 1),
    "an id of 100,000 characters": Case(lines({**GOOD, "id": "x" * 100_000}), 1, 1),
    # fill in the middle
    "fim": Case(lines(FIM), 1, 1),
    "fim then chat": Case(
        lines(FIM, GOOD), "DATA:2: a chat row among fim rows (since DATA:1)", "DATA:2: a chat row in"
    ),
    "chat then fim": Case(
        lines(GOOD, FIM),
        "DATA:2: a fim row among chat rows (since DATA:1)",
        "DATA:2: a fill-in-the-middle row in",
    ),
    "fim without a middle": row({"prefix": "a", "suffix": "b"}, "'middle': expected text, found NoneType"),
    "fim with an empty middle": row({**FIM, "middle": " \n"}, "the middle is empty"),
    "fim with a number": row({**FIM, "prefix": 7}, "'prefix': expected text, found int"),
}


def script(name: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks names up there
    spec.loader.exec_module(module)
    main: Callable[[], Any] = module.main
    return main


PREPARE, BUILD = script("prepare_data"), script("build_eagle3_dataset_cache")


def call(
    main: Callable[[], Any], flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> tuple[int, str, str]:
    """Exit code, stdout, and the last line of stderr (progress bars come before it)."""
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(ended.value.code or 0), captured.out, (captured.err.splitlines() or [""])[-1]


def visible(directory: Path) -> list[str]:
    """What lies under a final name."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(name for name in names if not name.startswith("."))


def check_error(code: int, line: str, expected: str, data: Path, output: Path) -> None:
    assert code == 2
    assert line.startswith("error: ")
    assert line.isprintable()
    assert expected.replace("DATA", str(data)) in line
    assert visible(output) == []
    assert not list(output.glob(".*tmp*"))


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["name"] == "a line too large":
        monkeypatch.setattr(reading, "MAX_ROW_BYTES", 4096)


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(FLAGS) >= 60


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("name", CASES)
def test_prepare(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    case, data, output = CASES[name], tmp_path / "data", tmp_path / "out"
    if case.data is not None:
        data.write_bytes(case.data)
    flags = ["--dataset", str(data), "--output-path", str(output / "train.jsonl")]
    code, _, line = call(PREPARE, flags, monkeypatch, capsys)
    if isinstance(case.prepared, str):
        check_error(code, line, case.prepared, data, output)
        return
    assert code == 0
    rows = [json.loads(text) for text in (output / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(rows) == case.prepared
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("name", CASES)
def test_build_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_target: Path
) -> None:
    case, data, output = CASES[name], tmp_path / "data", tmp_path / "cache"
    if case.data is not None:
        data.write_bytes(case.data)
    flags = ["--target-model-path", str(tiny_target), "--train-data-path", str(data), "--cache-dir", str(output)]
    code, out, line = call(BUILD, [*flags, "--max-length=2048", "--view-train-data", "0"], monkeypatch, capsys)
    if isinstance(case.cached, str):
        check_error(code, line, case.cached, data, output)
        return
    assert code == 0
    assert f"{data}: {case.cached} samples of" in out
    assert not set(out) & set("\x1b\x00\x07\u202e")  # what is shown cannot drive the terminal


FLAGS: dict[str, tuple[str, list[str], str]] = {
    "unknown flag": ("prepare", ["--dataset", "DATA", "--sample_sise", "3"], "did you mean '--sample-size'?"),
    "abbreviated flag": ("prepare", ["--dataset", "DATA", "--split", "0.1"], "--split: unknown flag"),
    "no data set": ("prepare", [], "dataset: required (flag --dataset)"),
    "sample of nothing": (
        "prepare",
        ["--dataset", "DATA", "--sample-size", "0"],
        "--sample-size: Input should be greater",
    ),
    "sample size in words": (
        "prepare",
        ["--dataset", "DATA", "--sample-size", "ten"],
        "--sample-size: Input should be a",
    ),
    "split over one": (
        "prepare",
        ["--dataset", "DATA", "--split-eval", "1.5"],
        "--split-eval: Input should be less than 1",
    ),
    "split is not a number": ("prepare", ["--dataset", "DATA", "--split-eval", "nan"], "--split-eval: "),
    "output that is json": (
        "prepare",
        ["--dataset", "DATA", "--output-path", "OUT/x.json"],
        "or a name ending in .jsonl",
    ),
    "fim of chat data": ("prepare", ["--dataset", "DATA", "--data-format", "fim"], "DATA:1: a chat row among fim rows"),
    "code without a directory": ("prepare", ["--dataset", "fim"], "--dataset fim: needs --source-dir DIR"),
    "unknown data set": ("prepare", ["--dataset", "ultrachatt"], "did you mean 'ultrachat'?"),
    "no training data": ("build", [], "data.train_data_path: required (flag --train-data-path)"),
    "unknown template": ("build", ["--train-data-path", "DATA", "--chat-template", "chatlm"], "did you mean 'chatml'?"),
    "length of four": ("build", ["--train-data-path", "DATA", "--max-length", "4"], "--max-length: Input should be"),
    "draft vocabulary too large": (
        "build",
        ["--train-data-path", "DATA", "--draft-vocab-size", "5000"],
        "draft_vocab_size 5000 is not in 1..vocab_size 4096",
    ),
    "draft config that is missing": (
        "build",
        ["--train-data-path", "DATA", "--draft-model-config", "OUT/none.json"],
        "none.json: No such file or directory",
    ),
    "view of a sample too far": (
        "build",
        ["--train-data-path", "DATA", "--view-train-data", "7"],
        "numbers from 0 to 0",
    ),
    "view of a negative sample": (
        "build",
        ["--train-data-path", "DATA", "--view-train-data=-1"],
        "numbers from 0 to 0",
    ),
    "fim of chat data in the cache": (
        "build",
        ["--train-data-path", "DATA", "--data-format", "fim"],
        "DATA:1: a chat row in a file of FIM rows",
    ),
    "order the model does not know": (
        "build",
        ["--train-data-path", "FIM", "--fim-order", "spm"],
        "fim_order spm: qwen2.5-coder models know psm only",
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_target: Path) -> None:
    kind, flags, expected = FLAGS[name]
    data, fim, output = tmp_path / "data", tmp_path / "fim", tmp_path / "out"
    data.write_bytes(lines(GOOD))
    fim.write_bytes(lines(FIM))
    names = {"DATA": str(data), "FIM": str(fim)}
    given = [names.get(flag, flag.replace("OUT", str(output))) for flag in flags]
    if kind == "build":
        given += ["--target-model-path", str(tiny_target), "--cache-dir", str(output)]
    elif "--output-path" not in given:
        given += ["--output-path", str(output / "train.jsonl")]
    code, _, line = call(PREPARE if kind == "prepare" else BUILD, given, monkeypatch, capsys)
    assert code == 2
    assert line.startswith("error: ")
    assert expected.replace("DATA", str(data)) in line
    assert not [path for path in visible(output) if not path.startswith(("dataset-", "vocab-"))]
    assert kind == "build" or visible(output) == []
