"""Tables and plot of benchmarks/real_target.py, from the files in its output directory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specforge_lite.core.files import atomic_file, write_atomically
from specforge_lite.core.log import info

MODES = ("chain T=0", "chain T=1", "tree T=0", "tree T=1")


def write_results(config: Any, out: Path) -> None:
    """OUTPUT_DIR/real_target.md and .png. Parts that were not run are absent."""
    cells = read_cells(out)
    parts = [data_part(config, out), curve_part(cells), variants_part(config, cells), decoded_part(cells)]
    parts += [time_part(out), engines_part(out)]
    write_atomically(out / "real_target.md", "\n".join(part for part in parts if part))
    plot(cells, out / "real_target.png")
    info(f"wrote {out / 'real_target.md'}, {out / 'real_target.png'}")


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Facts of each trained draft, by size and seed; `decoded` beside them, where that was done."""
    cells = []
    for path in (out / "drafts").glob("*.json"):
        decoded = out / "decoded" / path.name
        found = {"decoded": json.loads(decoded.read_text())} if decoded.exists() else {}
        cells.append(json.loads(path.read_text()) | found)
    return sorted(cells, key=lambda cell: (cell["size"], cell["seed"]))


def estimated_length(cell: dict[str, Any]) -> float:
    """Tokens per pass of a greedy chain over all benchmarks, as the walk estimates it: all tokens over all passes."""
    found = cell["estimated"].values()
    return float(sum(row["num_tokens"] for row in found) / max(1, sum(row["num_passes"] for row in found)))


def sampling_estimate(cell: dict[str, Any]) -> float:
    """The same at temperature 1 with drawn drafts; the mean over the benchmarks."""
    return statistics.fmean(row["tau_sampling"] for row in cell["estimated"].values())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds (n - 1); empty without values."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return "" if not values else f"{statistics.fmean(values):.2f}{spread}"


def median_range(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def data_part(config: Any, out: Path) -> str:
    minutes = out / "answers.json"
    took = f", answered in {json.loads(minutes.read_text())['minutes']:.0f} minutes" if minutes.exists() else ""
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s). {config.target_model_path.name}; answers at"
        f" temperature {', '.join(map(str, config.temperatures))}, at most {config.max_tokens} tokens"
        f" ({config.answer_with}, {config.answer_dtype}{took}); captured in {config.states_dtype}, trained in"
        f" {config.precision}. {config.num_epochs} epoch(s) of batches of {config.batch_size}, learning rate"
        f" {config.learning_rate:g} (EAGLE-1 {config.eagle1_learning_rate:g}) unless said, cosine, K 5, draft"
        f" vocabulary {config.draft_vocab_size:,}.\n"
    )


def decoded_part(cells: list[dict[str, Any]]) -> str:
    """One row per decoded draft and benchmark."""
    cells = [cell for cell in cells if "decoded" in cell]
    if not cells:
        return ""
    rows = []
    for draft in dict.fromkeys(cell["draft"] for cell in cells):
        same = [cell for cell in cells if cell["draft"] == draft]
        for bench in same[0]["decoded"]:
            found = [cell["decoded"][bench] for cell in same if bench in cell["decoded"]]
            estimates = mean([cell["estimated"][bench]["tau_walk"] for cell in same])
            lengths = [mean([row[mode]["tokens_per_pass"] for row in found if mode in row]) for mode in MODES]
            greedy = [row[mode] for row in found for mode in row if "identical" in row[mode]]
            identical = f"{sum(r['identical'] for r in greedy)} of {sum(r['prompts'] for r in greedy)}"
            positions = ", ".join(f"{p:.2f}" for p in found[0]["chain T=0"]["per_position"])
            rows.append([draft, bench, estimates, *lengths, positions, identical, str(len(found))])
    head = ["draft", "benchmark", "estimated", *MODES, "accepted at position, chain T=0", "identical", "seeds"]
    tokens = max(cell["supervised_tokens"] for cell in cells)
    return f"## Tokens per verification pass after {tokens:,} supervised tokens\n\n{table(head, rows)}"


def variants_part(config: Any, cells: list[dict[str, Any]]) -> str:
    """Every draft that was trained on `--variant-size` of the data: one factor at a time around EAGLE-3 and EAGLE-1."""
    cells = [cell for cell in cells if cell["size"] == config.variant_size]
    if not cells:
        return ""
    order = {name: number for number, name in enumerate(config.drafts)}
    names = sorted({cell["draft"] for cell in cells}, key=lambda name: order.get(name, len(order)))
    rows = []
    for draft in names:
        same = [cell for cell in cells if cell["draft"] == draft]
        layers = "" if draft.startswith("eagle1") else ", ".join(map(str, same[0]["aux_layers"]))
        accuracy = zip(*(row["accuracy"] for row in same[0]["estimated"].values()))
        rows.append([
            draft, layers, f"{same[0]['learning_rate']:g}", f"{same[0]['cpu_minutes']:.1f}",
            mean([estimated_length(cell) for cell in same]), mean([sampling_estimate(cell) for cell in same]),
            ", ".join(f"{statistics.fmean(column):.2f}" for column in accuracy), str(len(same)),
        ])  # fmt: skip
    columns = "draft, aux layers, learning rate, CPU minutes, greedy chain, T=1, accuracy by position, seeds"
    tokens, steps = cells[0]["supervised_tokens"], cells[0]["steps"]
    title = f"## One factor at a time, {tokens:,} supervised tokens, {steps} steps"
    return f"{title}\n\nTokens per pass, estimated over all benchmarks.\n\n{table(columns.split(', '), rows)}"


