"""Charts of a run's metrics.jsonl (specforge_lite.training.metrics says what its rows hold)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specforge_lite.report.charts import Series, line_chart, ramp, short_number
from specforge_lite.report.markup import Html, card, table, tag

Rows = Sequence[dict[str, Any]]


def training_section(rows: Rows) -> Html:
    """All charts that the rows have numbers for; empty without a single training row."""
    cards = [
        _per_step_card(rows, "Loss per draft step", "step_losses", "eval/loss", "nats per token"),
        _per_step_card(rows, "Accuracy per draft step", "accuracies", "eval/accuracy", "share of positions", 0.0),
        _acceptance_card(rows),
        _single_card(rows, "Learning rate", "learning_rate", "var(--accent)", floor=0.0),
        _single_card(rows, "Gradient norm", "grad_norm", "var(--accent)", floor=0.0),
        _single_card(rows, "Training speed", "tokens_per_second", "var(--accent)", floor=0.0, note="tokens per second"),
    ]
    shown = [item for item in cards if item]
    if not shown:
        return tag("p", {"class": "note"}, "The metrics file has no row of a training step.")
    return tag("div", {"class": "grid"}, *shown)


def _per_step_card(rows: Rows, title: str, key: str, eval_key: str, note: str, floor: float | None = None) -> Html:
    trained, evaluated = [r for r in rows if _is_vector(r, key)], [r for r in rows if _is_vector(r, eval_key)]
    if not trained and not evaluated:
        return Html("")
    lengths = [len(r[key]) for r in trained] + [len(r[eval_key]) for r in evaluated]
    num_steps = min(lengths)
    series = []
    for k in range(num_steps):
        colour = ramp(k, num_steps)
        if trained:
            series.append(Series(f"step {k}", *_column(trained, key, k), colour))
        if evaluated:
            name = "" if trained else f"step {k}"
            series.append(Series(name, *_column(evaluated, eval_key, k), colour, markers=True, joined=not trained))
    chart = line_chart(title, series, floor=floor)
    dots = "; dots: held-out data" if trained and evaluated else ""
    return card(title, chart, note=f"{note}; step 0 drafts the first token{dots}")


def _acceptance_card(rows: Rows) -> Html:
    sources = (
        ("training rows", "tau", "var(--accent)", False),
        ("held-out, walk", "eval/tau_walk", "var(--second)", True),
        ("held-out, mean run", "eval/tau_chain", "var(--third)", True),
        ("held-out, sampling", "eval/tau_sampling", "var(--fourth)", True),
    )
    series = []
    for name, key, colour, markers in sources:
        found = [row for row in rows if _is_number(row.get(key))]
        if found:
            xs, ys = [float(r["step"]) for r in found], [float(r[key]) for r in found]
            series.append(Series(name, xs, ys, colour, markers))
    if not series:
        return Html("")
    return card(
        "Estimated acceptance length",
        line_chart("Estimated acceptance length", series, floor=1.0),
        note="tokens per verification pass, chains; walk: what greedy decoding of the held-out answers would do",
    )


def _single_card(rows: Rows, title: str, key: str, colour: str, floor: float | None = None, note: str = "") -> Html:
    found = [row for row in rows if _is_number(row.get(key))]
    if not found:
        return Html("")
    xs, ys = [float(r["step"]) for r in found], [float(r[key]) for r in found]
    return card(title, line_chart(title, [Series(title.lower(), xs, ys, colour)], floor=floor), note=note)


def run_table(rows: Rows) -> Html:
    """The last recorded values of the run, for the table of facts."""
    last: dict[str, Any] = {}
    for row in rows:
        last.update({key: value for key, value in row.items() if _is_number(value)})
    names = {
        "step": "optimizer steps",
        "epoch": "epochs",
        "loss": "training loss (weighted sum of steps)",
        "acc0": "accuracy of the first draft step",
        "tau": "estimated acceptance length, training rows",
        "eval/tau_walk": "estimated acceptance length, held-out (walk)",
        "tokens_per_second": "tokens per second",
        "wait_share": "share of time waiting for hidden states",
        "memory_bytes": "memory, bytes",
        "skipped_samples": "samples skipped",
        "nonfinite_steps": "steps skipped (not finite)",
    }
    return table(["last values", ""], [[names[key], short_number(last[key])] for key in names if key in last])


def _column(rows: Rows, key: str, k: int) -> tuple[list[float], list[float]]:
    return [float(row["step"]) for row in rows], [float(row[key][k]) for row in rows]


def _is_vector(row: dict[str, Any], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, list) and len(value) > 0 and all(_is_number(item) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
