"""Results in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from specforge_lite.benchmark.rows import SpeedupRow

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
