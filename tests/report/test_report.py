"""report.html without a browser: the arithmetic of charts, escaping, which sections appear, and what is refused."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_lite.core.errors import DataError
from specforge_lite.evaluation.compare_generation import Decoding, Sample
from specforge_lite.inference.output import token_texts
from specforge_lite.report import write_report
from specforge_lite.report.cards import (
    MAX_POINTS,
    bars_card,
    curves_card,
    render,
    short_number,
    thinned,
)
from specforge_lite.report.figures import Bar, Curve
from specforge_lite.report.page import generations_section
from specforge_lite.report.sources import read_decoding
from specforge_lite.report.speedup import headline, speedup_section
from specforge_lite.report.tables import Table, visible
from tests.report_data import EVALUATION, SPEEDUP_ROWS, metric_rows
from tests.training_runs import run_script

VOID = {"meta", "br", "hr"}


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
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1234, "1,234"), (886e6, "886,000,000"), (1e-4, "1×10⁻⁴"), (0.0015, "0.0015"),
     (4.9e-5, "4.9×10⁻⁵"), (0.0625, "0.0625"), (math.nan, "–")],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_thinning_takes_means() -> None:
    n = 2 * MAX_POINTS
    curve = thinned(Curve("a", "p", None, False, [float(i) for i in range(n)], [float(i % 2) for i in range(n)]))
    assert (len(curve.x), curve.x[:2], set(curve.y)) == (MAX_POINTS, [0.5, 2.5], {0.5})
    dots = Curve("a", "p", None, True, [0.0] * n, [0.0] * n)
    assert thinned(dots) is dots


def numbers_in(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_line_runs_through_its_points() -> None:
    """0, 1 and 0.5 at 0, 5 and 10: equal steps across, and the last point half way up."""
    card = curves_card("t", "", [Curve("a", "loss", None, False, [0, 5, 10], [0.0, 1.0, 0.5])], 0.0)
    (path,) = re.findall(r'<g id="[^"]*line-a">\s*<path d="([^"]+)"', str(card.chart))
    x0, y0, x1, y1, x2, y2 = numbers_in(path)
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y2 == pytest.approx(0.5 * (y0 - y1), rel=1e-3)
    assert card.legend == (("a", "0.5", "accent"),)


def test_a_value_that_is_not_finite_interrupts_the_line() -> None:
    curve = Curve("a", "loss", None, False, [0, 1, 2, 3, 4], [0, 1, math.nan, 1, 0])
    chart = str(curves_card("t", "", [curve], None).chart)
    (path,) = re.findall(r'line-a">\s*<path d="([^"]+)"', chart)
    assert path.count("M") == 2
    assert "nan" not in chart.lower()
    assert "No finite value" in curves_card("t", "", [Curve("a", "loss", None, False, [0], [math.inf])], None).note


def test_held_out_data_has_a_name_of_its_own() -> None:
    curves = [Curve("position 0", "loss", 0, False, [1, 2], [3.0, 2.0]), Curve("e", "loss", 0, True, [2], [2.5])]
    card = curves_card("Loss", "", curves, None)
    assert card.dots
    assert card.legend == (("position 0", "2 · held-out 2.5", "ramp-0"),)


def test_bars_are_in_proportion() -> None:
    chart = str(bars_card("t", [Bar("a", 1.0, "1"), Bar("b", 0.5, "0.5"), Bar("c", 0.0, "0")], limit=1.0).chart)
    widths = []
    for path in re.findall(r'bar-\d">\s*<path d="([^"]+)"', chart):
        across = numbers_in(path)[::2]
        widths.append(max(across) - min(across))
    assert widths[1] / widths[0] == pytest.approx(0.5, abs=0.01)
    assert widths[2] == pytest.approx(0, abs=0.01)
    assert 'aria-label="t: a 1, b 0.5, c 0"' in chart


def test_charts_carry_no_colour_of_their_own_and_no_double_id() -> None:
    """Light and dark are the style sheet's; two charts in one page must not share ids."""
    charts = [str(bars_card(name, [Bar("a", 0.5, "x")], limit=1.0).chart) for name in ("one", "two")]
    ids = [set(re.findall(r'\bid="([^"]+)"', chart)) for chart in charts]
    assert ids[0]
    assert not ids[0] & ids[1]
    for chart in charts:
        assert not re.search(r"(?:fill|stroke): #", chart)
        assert "var(--accent)" in chart
        assert "<text" in chart


