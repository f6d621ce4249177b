"""report.html without a browser: the arithmetic of charts, escaping, which sections appear, and what is refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge_lite.core.errors import DataError
from specforge_lite.evaluation.compare_generation import Decoding, Sample
from specforge_lite.inference.output import token_texts
from specforge_lite.report import write_report
from specforge_lite.report.charts import Bar, Series, bar_chart, line_chart, nice_ticks, short_number, thin
from specforge_lite.report.decoding import generations_section
from specforge_lite.report.markup import escape, tag
from specforge_lite.report.values import read_decoding
from tests.report_data import EVALUATION, SPEEDUP_ROWS, metric_rows

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "hr", "line", "rect", "circle", "path"}


class Text(HTMLParser):
    """Collects text and elements, and checks that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, name: str, attrs: Any) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attrs: Any) -> None:
        self.elements.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


# --------------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (0.3, 9.1, [0, 2.5, 5, 7.5, 10]),
        (2.0, 10.0, [2, 4, 6, 8, 10]),
        (1e-5, 9e-5, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (-3.0, 4.0, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_always_enclose_and_are_few(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    slack = 1e-6 * max(span, abs(low))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack


def test_ticks_of_a_single_value() -> None:
    assert nice_ticks(3.0, 3.0)[0] < 3.0 < nice_ticks(3.0, 3.0)[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1234, "1234"), (15000, "15k"), (2.5e6, "2.5M"), (1e-4, "1e-4"), (0.0015, "1.5e-3"),
     (6.3e-6, "6.3e-6"), (1.9e9, "1.9G"), (0.0625, "0.0625")],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_thinning_takes_means() -> None:
    assert thin([1, 2, 3, 4, 5, 6], [1, 3, 5, 7, 0, 2], limit=3) == ([1.5, 3.5, 5.5], [2, 6, 1])
    assert thin([1, 2], [3, 4], limit=3) == ([1, 2], [3, 4])


def test_line_runs_through_its_points() -> None:
    """Axes 0..10 by 0..1: the plot spans 40..332 across and 176..10 upwards."""
    chart = line_chart("t", [Series("a", [0, 5, 10], [0.0, 1.0, 0.5], "red")], floor=0, ceiling=1)
    assert 'd="M40.0,176.0L186.0,10.0L332.0,93.0"' in chart


def test_a_value_that_is_not_finite_interrupts_the_line() -> None:
    chart = line_chart("t", [Series("a", [0, 1, 2, 3, 4], [0, 1, math.nan, 1, 0], "red")])
    assert chart.count("<path") == 2
    assert "nan" not in chart.lower()
    assert "No finite value" in line_chart("t", [Series("a", [0, 1], [math.nan, math.inf], "red")])


def test_bars_are_in_proportion() -> None:
    chart = bar_chart("t", [Bar("a", 1.0, "1"), Bar("b", 0.5, "0.5"), Bar("c", 0.0, "0")], full=1.0, label_width=100)
    widths = [float(w) for w in re.findall(r'class="bar"[^>]*width="([\d.]+)"', chart)]
    assert widths[1] / widths[0] == pytest.approx(0.5, abs=0.01)
    assert widths[2] == 0.5  # a hairline, so that zero is seen as a bar


# ------------------------------------------------------------------------------------------------------------- escaping


def test_plain_text_is_escaped_everywhere() -> None:
    page = tag("p", {"title": '"><script>', "class": None}, "<b>&", tag("i", None, "ok"))
    assert page == '<p title="&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;<i>ok</i></p>'


def test_unprintable_characters_become_pictures() -> None:
    assert escape("a\x00\x1b\x7f\ud800\tb\n") == "a\u2400\u241b\ufffd\ufffd\tb\n"


@given(st.lists(st.text(st.characters()), min_size=1, max_size=8))
def test_any_generation_comes_back_as_text(texts: list[str]) -> None:
    section = generations_section([Sample("".join(texts), tuple(texts), (1,) * len(texts))])
    parsed = Text(section)
    assert {name for name, _ in parsed.elements} <= {"p", "article", "span", "b"}
    expected = "".join(texts)
    for code in [*range(9), *range(11, 32)]:
        expected = expected.replace(chr(code), chr(0x2400 + code))
    expected = re.sub("[\x7f-\x9f\ud800-\udfff]", "\ufffd", expected)
    assert parsed.text.endswith(expected + expected)


def test_tokens_are_grouped_by_pass() -> None:
    """Passes of 3, 1 and 2 tokens, the last one cut after its first: own tokens are c and d, e was drafted."""
    section = generations_section([Sample("p", ("a", "b", "c", "d", "e"), (3, 1, 2))])
    body = section[section.index('<p class="answer"') :]
    assert re.findall(r'<span class="pass pass-(\d)" title="([^"]+)">', body) == [
        ("0", "pass 1: 3 tokens"), ("1", "pass 2: 1 token"), ("2", "pass 3: 2 tokens"),
    ]  # fmt: skip
    assert re.findall(r'<span class="own">(.)</span>', body) == ["c", "d"]
    assert re.findall(r"<span>(.)</span>", body) == ["a", "b", "e"]


def test_token_texts_join_to_the_decoded_text(tiny_target: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    text = "Two  spaces, é, 漢字, 🎉!\n\tdef f():<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "" in texts  # bytes of one character: all of it is with the last of them
    assert "漢" in "".join(t for t in texts if t)


# ----------------------------------------------------------------------------------------------------------------- page


def test_all_parts_together(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in metric_rows()) + '{"step": 21')  # killed while writing
    decoding = Decoding(2.5, 1, samples=(Sample("q", ("a", "b"), (2,)),), accepted_per_position=(0.75, 0.25))
    path = write_report(
        tmp_path / "new" / "report.html",
        title="A run",
        metrics_path=metrics,
        evaluation=EVALUATION,
        decoding=decoding,
        speedup_rows=SPEEDUP_ROWS,
        provenance={
            "command": ["x", "--wandb-key", "hf_abcdefghijklmnopqrstu"],
            "wandb_api_key": "b" * 40,
            "git": {"commit": "a" * 40},
            "config": {"optimizer": {"lr": 0.5}},
        },
    )
    page = path.read_text()
    parsed = Text(page.removeprefix("<!doctype html>\n"))
    for words in ("Loss per draft step", "Learning rate", "75%", "33%", "2.50", "1.90×", "optimizer.lr", "7,10,60"):
        assert words in parsed.text, words
    assert "hf_abcdefghijklmnopqrstu" not in page
    assert "b" * 40 not in page
    assert "a" * 40 in page
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    page = write_report(tmp_path / "r.html", title="t", speedup_rows=SPEEDUP_ROWS).read_text()
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<iframe", page)
    for name, attributes in Text(page.removeprefix("<!doctype html>\n")).elements:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), name
    assert "default-src 'none'" in page.replace("&#x27;", "'")


@pytest.mark.parametrize(
    ("given_part", "heading"),
    [
        ({"evaluation": EVALUATION}, "Acceptance per position"),
        ({"decoding": {"acceptance_length": 2.0, "num_prompts": 3}}, "Acceptance per position"),
        ({"speedup_rows": SPEEDUP_ROWS}, "Speed-up"),
        ({"provenance": {"python": "3.11"}}, "The run"),
    ],
)
def test_only_what_is_given_has_a_section(tmp_path: Path, given_part: dict[str, Any], heading: str) -> None:
    page = write_report(tmp_path / "r.html", title="t", **given_part).read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == [heading]


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    assert (
        "no row of a training step"
        in write_report(tmp_path / "r.html", title="t", metrics_path=tmp_path / "m.jsonl").read_text()
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n{}\n", r"m\.jsonl:1: expected an object with a number 'step'"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', r"m\.jsonl:2: not JSON"),
        ("[1]\n", r"m\.jsonl:1: expected an object"),
    ],
)
def test_broken_metrics_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        write_report(tmp_path / "r.html", title="t", metrics_path=tmp_path / "m.jsonl")
    assert not (tmp_path / "r.html").exists()


