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
    parts = [data_part(config, out), decoded_part(cells), curve_part(cells), time_part(out), engines_part(out)]
    write_atomically(out / "real_target.md", "\n".join(part for part in parts if part))
    plot(cells, out / "real_target.png")
    info(f"wrote {out / 'real_target.md'}, {out / 'real_target.png'}")


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Facts of each decoded draft, with `decoded` beside them."""
    cells = []
    for path in sorted((out / "drafts").glob("*.json")):
        decoded = out / "decoded" / path.name
        if decoded.exists():
            cells.append({**json.loads(path.read_text()), "decoded": json.loads(decoded.read_text())})
    return cells


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds (n - 1); empty without values."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return "" if not values else f"{statistics.fmean(values):.2f}{spread}"


def data_part(config: Any, out: Path) -> str:
    minutes = out / "answers.json"
    took = f", answered in {json.loads(minutes.read_text())['minutes']:.0f} minutes" if minutes.exists() else ""
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s). {config.target_model_path.name}; answers at"
        f" temperature {', '.join(map(str, config.temperatures))}, at most {config.max_tokens} tokens"
        f" ({config.answer_with}, {config.answer_dtype}{took}). {config.num_epochs} epochs of batches of"
        f" {config.batch_size}, learning rate {config.learning_rate:g} unless said, K 5, draft vocabulary"
        f" {config.draft_vocab_size:,}.\n"
    )


def decoded_part(cells: list[dict[str, Any]]) -> str:
    """One row per draft and benchmark, at the largest size."""
    if not cells:
        return ""
    largest = max(cell["size"] for cell in cells)
    rows = []
    names = list(dict.fromkeys(cell["draft"] for cell in cells if cell["size"] == largest))
    for draft in names:
        same = [cell for cell in cells if cell["draft"] == draft and cell["size"] == largest]
        for bench in same[0]["decoded"]:
            found = [cell["decoded"][bench] for cell in same if bench in cell["decoded"]]
            lengths = [mean([row[mode]["tokens_per_pass"] for row in found if mode in row]) for mode in MODES]
            greedy = [row[mode] for row in found for mode in row if "identical" in row[mode]]
            identical = f"{sum(r['identical'] for r in greedy)} of {sum(r['prompts'] for r in greedy)}"
            positions = ", ".join(f"{p:.2f}" for p in found[0]["chain T=0"]["per_position"])
            layers = "" if draft.startswith("eagle1") else ",".join(map(str, same[0]["aux_layers"]))
            rows.append([draft, layers, bench, *lengths, positions, identical, str(len(found))])
    head = ["draft", "aux layers", "benchmark", *MODES, "accepted at position, chain T=0", "identical", "seeds"]
    tokens = next(cell["supervised_tokens"] for cell in cells if cell["size"] == largest)
    return f"## Tokens per verification pass after {tokens:,} supervised tokens\n\n{table(head, rows)}"


def curve_of(cells: list[dict[str, Any]], draft: str) -> dict[int, list[float]]:
    """Supervised tokens -> tokens per pass of a greedy chain on the first benchmark, one per seed."""
    curve: dict[int, list[float]] = {}
    for cell in sorted(cells, key=lambda cell: cell["size"]):
        if cell["draft"] == draft:
            bench = next(iter(cell["decoded"].values()))
            curve.setdefault(cell["supervised_tokens"], []).append(bench["chain T=0"]["tokens_per_pass"])
    return curve


def curve_part(cells: list[dict[str, Any]]) -> str:
    curves = {draft: curve_of(cells, draft) for draft in ("eagle3", "eagle1")}
    sizes = sorted({tokens for curve in curves.values() for tokens in curve})
    if len(sizes) < 2:
        return ""
    rows = [[f"{n:,}", *(mean(curve[n]) if n in curve else "" for curve in curves.values())] for n in sizes]
    return f"## More data: greedy chain, first benchmark\n\n{table(['supervised tokens', *curves], rows)}"


def time_part(out: Path) -> str:
    if not (out / "time.json").exists():
        return ""
    found = json.loads((out / "time.json").read_text())
    plain = {(r["dtype"], r["batch"]): statistics.median(r["per_cpu_second"]) for r in found if r["system"] == "plain"}
    rows = []
    for row in found:
        wall, cpu = row["per_second"], statistics.median(row["per_cpu_second"])
        spread = f"{row['median']:.1f} ({min(wall):.1f} to {max(wall):.1f})"
        base = plain[row["dtype"], row["batch"]]
        rows.append([row["dtype"], str(row["batch"]), row["system"], spread, f"{cpu:.1f}", f"{cpu / base:.2f}x"])
    head = ["dtype", "batch", "system", "tokens/s, median (range)", "tokens/CPU-s", "against plain, CPU-s"]
    rounds = len(found[0]["per_second"])
    return f"## Wall clock\n\nSystems take turns, prompt by prompt; {rounds} rounds.\n\n{table(head, rows)}"


def engines_part(out: Path) -> str:
    rows = []
    for backend in ("vllm", "sglang"):
        path = out / f"engines_{backend}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            row = json.loads(line)
            if "steps" in row:
                shape = "no draft" if not row["steps"] else f"{row['steps']} steps"
                length, speedup = row.get("acc_length"), row.get("speedup")
                rows.append([backend, shape, f"{row['throughput']:.1f}", f"{length:.2f}" if length else "",
                             f"{speedup:.2f}x" if speedup else ""])  # fmt: skip
    head = ["engine", "draft", "tokens/s", "acceptance length", "speed-up"]
    return f"## Served\n\n{table(head, rows)}" if rows else ""


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Tokens per pass against supervised tokens, a line per draft with several sizes, a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6))
    for draft in dict.fromkeys(cell["draft"] for cell in cells):
        curve = curve_of(cells, draft)
        line = axis.plot(list(curve), [statistics.fmean(v) for v in curve.values()], marker="o", label=draft)[0]
        dots = [(tokens, value) for tokens, values in curve.items() for value in values]
        axis.scatter(*zip(*dots), s=10, color=line.get_color())
    axis.set_xscale("log")
    axis.set_xlabel("supervised tokens")
    axis.set_ylabel("tokens per verification pass")
    axis.set_title("greedy chain of 5, first benchmark, prompts not trained on", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)
