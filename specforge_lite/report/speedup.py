"""Speed-up bars and tables, from the JSON lines of benchmarks/bench_model_speedup.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from specforge_lite.benchmark.choice import Candidate, Point
from specforge_lite.core.errors import DataError
from specforge_lite.report.cards import Card, PageSection, bars_card, percent
from specforge_lite.report.figures import CATEGORIES, Bar, draw_bars, new_figure, save_figure
from specforge_lite.report.sources import is_number
from specforge_lite.report.tables import Table, print_table

NEEDED = ("benchmark", "batch_size", "steps", "topk", "num_draft_tokens", "acc_length", "throughput")
FEW_PROMPTS = 20
HEADER = [
    "benchmark", "configuration", "draft", "T", "B,steps,topk,verified", "tokens/pass", "tokens/s", "speed-up",
    "ms/token", "p95", "first token ms", "identical",
]  # fmt: skip
SAMPLED_HEADER = ["benchmark", "draft", "T", "B,steps,topk,verified", *(
    f"{what}, {how}" for what in ("tokens/pass", "tokens/s") for how in ("greedy", "sampled", "sampled / greedy")
)]  # fmt: skip
SAMPLED_NOTE = "drafted tokens above temperature 0: the draft's most probable ones (greedy), or drawn from it (sampled)"
SAMPLED = " sampled"
MAX_CHARTED = 40
AXIS = "speed-up (1 = without a draft)"
STATISTIC = (
    "tokens per pass = completion tokens / verification passes, over all requests; speed-up = throughput / throughput"
    " without a draft at the same batch size; [95% intervals over prompts]; ms/token after the first token"
)
MIN_WIDTH = 152
Row = Mapping[str, Any]
Rows = Sequence[Row]


def speedup_section(rows: Rows, ranking: Sequence[Candidate] = ()) -> PageSection:
    """Charts of a ranking, or one per benchmark, all on one scale; and all figures. Raises DataError for a row without
    one of `NEEDED`."""
    for number, row in enumerate(rows, 1):
        missing = [key for key in NEEDED if row.get(key) is None]
        if missing:
            raise DataError(f"speed-up row {number}: '{missing[0]}' is missing")
    groups, limit = _bars(rows)
    cards = ranking_cards(ranking)
    for name, bars in groups.items() if not ranking else ():
        cards.append(bars_card(name, bars, "", limit, 1.0, AXIS, f"Speed-up on {name}"))
    note = "Throughput over that of the same engine without a draft at the same batch size; one scale for all charts."
    if any(bar.interval for bars in groups.values() for bar in bars):
        note += " Whiskers: 95% intervals over prompts."
    table = Table("", HEADER, [_cells(row) for row in rows], 5)
    cards.append(Card("All figures", tables=(table,), wide=True))
    if (pairs := sampling_table(rows)) is not None:
        cards.append(Card("Greedy and sampled drafting", tables=(pairs,), note=SAMPLED_NOTE, wide=True))
    return PageSection("Speed-up", cards, note)


def ranking_cards(ranking: Sequence[Candidate]) -> list[Card]:
    """Speed-up and tokens per pass of every way to serve, the best first."""
    shown = [candidate for candidate in ranking if not candidate.speculation.is_baseline][:MAX_CHARTED]
    if not shown:
        return []
    speeds = [Bar(label_of(c), c.speedup, f"{c.speedup:.2f}×", interval=c.interval) for c in shown]
    lengths = [Bar(label_of(c), c.acc_length or 0.0, f"{c.acc_length:.2f}", "second") for c in shown if c.acc_length]
    return [
        bars_card("Speed-up for the workload", speeds, "", None, 1.0, AXIS),
        bars_card("Acceptance length for the workload", lengths, "", None, 1.0, "tokens per verification pass"),
    ]


def label_of(candidate: Candidate) -> str:
    """`step_400, chain of 3, sampled`."""
    spec = candidate.speculation
    if spec.is_baseline:
        return "no draft"
    return f"{candidate.draft.name}, chain of {spec.steps}{', sampled' if spec.draft_sampling == 'sampled' else ''}"


def ranking_table(ranking: Sequence[Candidate], points: Sequence[Point]) -> Table:
    """All ways to serve a workload, the best first."""
    shares = ", ".join(f"{point} x {point.weight:g}" for point in points)
    rows = []
    for found in ranking:
        length = "1.00" if found.speculation.is_baseline else _number(found.acc_length, 2)
        interval = found.interval and f" [{found.interval[0]:.2f}, {found.interval[1]:.2f}]"
        rows.append([label_of(found), length, f"{found.tokens_per_second:.1f}", f"{found.speedup:.2f}{interval or ''}"])
    header = ["way to serve", "tokens/pass", "tokens/s", "speed-up"]
    return Table("", header, rows, caption=f"workload (requests in flight/temperature x share of tokens): {shares}")


def sampling_table(rows: Rows) -> Table | None:
    """Rows that were drafted both ways, side by side; None where there are none."""
    names = ("benchmark", "num_prompts", "batch_size", "steps", "topk", "num_draft_tokens", "temperature")
    place = [(tuple(row.get(name) for name in names), row.get("draft_fingerprint")) for row in rows]
    greedy = {key: row for key, row in zip(place, rows) if row.get("draft_sampling") == "greedy"}
    lines = []
    for key, row in zip(place, rows):
        if row.get("draft_sampling") == "sampled" and (other := greedy.get(key)) is not None:
            cells = [str(row["benchmark"]), *_cells(row)[2:5]]
            cells[3] = cells[3].removesuffix(SAMPLED)
            for name, digits in (("acc_length", 2), ("throughput", 1)):
                cells += [_with_interval(other, name, digits), _with_interval(row, name, digits)]
                cells.append(f"{row[name] / other[name] - 1:+.1%}")
            lines.append(cells)
    return Table("", SAMPLED_HEADER, lines, 4, SAMPLED_NOTE) if lines else None


def print_speedup(rows: Rows, dtype: str = "float32") -> None:
    """The table in the terminal, benchmarks together, what sampled drafting changes, and the acceptance of each
    category."""
    left_out = {"configuration"} | (set() if several_drafts(rows) else {"draft"})
    left_out |= set() if any(row["temperature"] for row in rows) else {"T"}
    kept = [place for place, name in enumerate(HEADER) if name not in left_out]
    lines: list[list[str]] = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        lines += [[_cells(row)[place] for place in kept] for row in rows if row["benchmark"] == name]
        lines.append([])
    caption = f"{STATISTIC}\n{exactness(rows, dtype)}"
    print_table(Table("", [HEADER[place] for place in kept], lines, len(kept) - 7, caption), MIN_WIDTH)
    if (pairs := sampling_table(rows)) is not None:
        print_table(pairs, MIN_WIDTH)
    lines = []
    for row in rows:
        for category, found in row["per_category"].items() if row["steps"] else ():
            counts = [str(found["completion_tokens"]), str(found["num_requests"])]
            latency = _number(found["latency_per_token_ms"], 2)
            length = _with_interval(found, "acc_length", 2)
            lines.append([row["benchmark"], _configuration(row), category, length, *counts, latency])
        if lines and lines[-1]:
            lines.append([])
    if lines:
        header = [HEADER[0], HEADER[4], "category", "tokens/pass", "tokens", "requests", "ms/token"]
        print_table(Table("per category", header, lines, 3), MIN_WIDTH)


def exactness(rows: Rows, dtype: str) -> str:
    """When output with a draft is the output without one, and what was counted here."""
    if all(row["temperature"] for row in rows):
        return "identical: not compared; sampling keeps the target's distribution, not its single draws"
    text = "identical: prompts whose greedy answer is that without a draft, token for token"
    compared = [row for row in rows if row["num_differing"] is not None]
    drafted, batched = [r for r in compared if r["steps"]], [r for r in compared if not r["steps"]]
    num, differing = _sum(drafted, "num_prompts"), _sum(drafted, "num_differing")
    if dtype == "float32":
        found = f"yet {differing} of {num} differ here, a fault to report" if differing else "so it is here"
        return f"{text}; in float32 that is all of them: {found}" if drafted else text
    text += (
        f"; in {dtype} up to near ties of two tokens, which a pass over several tokens may round the other way:"
        f" {differing} of {num} differ here"
    )
    firsts = [at for row in drafted if (at := row["tokens_before_difference"]) is not None]
    if firsts:
        text += f", the first difference after {min(firsts):.0f} to {max(firsts):.0f} tokens (medians)"
    if batched:
        alone = f"{_sum(batched, 'num_differing')} of {_sum(batched, 'num_prompts')}"
        text += f"; without a draft, {alone} differ by batch size alone"
    return text


def headline(rows: Rows, ranking: Sequence[Candidate] = ()) -> list[tuple[str, str]]:
    """The tile: the best of a ranking, or the one configuration with the highest mean over all benchmarks, not the best
    of all bars."""
    if ranking:
        return [(f"{ranking[0].speedup:.2f}×", f"speed-up for the workload ({label_of(ranking[0])})")]
    names = {row["benchmark"] for row in rows}
    by_config: dict[str, list[Row]] = {}
    for row in _measured(rows):
        by_config.setdefault(config_label(row, several_drafts(rows)), []).append(row)
    complete = {name: found for name, found in by_config.items() if {row["benchmark"] for row in found} == names}
    if not complete:
        return []
    best, found = max(complete.items(), key=lambda item: fmean(row["speedup"] for row in item[1]))
    num_requests = _sum(found, "num_requests")
    words = f"mean speed-up on {', '.join(sorted(map(str, names)))} ({best})"
    if 0 < num_requests < FEW_PROMPTS:
        words += f", from {num_requests} requests only"
    return [(f"{fmean(row['speedup'] for row in found):.2f}×", words)]


def several_drafts(rows: Rows) -> bool:
    return len({row.get("draft") for row in rows if row["steps"]}) > 1


def config_label(row: Row, with_draft: bool = False) -> str:
    """`batch 4, tree 7×10, 60 verified`, or `step_9, batch 1, temperature 0.7, chain of 3, sampled`."""
    label = f"{row['draft']}, " if with_draft and row["steps"] else ""
    label += f"batch {row['batch_size']}" + (f", temperature {row['temperature']:g}" if row.get("temperature") else "")
    if not row["steps"]:
        return f"{label}, no draft"
    if row["topk"] == 1:
        return f"{label}, chain of {row['steps']}" + (", sampled" if row.get("draft_sampling") == "sampled" else "")
    return f"{label}, tree {row['steps']}×{row['topk']}, {row['num_draft_tokens']} verified"


def save_chart(rows: Rows, path: Path) -> None:
    """The same bars as a PNG, a panel per benchmark on one scale. Nothing without a drafted row."""
    groups, limit = _bars(rows)
    if not groups:
        return
    tallest = max(map(len, groups.values()))
    figure, axes = new_figure(len(groups), columns=2, size=(5.4, 0.9 + 0.3 * tallest))
    for ax, (name, bars) in zip(axes, groups.items()):
        draw_bars(ax, bars, reference=1.0, limit=limit)
        ax.grid(False, axis="y")
        ax.set_title(name, parse_math=False)
        ax.set_xlabel(AXIS)
    figure.get_layout_engine().set(rect=(0, 0, 0.95, 1))
    save_figure(figure, path)


def _bars(rows: Rows) -> tuple[dict[str, list[Bar]], float]:
    """Bars by benchmark, and the right end of all axes."""
    sizes = sorted({int(row["batch_size"]) for row in rows})
    groups: dict[str, list[Bar]] = {}
    several = several_drafts(rows)
    for row in _measured(rows):
        colour = CATEGORIES[sizes.index(int(row["batch_size"])) % len(CATEGORIES)]
        bar = Bar(
            config_label(row, several), row["speedup"], f"{row['speedup']:.2f}×", colour, _interval(row, "speedup")
        )
        groups.setdefault(str(row["benchmark"]), []).append(bar)
    tops = [max(bar.value, *(bar.interval or (0.0,))) for bars in groups.values() for bar in bars]
    return groups, 1.02 * max([*tops, 1.0])


def _measured(rows: Rows) -> list[Row]:
    return [row for row in rows if row["steps"] and is_number(row.get("speedup")) and math.isfinite(row["speedup"])]


def _sum(rows: Rows, key: str) -> int:
    return sum(int(row[key]) for row in rows if is_number(row.get(key)))


def _cells(row: Row) -> list[str]:
    share: Any = row.get("identical_share")
    return [
        str(row["benchmark"]),
        config_label(row),
        str(row.get("draft") or "–"),
        f"{row.get('temperature', 0.0):g}",
        _configuration(row),
        _with_interval(row, "acc_length", 2),
        _with_interval(row, "throughput", 1),
        _with_interval(row, "speedup", 2),
        _number(row.get("latency_per_token_ms"), 2),
        _number(row.get("latency_per_token_p95_ms"), 2),
        _number(row.get("time_to_first_token_ms"), 1),
        percent(share, 1) if is_number(share) else "–",
    ]


def _configuration(row: Row) -> str:
    keys = ("batch_size", "steps", "topk", "num_draft_tokens")
    text = ",".join(str(row[key]) for key in keys) if row["steps"] else f"{row['batch_size']},0"
    return text + (SAMPLED if row.get("draft_sampling") == "sampled" else "")


def _with_interval(row: Row, key: str, digits: int) -> str:
    interval, text = _interval(row, key), _number(row.get(key), digits)
    return f"{text} [{interval[0]:,.{digits}f}, {interval[1]:,.{digits}f}]" if interval else text


def _interval(row: Row, key: str) -> tuple[float, float] | None:
    value = row.get(f"{key}_interval")
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(is_number, value)):
        return None
    return (float(value[0]), float(value[1])) if all(map(math.isfinite, value)) else None


def _number(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if is_number(value) else "–"
