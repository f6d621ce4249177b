"""Speed-up bars and the table behind them, from the JSON lines of benchmarks/bench_model_speedup.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.report.charts import Bar, bar_chart, category
from specforge_lite.report.markup import Html, card, table, tag

NEEDED = ("benchmark", "batch_size", "steps", "topk", "num_draft_tokens", "acc_length", "throughput")


def speedup_section(rows: Sequence[Mapping[str, Any]]) -> Html:
    """A chart per benchmark and one table. Raises DataError for a row without one of `NEEDED`."""
    for number, row in enumerate(rows, 1):
        missing = [key for key in NEEDED if row.get(key) is None]
        if missing:
            raise DataError(f"speed-up row {number}: '{missing[0]}' is missing")
    names = list(dict.fromkeys(str(row["benchmark"]) for row in rows))
    batch_sizes = sorted({int(row["batch_size"]) for row in rows})
    charts = [_chart(name, [r for r in rows if r["benchmark"] == name and r["steps"]], batch_sizes) for name in names]
    whiskers = any(_interval(row, "speedup_interval") for row in rows)
    note = "Throughput over that of the same engine without a draft at the same batch size."
    if whiskers:
        note += " Whiskers: 95% intervals over prompts."
    return tag(
        "div",
        None,
        tag("p", {"class": "note"}, note),
        tag("div", {"class": "grid"}, *(chart for chart in charts if chart)),
        card("All figures", _table(rows), wide=True),
    )


def config_label(row: Mapping[str, Any]) -> str:
    """`4,7,10,60`: batch size, steps, top-k, tokens verified, as on the command line."""
    return f"{row['batch_size']},{row['steps']},{row['topk']},{row['num_draft_tokens']}"


def _chart(name: str, rows: Sequence[Mapping[str, Any]], batch_sizes: Sequence[int]) -> Html:
    bars = []
    for row in rows:
        speedup = row.get("speedup")
        if not isinstance(speedup, (int, float)) or not math.isfinite(speedup):
            continue
        colour = category(batch_sizes.index(int(row["batch_size"])))
        text = f"{speedup:.2f}×"
        bars.append(Bar(config_label(row), float(speedup), text, colour, _interval(row, "speedup_interval")))
    if not bars:
        return Html("")
    used = [size for size in batch_sizes if any(int(row["batch_size"]) == size for row in rows)]
    caption = [(f"batch size {size}", "", category(batch_sizes.index(size))) for size in used]
    return card(
        name,
        bar_chart(f"Speed-up on {name}", bars, reference=1.0, label_width=84, caption=caption),
        note="batch,steps,top-k,verified",
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Html:
    header = ["benchmark", "config", "tokens/pass", "tokens/s", "speed-up", "ms/token", "p95", "first token ms"]
    header += ["identical"]
    return table(header, [_cells(row) for row in rows], text_columns=2)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["benchmark"]),
        config_label(row) if row["steps"] else f"{row['batch_size']}, no draft",
        _with_interval(row, "acc_length", 2),
        _with_interval(row, "throughput", 1),
        _with_interval(row, "speedup", 2),
        _number(row.get("latency_per_token_ms"), 2),
        _number(row.get("latency_per_token_p95_ms"), 2),
        _number(row.get("time_to_first_token_ms"), 1),
        _share(row.get("identical_share")),
    ]


def _with_interval(row: Mapping[str, Any], key: str, digits: int) -> str:
    interval = _interval(row, f"{key}_interval")
    text = _number(row.get(key), digits)
    return f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else text


def _interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    value = row.get(key)
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(v, (int, float)) for v in value):
        return None
    return (float(value[0]), float(value[1])) if all(map(math.isfinite, value)) else None


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "–"


def _share(value: Any) -> str:
    return f"{100 * value:.1f}%" if isinstance(value, (int, float)) else "–"
