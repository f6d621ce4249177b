"""The viewer: what it colours, and that data cannot drive a terminal or a browser."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_lite.core.errors import DataError
from specforge_lite.core.sections import DataSection
from specforge_lite.data.cache import open_or_build_dataset
from specforge_lite.data.store import TokenizedDataset
from specforge_lite.data.view import print_samples, runs, visible, write_html
from specforge_lite.types import TokenizedSample
from tests.data_tokenizers import byte_level

EVIL = "</pre><script>alert('x')</script>\x1b[31m\u202e&amp;"


def decode(ids: list[int]) -> str:
    return str(byte_level().decode(ids))


@pytest.fixture
def dataset(tmp_path: Path) -> TokenizedDataset:
    rows = [{"id": "<b>", "prompt": "Hi", "response": EVIL}, {"id": "two", "prompt": "Hi é", "response": "It is"}]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_or_build_dataset(data, byte_level(), DataSection(cache_dir=tmp_path / "cache", chat_template="chatml"))


def test_runs(dataset: TokenizedDataset) -> None:
    assert [(run.text, run.trained, run.num_tokens) for run in runs(dataset[1], decode)] == [
        ("<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n", False, 14),
        ("It is<|im_end|>", True, 3),
        ("\n", False, 1),
    ]


def test_runs_put_together_are_the_text() -> None:
    ids = byte_level()("😀é is 😀", add_special_tokens=False)["input_ids"]
    for bits in range(0, 2 ** len(ids), 37):
        mask = torch.tensor([bool(bits >> i & 1) for i in range(len(ids))])
        found = runs(TokenizedSample("x", torch.tensor(ids), mask), decode)
        assert "".join(run.text for run in found) == "😀é is 😀"
        assert sum(run.num_tokens for run in found) == len(ids)


def test_control_characters_are_shown_not_obeyed() -> None:
    assert visible("a\x1b[31m\x00\tb\n\u202e\x7f\x9b") == "a␛[31m␀\tb\n\ufffd\ufffd\ufffd"


def test_terminal(dataset: TokenizedDataset, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    print_samples(dataset, [1], decode)
    plain = capsys.readouterr().out
    assert "sample 1 (id two, line 2): 18 tokens, 3 trained (17%)" in plain
    assert "<|im_start|>assistant\n⟦It is<|im_end|>⟧" in plain
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_samples(dataset, [1, 0], decode)
    coloured = capsys.readouterr().out
    assert "\x1b[32mIt is<|im_end|>\x1b[0m" in coloured  # green: trained
    assert "\x1b[31m<|im_start|>user" in coloured  # red: masked
    assert "␛[31m" in coloured  # the data's own escape is a symbol


def test_html(dataset: TokenizedDataset, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_html(dataset, [0, 1], decode, page)
    text = page.read_text(encoding="utf-8")
    assert "script" not in text.replace("&lt;script&gt;", "").replace("&lt;/script&gt;", "")
    assert "src=" not in text.replace("default-src", "")
    assert "href" not in text

    class Reader(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.kind, self.found = "", []  # type: str, list[tuple[str, str]]

        def handle_starttag(self, tag: str, attributes: list[Any]) -> None:
            self.kind = dict(attributes).get("class", "") if tag == "span" else ""

        def handle_endtag(self, tag: str) -> None:
            self.kind = ""

        def handle_data(self, data: str) -> None:
            if self.kind:
                self.found.append((self.kind, data))

    reader = Reader()
    reader.feed(text)
    assert ("t", visible(EVIL) + "<|im_end|>") in reader.found
    assert ("t", "It is<|im_end|>") in reader.found
    assert sum(kind == "m" for kind, _ in reader.found) == 5  # the legend, and before and after each answer


def test_numbers_outside_the_dataset(dataset: TokenizedDataset, tmp_path: Path) -> None:
    for index in (-1, 2):
        with pytest.raises(DataError, match=f"--view-train-data {index}: expected numbers from 0 to 1"):
            print_samples(dataset, [0, index], decode)
        with pytest.raises(DataError, match="expected numbers"):
            write_html(dataset, [index], decode, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
