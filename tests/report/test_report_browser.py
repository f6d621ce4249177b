"""The report as a reader sees it: rendered by a real headless browser (`make test-browser`)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from specforge_lite.evaluation.compare_generation import Decoding, Sample
from specforge_lite.report import write_report
from tests.browser import Look, look_at
from tests.report_data import EVALUATION, SPEEDUP_ROWS, metric_rows

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>console.error('ran'); document.title = 'owned'</script>",
    '"><img src=x onerror="console.error(1)">',
    "</span></p></article></main><h1 id='breakout'>out</h1>",
    "</title></style><svg onload=console.error(2)>",
    "<!-- ",
    "&lt;b&gt; \x00\x1b[31m \ud800 \u202e tail",
)
EXPRESSIONS = {
    "title": "document.title",
    "scripts": "document.scripts.length",
    "breakouts": "document.querySelectorAll('#breakout, img, main main').length",
    "handlers": "[...document.querySelectorAll('*')]"
    ".filter(e => [...e.attributes].some(a => /^on/i.test(a.name))).length",
    "answers": "[...document.querySelectorAll('.answer')].map(e => e.textContent)",
    "prompts": "[...document.querySelectorAll('.prompt')].map(e => e.textContent)",
    "sections": "[...document.querySelectorAll('h2')].map(e => e.textContent)",
    "overflow": "document.documentElement.scrollWidth - document.documentElement.clientWidth",
    "passes": "[...document.querySelectorAll('.answer')].map(e => e.querySelectorAll('.pass').length)",
    "pass_colours": "[...document.querySelectorAll('.answer')].map(a => [...a.querySelectorAll('.pass')]"
    ".map(e => getComputedStyle(e).backgroundColor))",
    "charts": "[...document.querySelectorAll('.chart svg')].map(s => { const r = s.getBoundingClientRect();"
    " return {label: s.getAttribute('aria-label'), x: r.x, y: r.y + scrollY, width: r.width, height: r.height,"
    " lines: s.querySelectorAll('[id*=line-]').length, bars: s.querySelectorAll('[id*=bar-]').length,"
    " text: Math.min(...[...s.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))} })",
    "background": "getComputedStyle(document.body).backgroundColor",
    "ink": "getComputedStyle(document.body).color",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in metric_rows()))
    decoding = Decoding(
        acceptance_length=2.5,
        num_prompts=2,
        num_tokens=16,
        accepted_per_position=(0.6, 0.3, 0.1),
        num_identical=2,
        num_passes=6,
        num_passes_without=14,
        samples=(
            Sample("A plain question?", ("One", " two", " three", " four"), (2, 1, 1)),
            Sample(HOSTILE[0], HOSTILE, (1, 2, 3), category=HOSTILE[1]),
        ),
    )
    return write_report(
        folder / "report.html",
        title=f"Report {HOSTILE[3]}",
        metrics_path=metrics,
        evaluation=EVALUATION,
        decoding=decoding,
        speedup_rows=SPEEDUP_ROWS,
        provenance={"command": ["train", HOSTILE[0]], "config": {"training": {"seed": 7}}},
    )


@pytest.fixture(scope="module")
def wide(report: Path) -> Look:
    return look_at(report, EXPRESSIONS)


def test_nothing_is_logged_and_nothing_is_fetched(wide: Look, report: Path) -> None:
    assert wide.console == []
    assert wide.requests == [report.as_uri()]


def test_every_section_is_there(wide: Look) -> None:
    assert wide.answers["sections"] == ["Training", "Acceptance per position", "Generations", "Speed-up", "The run"]


def test_charts_show_lines_or_bars(wide: Look) -> None:
    """In the DOM, and in the picture: each chart has pixels of several colours that are neither paper nor text."""
    charts = wide.answers["charts"]
    picture = np.asarray(Image.open(io.BytesIO(wide.png)).convert("RGB")).astype(int)
    labels = [chart["label"].split(":")[0] for chart in charts]
    assert labels == [
        "Loss by position", "Accuracy by position", "Estimated acceptance length", "Learning rate",
        "Gradient norm", "Training speed", "Draft accuracy", "Accepted in decoding", "Speed-up on gsm8k",
        "Speed-up on mtbench",
    ]  # fmt: skip
    for chart in charts:
        assert chart["lines"] + chart["bars"] > 0, chart["label"]
        top, left = round(chart["y"]), round(chart["x"])
        cut = picture[top : top + round(chart["height"]), left : left + round(chart["width"])]
        saturation = cut.max(-1) - cut.min(-1)
        assert (saturation > 50).mean() > 0.002, f"{chart['label']}: no coloured line or bar was drawn"
    lines = {chart["label"].split(":")[0]: chart["lines"] for chart in charts}
    assert lines["Loss by position"] == 6  # three positions, trained and held-out


def test_model_output_is_inert_text(wide: Look) -> None:
    assert wide.answers["scripts"] == 0
    assert wide.answers["breakouts"] == 0
    assert wide.answers["handlers"] == 0
    assert wide.answers["title"].startswith("Report </title></style>")
    assert wide.answers["prompts"] == ["A plain question?", HOSTILE[0]]
    shown = "".join(HOSTILE).replace("\x00", "\u2400").replace("\x1b", "\u241b").replace("\ud800", "\ufffd")
    assert wide.answers["answers"] == ["One two three four", shown]


def test_neighbouring_passes_differ_in_colour(wide: Look) -> None:
    assert wide.answers["passes"] == [3, 3]
    for colours in wide.answers["pass_colours"]:
        assert len(set(colours)) == 3
        assert "rgba(0, 0, 0, 0)" not in colours


def test_the_page_fits_a_phone_and_stays_readable(report: Path) -> None:
    phone = look_at(report, EXPRESSIONS, width=360, height=740)
    assert phone.console == []
    assert phone.answers["overflow"] == 0
    assert all(chart["width"] > 280 for chart in phone.answers["charts"])
    assert min(chart["text"] for chart in phone.answers["charts"]) >= 9  # line box of the smallest text, px


def test_dark_mode_is_dark(report: Path, wide: Look) -> None:
    dark = look_at(report, EXPRESSIONS, dark=True)
    assert dark.console == []
    assert _luminance(dark.answers["background"]) < 40 < 200 < _luminance(dark.answers["ink"])
    assert _luminance(wide.answers["background"]) > 200 > 60 > _luminance(wide.answers["ink"])


def test_the_browser_would_see_a_script(tmp_path: Path) -> None:
    """The checks above can fail: a page with what they look for is caught by them."""
    bad = tmp_path / "bad.html"
    bad.write_text("<title>x</title><main><script>console.error('ran')</script><p onclick='f()'>a</p></main>")
    look = look_at(bad, {key: EXPRESSIONS[key] for key in ("scripts", "handlers")})
    assert look.console == ["ran"]
    assert look.answers == {"scripts": 1, "handlers": 1}


def _luminance(colour: str) -> float:
    red, green, blue = (int(part) for part in colour.strip("rgb()").split(","))
    return 0.3 * red + 0.59 * green + 0.11 * blue