GOOD = {"acceptance_length": 2, "num_prompts": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_prompts": 1}, "'acceptance_length' is missing"),
        ({"acceptance_length": 2, "nun_tokens": 3}, "unknown key 'nun_tokens'; did you mean 'num_tokens'"),
        ({**GOOD, "acceptance_length": "2"}, "acceptance_length: expected a number, found '2'"),
        ({**GOOD, "accepted_per_position": ["a"]}, "expected a list of numbers"),
        (
            {**GOOD, "samples": [{"prompt": "", "token_texts": ["a", "b"], "tokens_per_pass": [1]}]},
            r"samples\[0\]: 2 tokens, but tokens_per_pass adds up to 1",
        ),
        ({**GOOD, "samples": [{"prompt": ""}]}, "'token_texts' is missing"),
    ],
)  # fmt: skip
def test_decoding_values_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_decoding(values)


def test_decoding_survives_json() -> None:
    decoding = Decoding(2.5, 2, 40, "greedy", (0.5, 0.25), 2, 16, 40, 10.0, 5.0, (Sample("p", ("a",), (1,), "c"),))
    assert read_decoding(json.loads(json.dumps(decoding.to_dict()))) == decoding


def test_a_speedup_row_without_its_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="speed-up row 1: 'acc_length' is missing"):
        write_report(tmp_path / "r.html", title="t", speedup_rows=[{**SPEEDUP_ROWS[0], "acc_length": None}])


def test_the_script_finds_a_run_s_files(tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    for step in (9, 10):
        (run / f"step_{step}").mkdir(parents=True)
        (run / f"step_{step}" / "provenance.json").write_text(json.dumps({"started": f"at step {step}"}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metric_rows()))
    done = subprocess.run(
        [sys.executable, "scripts/make_report.py", "--run_dir", str(run)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text()
    assert "<h1>my-run</h1>" in page
    assert "at step 10" in page
    assert "Learning rate" in page


def test_the_script_names_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/make_report.py", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: neither metrics.jsonl nor step_N/provenance.json")
    assert done.stderr.count("\n") == 1
