"""Fill-in-the-middle: tokens and orders of each family, typed by hand; rows cut out of source code."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_lite.core.errors import DataError
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.data.conversations import RowRejected
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.fim import FAMILIES, FimRow, FimTokenizer, is_fim_row, recognise_family, to_fim_row
from specforge_lite.data.fim_source import FimSourceOptions, file_rows, fim_rows, python_spans
from specforge_lite.data.reading import BadRow
from tests.data_tokenizers import byte_level, sentencepiece_like

ROW = FimRow("x", "def add(", "one, two", "):\n")


def tokenizer_of(family: str) -> Any:
    if family == "codellama":
        return sentencepiece_like()
    tokens = FAMILIES[family]
    extra = (tokens.prefix, tokens.suffix, tokens.middle, *tokens.end, *((tokens.bos,) if tokens.bos else ()))
    return byte_level(extra=extra, all_control=False)


def marked(tokenizer: Any, row: FimRow, order: str, max_length: int = 2048) -> str:
    ids, mask, _ = FimTokenizer(TokenizerSpec.from_tokenizer(tokenizer), order, max_length)(row)
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return " ".join(("*" if bit else "") + token for token, bit in zip(tokens, mask))


P, S, M = "def Ġadd (", "): Ċ", "*one *, *Ġtwo"
GOLDENS = {
    ("qwen2.5-coder", "psm"): f"<|fim_prefix|> {P} <|fim_suffix|> {S} <|fim_middle|> {M} *<|endoftext|>",
    ("starcoder2", "psm"): f"<fim_prefix> {P} <fim_suffix> {S} <fim_middle> {M} *<|endoftext|>",
    ("starcoder2", "spm"): f"<fim_prefix> <fim_suffix> {S} <fim_middle> {P} {M} *<|endoftext|>",
    ("deepseek-coder", "psm"): (
        f"<｜begin▁of▁sentence｜> <｜fim▁begin｜> {P} <｜fim▁hole｜> {S} <｜fim▁end｜> {M} *<｜end▁of▁sentence｜>"
    ),
    ("codellama", "psm"): "<s> ▁<PRE> def ▁add( ▁<SUF> ):\n ▁<MID> *one, *▁two *▁<EOT>",
    ("codellama", "spm"): "<s> ▁<PRE> ▁<SUF> ):\n ▁<MID> def ▁add( *one, *▁two *▁<EOT>",
}


def test_every_family_and_order_has_a_golden() -> None:
    assert {(name, order) for name, family in FAMILIES.items() for order in family.orders} == set(GOLDENS)


@pytest.mark.parametrize(("family", "order"), GOLDENS)
def test_golden(family: str, order: str) -> None:
    tokenizer = tokenizer_of(family)
    assert recognise_family(tokenizer.get_vocab()).name == family
    assert marked(tokenizer, ROW, order) == GOLDENS[family, order]


def test_the_tiny_target(tiny_target: Path) -> None:
    """`<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>M<|endoftext|>`, as its README says."""
    tokenizer = load_tokenizer(str(tiny_target))
    ids, mask, _ = FimTokenizer(TokenizerSpec.from_tokenizer(tokenizer), "psm", 2048)(ROW)
    text = "<|fim_prefix|>def add(<|fim_suffix|>):\n<|fim_middle|>one, two<|endoftext|>"
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[mask]) == "one, two<|endoftext|>"


def test_an_order_the_family_does_not_know() -> None:
    with pytest.raises(DataError, match=r"fim_order spm: qwen2\.5-coder models know psm only"):
        marked(tokenizer_of("qwen2.5-coder"), ROW, "spm")


def test_a_middle_that_was_cut_off_has_no_end() -> None:
    value = {"id": "x", "prefix": "def add(", "middle": "one, two", "suffix": "):\n"}
    row = to_fim_row({**value, "finish_reason": "length"})
    assert row.to_row() == {**value, "finish_reason": "length"}
    expected = f"<fim_prefix> {P} <fim_suffix> {S} <fim_middle> {M}"
    assert marked(tokenizer_of("starcoder2"), row, "psm") == expected
    assert not to_fim_row({**value, "finish_reason": "stop"}).cut_off


LITERAL = "<fim_prefix>{prefix}<fim_middle><fim_suffix>{suffix}"


def test_a_literal_text_as_order() -> None:
    tokenizer = tokenizer_of("starcoder2")
    expected = f"<fim_prefix> {P} <fim_middle> <fim_suffix> {S} {M} *<|endoftext|>"
    assert marked(tokenizer, ROW, LITERAL) == marked(tokenizer, ROW, LITERAL + "{middle}") == expected
    assert marked(tokenizer, ROW, "{suffix}is{prefix}") == f"{S} is {P} {M} *<|endoftext|>"
    code = FimRow("x", "a <fim_middle>", "b", "<fim_suffix>")
    ids = FimTokenizer(TokenizerSpec.from_tokenizer(tokenizer), LITERAL, 2048)(code)[0].tolist()
    for token in ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"):  # in code they stay text
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1


def test_a_literal_text_for_a_tokenizer_of_no_family() -> None:
    tokenizer = byte_level(all_control=False, extra=("<end>", "<pre>"))
    assert marked(tokenizer, ROW, "<pre>{prefix}\n{suffix}") == f"<pre> {P} Ċ {S} {M} *<end>"


@pytest.mark.parametrize("order", ["pms", "{prefix}", "{prefix}{suffix}{suffix}", "{prefix}{middle}{suffix}"])
def test_an_order_that_is_none(order: str) -> None:
    with pytest.raises(DataError, match=r"expected psm, spm, or a text with \{prefix\} and \{suffix\}, once each"):
        marked(tokenizer_of("starcoder2"), ROW, order)


def test_a_tokenizer_without_the_tokens() -> None:
    with pytest.raises(DataError, match="no fill-in-the-middle tokens; known families: qwen2"):
        marked(byte_level(), ROW, "psm")


def test_control_tokens_in_code_stay_text() -> None:
    tokenizer = tokenizer_of("qwen2.5-coder")
    row = FimRow("x", 'a = "<|fim_suffix|>"\n', 'b = "<|endoftext|>"\n', "<|fim_middle|>")
    ids, mask, _ = FimTokenizer(TokenizerSpec.from_tokenizer(tokenizer), "psm", 2048)(row)
    for token in ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"):
        assert ids.tolist().count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert tokenizer.decode(ids[mask]) == row.middle + "<|endoftext|>"


@settings(max_examples=50, deadline=None)
@given(
    prefix=st.integers(0, 40),
    middle=st.integers(1, 20),
    suffix=st.integers(0, 40),
    max_length=st.integers(8, 120),
    order=st.sampled_from(["psm", "spm", LITERAL]),
)
def test_length(prefix: int, middle: int, suffix: int, max_length: int, order: str) -> None:
    """The middle is kept, context is cut at its far ends; every lost token is counted."""
    tokenizer = tokenizer_of("starcoder2")
    row = FimRow("x", "0" * prefix, "1" * middle, "2" * suffix)
    ids, mask, num_cut = FimTokenizer(TokenizerSpec.from_tokenizer(tokenizer), order, max_length)(row)
    whole = prefix + middle + suffix + 4
    assert len(ids) == min(whole, max_length)
    assert num_cut == max(0, whole - max_length)
    assert tokenizer.decode(ids[mask]) == (
        "1" * middle + "<|endoftext|>" if middle + 4 <= max_length else "1" * (max_length - 3)
    )
    if num_cut and middle + 4 < max_length:
        room = max_length - 4 - middle
        left, right = ids.tolist().count(ids_of(tokenizer, "0")), ids.tolist().count(ids_of(tokenizer, "2"))
        assert left + right == room
        assert left >= min(prefix, room // 2)
        assert right >= min(suffix, room // 2)


def ids_of(tokenizer: Any, text: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(text))


def test_cutting_keeps_what_is_next_to_the_hole() -> None:
    row = FimRow("x", "0123456789", "M", "abcdefghij")
    text = marked(tokenizer_of("qwen2.5-coder"), row, "psm", max_length=11)
    assert text == "<|fim_prefix|> 7 8 9 <|fim_suffix|> a b c <|fim_middle|> *M *<|endoftext|>"


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_recognised() -> None:
    assert to_fim_row({"id": 3, "prefix": "a", "middle": "b", "suffix": "c", "source": "f.py"}) == FimRow(
        "3", "a", "b", "c", "f.py"
    )
    infilling = {"task_id": "t/1", "prompt": "a", "suffix": "c", "canonical_solution": "b"}
    assert to_fim_row(infilling) == FimRow("t/1", "a", "b", "c")
    assert to_fim_row(to_fim_row(infilling).to_row()) == to_fim_row(infilling)
    assert not is_fim_row({"prompt": "a", "response": "b"})
    assert not is_fim_row(["prefix", "suffix"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prefix": "a", "middle": " \n", "suffix": "c"}, "empty-middle"),
        ({"prefix": "a", "suffix": "c"}, "content-not-text"),
        ({"prefix": 1, "middle": "b", "suffix": "c"}, "content-not-text"),
        ({"prefix": "a", "middle": "\ud83d", "suffix": "c"}, "lone-surrogate"),
        ({"prefix": "a"}, "unknown-form"),
    ],
)
def test_rejected_rows(row: Any, reason: str) -> None:
    with pytest.raises(RowRejected) as caught:
        to_fim_row(row)
    assert caught.value.reason == reason


CODE = '''import os

def one():
    """Doc."""
    x = 1
    return x

def two(): return 2

class A:
    async def three(self):
        if self:
            return 3
'''


def test_python_spans_by_hand() -> None:
    spans = python_spans(CODE)
    assert spans == {(4, 6), (4, 5), (5, 6), (11, 13)}  # bodies without docstring, their statements; no one-liners


def test_rows_of_a_file_put_together_again() -> None:
    rows = list(file_rows("a.py", CODE, FimSourceOptions(rows_per_file=100)))
    assert len(rows) >= 4
    for row in rows:
        assert isinstance(row, FimRow)
        assert row.prefix + row.middle + row.suffix == CODE
        assert row.middle.strip()
        assert row.source == "a.py"
        start, end = map(int, row.id.removeprefix("a.py:").split("-"))
        assert row.middle == "".join(CODE.splitlines(keepends=True)[start - 1 : end])
    assert len({row.id for row in rows if isinstance(row, FimRow)}) == len(rows)


def test_context_is_cut_at_line_ends() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    for row in file_rows("a.txt", text, FimSourceOptions(rows_per_file=5, max_context_chars=50)):
        assert isinstance(row, FimRow)
        assert len(row.prefix) <= 50
        assert len(row.suffix) <= 50
        assert row.prefix == "" or row.prefix.startswith("line ")
        assert row.suffix == "" or row.suffix.endswith("\n")


def test_a_directory(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "good.py": CODE,
        "deep/other.rs": "fn main() {\n    let x = 1;\n}\n",
        "bad.py": "def (:\n",
        "blank.c": "\n \n",
        "latin.py": b"# \xe9\nx = 1\n",
        "notes.txt": "not code\n",
        ".git/hooks.py": "x = 1\n",
        "site-packages/theirs.py": "x = 1\n",
        "tests/test_good.py": CODE,
        "tests.py": "def (:\n",
        "old.py": "print 'two'\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    everything = fim_rows(tmp_path, FimSourceOptions(exclude_dirs=()))
    assert {row.source.split("/")[0] for row in everything if isinstance(row, FimRow)} == {
        "good.py", "deep", "site-packages", "tests",
    }  # fmt: skip
    options = FimSourceOptions(rows_per_file=2, exclude_dirs=("site-packages", "tests"))
    rows = list(fim_rows(tmp_path, options))
    assert {row.source for row in rows if isinstance(row, FimRow)} == {"good.py", "deep/other.rs"}
    bad = [(row.reason, row.detail.split(":")[0]) for row in rows if isinstance(row, BadRow)]
    assert bad == [
        ("syntax-error", "bad.py"),
        ("empty-middle", "blank.c"),
        ("not-utf8", "latin.py"),
        ("syntax-error", "old.py"),
        ("syntax-error", "tests.py"),  # a file, not a directory of that name
    ]
    assert list(fim_rows(tmp_path, options)) == rows
    assert list(fim_rows(tmp_path, replace(options, seed=1))) != rows


def test_a_directory_without_code(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no source files; known endings: \.c "):
        list(fim_rows(tmp_path, FimSourceOptions()))
    with pytest.raises(DataError, match="none: no such directory"):
        list(fim_rows(tmp_path / "none", FimSourceOptions()))


def test_holes_in_the_standard_library_leave_parsable_files() -> None:
    """Putting the middle back gives code that parses, for real files."""
    source = Path(ast.__file__).parent / "json"
    rows = [row for row in fim_rows(source, FimSourceOptions(max_context_chars=10**6)) if isinstance(row, FimRow)]
    assert len(rows) >= 12
    for row in rows:
        ast.parse(row.prefix + row.middle + row.suffix)
