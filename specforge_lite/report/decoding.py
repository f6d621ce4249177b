"""Acceptance per position, and generations with each token coloured by the verification pass it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specforge_lite.evaluation.compare_generation import Decoding, Sample
from specforge_lite.report.charts import Bar, bar_chart
from specforge_lite.report.markup import Html, card, join, table, tag

NUM_PASS_COLOURS = 6
MAX_PROMPT_CHARACTERS = 600


def acceptance_section(evaluation: Mapping[str, Any] | None, decoding: Decoding | None) -> Html:
    """Bars per drafted position: what teacher-forced evaluation says, and what decoding accepted."""
    cards = []
    accuracy = list((evaluation or {}).get("accuracy") or [])
    if accuracy:
        bars = [Bar(f"position {k}", value, _percent(value), "var(--second)") for k, value in enumerate(accuracy)]
        note = "share of held-out positions whose draft of step k equals the target's choice, each step by itself"
        cards.append(card("Draft accuracy", bar_chart("Draft accuracy", bars, full=1.0, label_width=72), note=note))
    if decoding is not None and decoding.accepted_per_position:
        shares = decoding.accepted_per_position
        bars = [Bar(f"position {k}", value, _percent(value)) for k, value in enumerate(shares)]
        note = "share of verification passes that accepted the drafted token of position k (all before it included)"
        cards.append(
            card("Accepted in decoding", bar_chart("Accepted in decoding", bars, full=1.0, label_width=72), note=note)
        )
    tables = []
    if estimates := _estimates(evaluation, decoding):
        tables.append(table(["tokens per verification pass", ""], estimates))
    if decoding is not None and decoding.accepted_per_position:
        tables.append(_conditional_table(decoding.accepted_per_position))
    if tables:
        cards.append(card("Acceptance length", *tables))
    return tag("div", {"class": "grid"}, *cards) if cards else Html("")


def _estimates(evaluation: Mapping[str, Any] | None, decoding: Decoding | None) -> list[list[str]]:
    names = (
        ("tau_walk", "estimate, walk over held-out answers"),
        ("tau_chain", "estimate, mean run over all rows"),
        ("tau_sampling", "estimate for sampling"),
    )
    values = evaluation or {}
    rows = [[text, f"{values[key]:.2f}"] for key, text in names if isinstance(values.get(key), (int, float))]
    if decoding is not None:
        rows.append([f"decoded{f' ({decoding.settings})' if decoding.settings else ''}", _two(decoding)])
    return rows


def _two(decoding: Decoding) -> str:
    return f"{decoding.acceptance_length:.2f}"


def _conditional_table(shares: Sequence[float]) -> Html:
    before = [1.0, *shares]
    rows = [[f"position {k}", _percent(s / b if b else 0.0)] for k, (s, b) in enumerate(zip(shares, before))]
    return table(["accepted, given all before it", ""], rows)


def generations_section(samples: Sequence[Sample]) -> Html:
    """One box per sample. Only text goes in, and it is escaped."""
    if not samples:
        return Html("")
    key = tag(
        "p",
        {"class": "note"},
        "A run of one colour is one verification pass of the target. ",
        tag("span", {"class": "own"}, "Underlined"),
        " tokens are the target's own choice; the others were drafted and accepted.",
    )
    return join([key, *(_sample_card(sample) for sample in samples)])


def _sample_card(sample: Sample) -> Html:
    passes = len(sample.tokens_per_pass)
    facts = f"{len(sample.token_texts)} tokens in {passes} passes"
    if passes:
        facts += f", {len(sample.token_texts) / passes:.2f} per pass"
    prompt = sample.prompt
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        prompt = prompt[:MAX_PROMPT_CHARACTERS].rstrip() + " …"
    return tag(
        "article",
        {"class": "card generation"},
        tag("p", {"class": "facts"}, *([tag("b", None, sample.category), " · "] if sample.category else []), facts),
        tag("p", {"class": "prompt", "dir": "auto"}, prompt),
        tag("p", {"class": "answer", "dir": "auto"}, *_passes(sample)),
    )


def _passes(sample: Sample) -> list[Html]:
    parts: list[Html] = []
    start = 0
    for index, count in enumerate(sample.tokens_per_pass):
        texts = sample.token_texts[start : start + count]
        if not texts:
            break
        complete = len(texts) == count  # the last pass may be cut by the length limit
        tokens = [
            tag("span", {"class": "own" if complete and at == count - 1 else None}, text)
            for at, text in enumerate(texts)
        ]
        title = f"pass {index + 1}: {count} token{'s' if count != 1 else ''}"
        parts.append(tag("span", {"class": f"pass pass-{index % NUM_PASS_COLOURS}", "title": title}, *tokens))
        start += count
    return parts


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
