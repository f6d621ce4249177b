"""Results for people: a table in the terminal and a bar chart as png."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from specforge_lite.benchmark.rows import SpeedupRow
from specforge_lite.core.files import user_errors, write_atomically

STATISTIC = (
    "tokens per pass = completion tokens / verification passes, over all requests; speed-up = throughput / throughput"
    " without a draft at the same batch size; [95% intervals over prompts]; ms/token after the first token"
)


def exactness(rows: Sequence[SpeedupRow], dtype: str, greedy: bool) -> str:
    """When output with a draft is the output without one, and what was counted here."""
    if not greedy:
        return "identical: not compared; sampling keeps the target's distribution, not its single draws"
    text = "identical: prompts whose greedy answer is that without a draft, token for token"
    drafted = [row for row in rows if row.steps and row.num_differing is not None]
    num = sum(row.num_prompts for row in drafted)
    differing = sum(row.num_differing or 0 for row in drafted)
    if dtype == "float32":
        found = f"yet {differing} of {num} differ here, a fault to report" if differing else "so it is here"
        return f"{text}; in float32 that is all of them: {found}" if drafted else text
    text += (
        f"; in {dtype} up to near ties of two tokens, which a pass over several tokens may round the other way:"
        f" {differing} of {num} differ here"
    )
    firsts = [row.tokens_before_difference for row in drafted if row.tokens_before_difference is not None]
    if firsts:
        text += f", the first difference after {min(firsts):.0f} to {max(firsts):.0f} tokens (medians)"
    batched = [row for row in rows if not row.steps and row.num_differing is not None]
    if batched:
        alone = sum(row.num_differing or 0 for row in batched)
        text += f"; without a draft, {alone} of {sum(row.num_prompts for row in batched)} differ by batch size alone"
    return text


def print_table(rows: Sequence[SpeedupRow], dtype: str = "float32", greedy: bool = True) -> None:
    """One line per row, benchmarks together."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=f"{STATISTIC}\n{exactness(rows, dtype, greedy)}", caption_justify="left")
    for name in ("benchmark", "B,steps,topk,verified"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/pass", "tokens/s", "speed-up", "ms/token", "p95", "first ms", "identical"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in dict.fromkeys(row.benchmark for row in rows):
        for row in rows:
            if row.benchmark == name:
                table.add_row(*_cells(row))
        table.add_section()
    console = Console(width=max(Console().width, 132))
    console.print(table)
    drafted = [row for row in rows if row.steps and row.per_category]
    if not drafted:
        return
    table = Table(title="per category", title_justify="left")
    for name in ("benchmark", "B,steps,topk,verified", "category"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/pass", "tokens", "requests", "ms/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in drafted:
        for category, found in row.per_category.items():
            length = _interval(found["acc_length"], found.get("acc_length_interval"))
            counts = (str(found["completion_tokens"]), str(found["num_requests"]))
            latency = _number(found["latency_per_token_ms"], 2)
            table.add_row(row.benchmark, str(row.key.config), category, length, *counts, latency)
        table.add_section()
    console.print(table)


def _cells(row: SpeedupRow) -> list[str]:
    config = f"{row.batch_size},{row.steps},{row.topk},{row.num_draft_tokens}" if row.steps else f"{row.batch_size},0"
    return [
        row.benchmark,
        config,
        _interval(row.acc_length, row.acc_length_interval),
        f"{row.throughput:.1f}",
        _interval(row.speedup, row.speedup_interval),
        _number(row.latency_per_token_ms, 2),
        _number(row.latency_per_token_p95_ms, 2),
        _number(row.time_to_first_token_ms, 1),
        "-" if row.identical_share is None else f"{100 * row.identical_share:.1f}%",
    ]


def _interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else f"{value:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def save_chart(rows: Sequence[SpeedupRow], path: Path) -> None:
    """Speed-up per benchmark, a bar per configuration, whiskers for the intervals. Nothing without a drafted row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drafted = [row for row in rows if row.steps and row.speedup is not None]
    if not drafted:
        return
    benchmarks = list(dict.fromkeys(row.benchmark for row in drafted))
    configs = sorted({row.key.config for row in drafted})
    figure, axes = plt.subplots(figsize=(max(5.0, 1.6 * len(benchmarks) + 0.5 * len(configs) + 2), 3.6), dpi=150)
    width = 0.8 / len(configs)
    colours = plt.get_cmap("viridis")
    for index, config in enumerate(configs):
        shown = [(benchmarks.index(row.benchmark), row) for row in drafted if row.key.config == config]
        places = [place + (index - (len(configs) - 1) / 2) * width for place, _ in shown]
        heights = [float(row.speedup or 0.0) for _, row in shown]
        colour = colours(0.1 + 0.75 * index / max(len(configs) - 1, 1))
        axes.bar(places, heights, 0.92 * width, label=str(config), color=colour)
        for place, height, (_, row) in zip(places, heights, shown):
            if row.speedup_interval:
                low, high = row.speedup_interval
                axes.plot([place, place], [low, high], color="#222222", linewidth=0.9)
            top = max(height, row.speedup_interval[1] if row.speedup_interval else 0.0)
            axes.annotate(f"{height:.2f}", (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=6.5)
    axes.axhline(1.0, color="#777777", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(benchmarks)), benchmarks)
    axes.set_ylabel("speed-up")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="B,steps,topk,verified", fontsize=7, title_fontsize=7, frameon=False, loc="upper left",
                bbox_to_anchor=(1.0, 1.0))  # fmt: skip
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    plt.close(figure)
    with user_errors(path):
        write_atomically(path, picture.getvalue())
