"""Recommend STEPS,TOPK,VERIFY for every batch size, with the predicted speed-up, from one benchmark run.

    python benchmarks/bench_model_speedup.py ... --config-list 1,1,1,2 1,5,1,6 1,7,10,60 --output speedup.jsonl
    python scripts/plan_speculation.py --results speedup.jsonl

Measure at least one short and one long chain per batch size (and a tree, if trees are wanted). The formulas are in
specforge_lite/benchmark/planner.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.benchmark.configs import BenchConfig, Speculation
from specforge_lite.benchmark.planner import Plan, Prediction, make_plan
from specforge_lite.benchmark.rows import read_rows
from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import atomic_file, user_errors
from specforge_lite.core.log import info, run_script, warn
from specforge_lite.core.settings import Section, parse_config


class PlanConfig(Section):
    """Recommend STEPS,TOPK,VERIFY from one benchmark run."""

    results: Path = Field(description="--output of bench_model_speedup.py")
    benchmark: str | None = Field(None, description="use the rows of this benchmark only (default: of all)")
    candidates: tuple[str, ...] = Field(
        (), description="STEPS,TOPK,VERIFY to choose from (default: all inside what was measured)"
    )
    num_shown: int = Field(5, ge=1, description="configurations shown per batch size")
    output: Path | None = Field(None, description="write all predictions as json")


def main() -> None:
    config = parse_config(PlanConfig, description=__doc__ or "")
    rows = read_rows(config.results)
    if config.benchmark is not None:
        known = sorted({row.benchmark for row in rows})
        rows = [row for row in rows if row.benchmark == config.benchmark]
        if not rows:
            raise ConfigError(f"benchmark '{config.benchmark}': {config.results} has {', '.join(known) or 'no rows'}")
    if not rows:
        raise DataError(f"{config.results}: no rows")
    plan = make_plan(rows, [parse_speculation(text) for text in config.candidates] or None)
    for size in plan.predictions:
        measured = {row.key.config.speculation for row in rows if row.batch_size == size and row.steps}
        if len(measured) < 2:
            warn(f"batch size {size}: one configuration with a draft was measured; costs need at least two")
    show(plan, config.num_shown)
    if config.output is not None:
        with user_errors(config.output), atomic_file(config.output) as file:
            json.dump(to_json(plan), file, indent=2)
        info(f"wrote {config.output}")


def parse_speculation(text: str) -> Speculation:
    """`3,1,4`; raises ConfigError."""
    try:
        return BenchConfig.parse(f"1,{text}").speculation
    except ConfigError as error:
        raise ConfigError(str(error).replace("config_list: '1,", "candidates: '").replace("B,STEPS", "STEPS")) from None


def show(plan: Plan, num_shown: int) -> None:
    table = Table(caption="predicted inside what was measured; measured where the run holds the configuration")
    for name in ("batch", "STEPS,TOPK,VERIFY", "tokens/pass", "ms/pass", "predicted speed-up", "measured"):
        table.add_column(name, justify="right" if name != "batch" else "left")
    for size, predictions in plan.predictions.items():
        for prediction in predictions[:num_shown]:
            table.add_row(str(size), *_cells(prediction))
        table.add_section()
    Console(width=max(Console().width, 100)).print(table)
    for size in plan.predictions:
        info(recommendation(plan.best(size)))


def _cells(prediction: Prediction) -> list[str]:
    return [
        "no draft" if prediction.speculation.is_baseline else str(prediction.speculation),
        f"{prediction.tokens_per_pass:.2f}",
        f"{1000 * prediction.seconds_per_pass:.2f}",
        f"{prediction.speedup:.2f}",
        "-" if prediction.measured_speedup is None else f"{prediction.measured_speedup:.2f}",
    ]


def recommendation(best: Prediction) -> str:
    """One line, with the flags of both engines."""
    spec = best.speculation
    if spec.is_baseline:
        return f"batch size {best.batch_size}: no draft; nothing is predicted to be faster"
    flags = (
        f"--speculative-num-steps {spec.steps} --speculative-eagle-topk {spec.topk}"
        f" --speculative-num-draft-tokens {spec.num_draft_tokens}"
    )
    vllm = f'; vLLM: "num_speculative_tokens": {spec.steps}' if spec.is_chain else ""
    return f"batch size {best.batch_size}: {spec}, predicted speed-up {best.speedup:.2f}; SGLang: {flags}{vllm}"


def to_json(plan: Plan) -> dict[str, object]:
    return {
        "acceptance": asdict(plan.acceptance),
        "costs": {size: asdict(cost) for size, cost in plan.costs.items()},
        "predictions": {size: [asdict(p) for p in found] for size, found in plan.predictions.items()},
    }


if __name__ == "__main__":
    run_script(main)