def curve_of(cells: list[dict[str, Any]], draft: str) -> dict[int, list[dict[str, Any]]]:
    """Supervised tokens -> the drafts trained on them, one per seed."""
    curve: dict[int, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["draft"] == draft:
            curve.setdefault(cell["supervised_tokens"], []).append(cell)
    return curve


def curve_part(cells: list[dict[str, Any]]) -> str:
    curves = {draft: curve_of(cells, draft) for draft in ("eagle3", "eagle1")}
    sizes = sorted({tokens for curve in curves.values() for tokens in curve})
    if len(sizes) < 2:
        return ""
    rows = []
    for tokens in sizes:
        row = [f"{tokens:,}"]
        for curve in curves.values():
            found = curve.get(tokens, [])
            row += [mean([figure(cell) for cell in found]) for figure in (estimated_length, sampling_estimate)]
            row.append(f"{found[0]['cpu_minutes']:.1f}" if found else "")
        rows.append(row)
    columns = ["greedy chain", "T=1", "CPU minutes"]
    head = ["supervised tokens", *(f"{draft}: {column}" for draft in curves for column in columns)]
    return f"## More data\n\nTokens per pass, estimated over all benchmarks.\n\n{table(head, rows)}"


def time_part(out: Path) -> str:
    if not (out / "time.json").exists():
        return ""
    found = json.loads((out / "time.json").read_text())
    plain = {(r["dtype"], r["batch"]): statistics.median(r["per_cpu_second"]) for r in found if r["system"] == "plain"}
    rows = []
    for row in found:
        cpu = statistics.median(row["per_cpu_second"])
        base = plain[row["dtype"], row["batch"]]
        costs = ("tokens_per_pass", ".2f"), ("target_ms", ".0f"), ("draft_ms", ".0f")
        own = [format(row[name], form) if name in row else "" for name, form in costs]
        rates = [median_range(row["per_second"], ".1f"), f"{cpu:.1f}", f"{cpu / base:.2f}x"]
        rows.append([row["dtype"], str(row["batch"]), row["system"], *rates, *own])
    head = ["dtype", "batch", "system", "tokens/s, median (range)", "tokens/CPU-s", "against plain, CPU-s"]
    head += ["tokens per pass", "target, CPU ms a pass", "draft, CPU ms a pass"]
    rounds = len(found[0]["per_second"])
    return f"## Wall clock\n\nSystems take turns, prompt by prompt; {rounds} rounds.\n\n{table(head, rows)}"


def engines_part(out: Path) -> str:
    """Median and range over the rounds; the speed-up of each round is against its own run without a draft."""
    rows = []
    for backend in ("vllm", "sglang"):
        runs: dict[int, list[dict[str, Any]]] = {}
        for path in sorted(out.glob(f"engines_{backend}_*.jsonl")):
            for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                if "steps" in row:
                    runs.setdefault(row["steps"], []).append(row)
        for steps, found in sorted(runs.items()):
            identical = [row["identical_share"] for row in found if row["identical_share"] is not None]
            rows.append([
                backend, f"{steps} steps" if steps else "no draft",
                median_range([row["throughput"] for row in found], ".1f"),
                f"{found[0]['acc_length']:.2f}", median_range([row["speedup"] for row in found], ".2f"),
                f"{statistics.fmean(identical):.0%}" if identical else "", str(len(found)),
            ])  # fmt: skip
    head = ["engine", "draft", "tokens/s", "acceptance length", "speed-up", "identical answers", "rounds"]
    return f"## Served\n\n{table(head, rows)}" if rows else ""


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Estimated tokens per pass against supervised tokens: lines of EAGLE-3 and EAGLE-1, a dot per draft and seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6))
    for draft in dict.fromkeys(cell["draft"] for cell in cells):
        curve = {tokens: [estimated_length(cell) for cell in same] for tokens, same in curve_of(cells, draft).items()}
        means, wide = [statistics.fmean(values) for values in curve.values()], len(curve) > 1
        color = None if wide else "lightgray"
        line = axis.plot(list(curve), means, marker="o" if wide else ".", color=color, label=draft if wide else None)[0]
        for tokens, values in curve.items():
            axis.scatter([tokens] * len(values), values, s=10, color=line.get_color())
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("supervised tokens, each seen once per epoch")
    axis.set_ylabel("tokens per verification pass")
    axis.set_title("greedy chain of 5, estimated, prompts not trained on", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)