def test_speed_up_charts_share_a_scale_and_the_headline_is_no_best_of_many() -> None:
    rows = [dict(row) for row in SPEEDUP_ROWS]
    for row in rows:
        if row["benchmark"] == "mtbench" and row["batch_size"] == 4 and row["topk"] == 10:
            row["speedup"] = 4.0  # the best bar of all; the same configuration on gsm8k: 1.9
    charts = [card for card in speedup_section(rows).cards if card.chart]
    ticks = [re.findall(r">(\d)</text>", str(card.chart)) for card in charts]
    assert ticks[0] == ticks[1]
    assert all("speed-up (1 = without a draft)" in str(card.chart) for card in charts)
    ((value, words),) = headline(rows)
    assert value == "2.95×"  # (1.9 + 4.0) / 2
    assert words == "mean speed-up on gsm8k, mtbench (batch 4, tree 7×10, 60 verified)"
    few = [{**row, "num_requests": 3} for row in rows]
    assert headline(few)[0][1].endswith("from 6 requests only")


# ------------------------------------------------------------------------------------------------------------- escaping


def page_of(*samples: Sample) -> str:
    return render("report.html", title="t", started="", tiles=[], sections=[generations_section(samples)])


def test_plain_text_is_escaped_everywhere() -> None:
    hostile = '"><script>&\x00 $\\frac$ \ud800'
    section = speedup_section([{**SPEEDUP_ROWS[1], "benchmark": hostile}])
    cards = [*section.cards, *speedup_section(SPEEDUP_ROWS).cards]
    table = Table(hostile, [hostile], [[hostile]])
    section = type(section)(hostile, cards, hostile, facts=[table], folded=[table])
    page = render("report.html", title=hostile, started=hostile, tiles=[(hostile, hostile)], sections=[section])
    assert "<script" not in page
    assert "\x00" not in page
    assert page.count("&lt;script&gt;") > 10
    Text(page.removeprefix("<!doctype html>\n"))


def test_unprintable_characters_become_pictures() -> None:
    assert visible("a\x00\x1b\x7f\ud800\tb\n") == "a\u2400\u241b\ufffd\ufffd\tb\n"


@settings(deadline=None)  # the first page compiles the template
@given(st.lists(st.text(st.characters()), min_size=1, max_size=8))
def test_any_generation_comes_back_as_text(texts: list[str]) -> None:
    page = page_of(Sample("".join(texts), tuple(texts), (1,) * len(texts)))
    article = page[page.index("<article") : page.index("</article>") + len("</article>")]
    parsed = Text(article)
    assert {name for name, _ in parsed.elements} <= {"p", "article", "span", "b"}
    expected = "".join(texts)
    for code in [*range(9), *range(11, 32)]:
        expected = expected.replace(chr(code), chr(0x2400 + code))
    expected = re.sub("[\x7f-\x9f\ud800-\udfff]", "\ufffd", expected)
    assert parsed.text.endswith(f"{expected}\n{expected}")


def test_tokens_are_grouped_by_pass() -> None:
    """Passes of 3, 1 and 2 tokens, the last one cut after its first: own tokens are c and d, e was drafted."""
    section = page_of(Sample("p", ("a", "b", "c", "d", "e"), (3, 1, 2)))
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
    for words in ("Loss by position", "Learning rate", "75%", "33%", "2.50", "optimizer.lr", "tree 7×10, 60 verified"):
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
        ("[1]\n", r"m\.jsonl:1: expected a JSON object"),
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
    decoding = Decoding(2.5, 2, 40, "greedy", (0.5, 0.25), 1, 1, 16, 40, 10.0, 5.0, (Sample("p", ("a",), (1,), "c"),))
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
    done = run_script("scripts/make_report.py", ["--run_dir", str(run)], tmp_path)
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text()
    assert "<h1>my-run</h1>" in page
    assert "at step 10" in page
    assert "Learning rate" in page


def test_the_script_names_what_is_missing(tmp_path: Path) -> None:
    done = run_script("scripts/make_report.py", ["--run-dir", str(tmp_path)], tmp_path / "log")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: neither metrics.jsonl nor step_N/provenance.json")
    assert done.stderr.count("\n") == 1
