"""What changes decoded acceptance: a small sweep on the shipped target, one factor at a time, several seeds each.

    make quickstart                      # once: its regenerated answers are the data
    python benchmarks/sweep.py           # about 15 minutes on one core
    python benchmarks/sweep.py --time-budget 5 --only loss step_decay

The target runs once, its hidden states lie on disk. Each finished cell is a line of OUTPUT_DIR/cells.jsonl and is not
run again, so the sweep may be stopped at any time, or run in pieces with --time-budget. It ends with a table and a plot
of what is there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from specforge_lite.capture.offline import capture_offline
from specforge_lite.cli.target import CaptureConfig
from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.core.files import atomic_file, lock_directory
from specforge_lite.core.log import info, progress, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.data.cache import open_dataset
from specforge_lite.data.prompts import encode_prompt_file
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.serving.registry import open_engine
from specforge_lite.training.distributed import open_world
from specforge_lite.training.loop import Trainer
from specforge_lite.training.reporting import catch_signals, open_reporter
from specforge_lite.training.settings import TrainConfig
from specforge_lite.training.wiring import load_data, load_models, open_target

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"
QUICKSTART = ROOT / "outputs" / "quickstart"
CHAIN = 5

# Flags of scripts/train_eagle3_online.py; every cell is the base with one factor changed.
BASE: dict[str, Any] = {
    "learning_rate": 2e-3, "ttt_length": 5, "draft_vocab_size": 2048, "loss_mask_alignment": "ours", "step_decay": 0.8,
    "norm_output": False, "fc_norm": False, "loss": "ce",
}  # fmt: skip
FACTORS: dict[str, list[dict[str, Any]]] = {
    "learning_rate": [{"learning_rate": value} for value in (1e-3, 4e-3)],
    "ttt_length": [{"ttt_length": value} for value in (1, 3, 7)],
    "draft_vocab_size": [{"draft_vocab_size": value} for value in (512, 4096)],
    "loss_mask_alignment": [{"loss_mask_alignment": "eagle"}],
    "step_decay": [{"step_decay": value} for value in (0.6, 1.0)],
    "eagle3.1": [{"norm_output": True, "fc_norm": True}],
    "loss": [{"loss": value} for value in ("lk", "lk_alpha")],
}
SECTIONS = {"learning_rate": "optimizer", "draft_vocab_size": "draft", "norm_output": "draft", "fc_norm": "draft"}


class SweepConfig(Section):
    """One factor at a time around a base, several seeds."""

    target_model_path: str = str(TARGET)
    train_data_path: Path = Field(QUICKSTART / "train.jsonl", description="conversations the target answered")
    eval_data_path: Path = Field(QUICKSTART / "eval.jsonl", description="others, to decode")
    output_dir: Path = Path("outputs/sweep")
    results: str = Field("sweep_cpu", description="name of the table (.md) and the plot (.png) in --output-dir")
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = Field((), description=f"factors to run: base, {', '.join(FACTORS)} (default: all)")
    total_steps: int = Field(120, ge=1)
    batch_size: int = Field(2, ge=1)
    max_length: int = Field(512, ge=8)
    num_prompts: int = Field(24, ge=1, description="prompts to decode")
    max_new_tokens: int = Field(64, ge=1)
    time_budget: float | None = Field(None, gt=0, description="minutes after which no further cell is started")


@dataclass(frozen=True)
class Cell:
    """One training: `changes` to the base, and a seed."""

    factor: str
    changes: dict[str, Any]
    seed: int

    @property
    def setting(self) -> str:
        """What is changed, for people."""
        names = {"norm_output": "EAGLE-3.1"}
        parts = [names.get(key, f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
                 for key, value in self.changes.items() if key != "fc_norm"]  # fmt: skip
        return ", ".join(parts) or "base"


@dataclass(frozen=True)
class Result:
    """A finished cell. chain, sampled: tokens per pass of decoded chains of 5, greedy and at temperature 1.

    walk: the evaluation's estimate of `chain`. seconds: of training.
    """

    factor: str
    setting: str
    seed: int
    chain: float
    sampled: float
    walk: float
    seconds: float


def main() -> int:
    config = parse_config(SweepConfig, description=__doc__ or "")
    cells = plan_cells(config)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with catch_signals(), lock_directory(config.output_dir, "output_dir"):
        claim(config)
        done = read_results(config.output_dir / "cells.jsonl")
        todo = [cell for cell in cells if (cell.setting, cell.seed) not in {(r.setting, r.seed) for r in done}]
        info(f"{len(cells)} cells, {len(cells) - len(todo)} of them are done")
        if todo:
            capture_states(config)
        started = time.monotonic()
        with progress(len(todo), "sweep", "cell") as bar:
            for cell in todo:
                if config.time_budget is not None and time.monotonic() - started > 60 * config.time_budget:
                    break
                done.append(run_cell(config, cell))
                append_result(config.output_dir / "cells.jsonl", done[-1])
                bar.update(1)
        table = config.output_dir / f"{config.results}.md"
        with atomic_file(table) as file:
            file.write(table_of(config, done))
        plot(config, done, table.with_suffix(".png"))
    info(f"{len(done)} results: {table}, {table.with_suffix('.png')}")
    return 0


def plan_cells(config: SweepConfig) -> list[Cell]:
    """All cells, seed by seed, so that a sweep that was cut short has whole rows of the first seeds."""
    known = ("base", *FACTORS)
    for name in config.only:
        if name not in known:
            raise ConfigError(f"only: unknown factor '{name}'{suggest(name, known)}")
    settings: list[tuple[str, dict[str, Any]]] = [("base", {})]
    settings += [(factor, changes) for factor, choices in FACTORS.items() for changes in choices]
    wanted = [(factor, changes) for factor, changes in settings if not config.only or factor in config.only]
    return [Cell(factor, changes, seed) for seed in config.seeds for factor, changes in wanted]


def claim(config: SweepConfig) -> None:
    """Note what the results of this directory were made with; refuse to mix them with others."""
    keys = ("total_steps", "batch_size", "max_length", "num_prompts", "max_new_tokens", "target_model_path")
    made_with = {key: getattr(config, key) for key in keys} | {"base": BASE}
    path = config.output_dir / "made_with.json"
    if not path.exists():
        with atomic_file(path) as file:
            json.dump(made_with, file, indent=1)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in made_with.items():
        if before.get(key) != value:
            raise ConfigError(
                f"{config.output_dir}: its cells were run with {key} {before.get(key)}, asked for {value}"
            )


# ---------------------------------------------------------------------------------------------------------------- cells


def capture_states(config: SweepConfig) -> None:
    """Hidden states of the training and evaluation data, once."""
    for path in (config.train_data_path, config.eval_data_path):
        if not path.exists():
            raise ConfigError(f"{path}: no such file; `make quickstart` makes the default one")
    directory = config.output_dir / "states"
    if all((directory / part / "manifest.json").exists() for part in ("train", "eval")):
        return
    capture = CaptureConfig.model_validate(
        {
            "target": target_section(config),
            "data": {"max_length": config.max_length, "cache_dir": config.output_dir / "cache"},
            "capture": {"offline_dir": directory, "states_dtype": "fp32"},
        }
    )
    engine = open_engine(capture.target, config.max_length)
    try:
        for part, path in (("train", config.train_data_path), ("eval", config.eval_data_path)):
            dataset = open_dataset(str(path), capture.target, capture.data)
            capture_offline(dataset, engine, directory / part, capture.capture)
    finally:
        engine.close()


def target_section(config: SweepConfig) -> dict[str, Any]:
    return {"target_model_path": config.target_model_path, "target_backend": "hf", "target_dtype": "float32"}


def train_config(config: SweepConfig, cell: Cell, run: Path) -> TrainConfig:
    """The settings of a cell, as scripts/train_eagle3_online.py would read them."""
    sections: dict[str, dict[str, Any]] = {
        "target": target_section(config),
        "data": {"max_length": config.max_length, "cache_dir": config.output_dir / "cache"},
        "draft": {},
        "training": {
            "offline_dir": config.output_dir / "states", "total_steps": config.total_steps,
            "batch_size": config.batch_size, "seed": cell.seed, "eval_interval": 0, "eval_chain_length": CHAIN,
            "eval_max_samples": config.num_prompts,
        },
        "optimizer": {"warmup_ratio": 0.05},
        "checkpoint": {"output_dir": run, "save_interval": 0, "overwrite": True},
        "logging": {"log_interval": max(1, config.total_steps // 2)},
    }  # fmt: skip
    for key, value in (BASE | cell.changes).items():
        sections[SECTIONS.get(key, "training")][key] = value
    return TrainConfig.model_validate(sections)


def run_cell(config: SweepConfig, cell: Cell) -> Result:
    """Train one draft, decode with it, forget it."""
    info(f"\n== {cell.setting}, seed {cell.seed}")
    run = config.output_dir / "run"
    train = train_config(config, cell, run)
    started = time.monotonic()
    with open_world(train.distributed) as world, open_reporter(train, world) as reporter, catch_signals() as stop:
        data = load_data(train)
        with open_target(train, world, data) as engine:
            models = load_models(train, engine.info, data, world)
            Trainer(train, world, data, engine, models, reporter, stop).train()
    if stop:
        raise KeyboardInterrupt
    seconds = time.monotonic() - started
    walk = last_metric(run / "metrics.jsonl", "eval/tau_walk")
    model = SpeculativeModel.from_pretrained(
        config.target_model_path, run / f"step_{config.total_steps}", dtype="float32"
    )
    chain, sampled = decode(config, model, cell.seed)
    shutil.rmtree(run)
    return Result(cell.factor, cell.setting, cell.seed, chain, sampled, walk, round(seconds, 1))


def decode(config: SweepConfig, model: SpeculativeModel, seed: int) -> tuple[float, float]:
    """Tokens per verification pass with chains of 5: greedy, and at temperature 1."""
    encoded = encode_prompt_file(config.eval_data_path, config.num_prompts, config.target_model_path)
    prompts = [token_ids for _, token_ids in encoded]
    shape, length = TreeShape.chain(CHAIN), config.max_new_tokens
    greedy = model.run(prompts, GenerationSettings(length, shape=shape))
    sampled = model.run(prompts, GenerationSettings(length, temperature=1.0, seed=seed, shape=shape))
    return greedy.stats.tokens_per_pass, sampled.stats.tokens_per_pass


def last_metric(path: Path, name: str) -> float:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return float([row[name] for row in rows if name in row][-1])


# -------------------------------------------------------------------------------------------------------------- results


def append_result(path: Path, result: Result) -> None:
    """One line, on the disk before the next cell begins."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_results(path: Path) -> list[Result]:
    """What is there; a last line that a crash cut off is removed."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with atomic_file(path) as file:
            file.write(whole)
    return [Result(**json.loads(line)) for line in whole.splitlines()]


def grouped(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by setting, base first, then in the order of the factors."""
    order = [cell.setting for cell in plan_cells(SweepConfig(seeds=(0,)))]
    by_setting: dict[str, list[Result]] = {setting: [] for setting in order}
    for result in results:
        by_setting.setdefault(result.setting, []).append(result)
    return {setting: rows for setting, rows in by_setting.items() if rows}


def shown(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds (n - 1), the latter only where there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table_of(config: SweepConfig, results: Sequence[Result]) -> str:
    """The table as markdown."""
    groups = grouped(results)
    base = statistics.fmean(r.chain for r in groups["base"]) if "base" in groups else None
    lines = [
        "# What changes decoded acceptance",
        "",
        f"`python benchmarks/sweep.py`, torch {torch.__version__}, {platform.machine()}, one thread.",
        f"Decoded tokens per verification pass, chains of {CHAIN}, {config.num_prompts} prompts not trained on,"
        f" {config.max_new_tokens} tokens each.",
        f"{config.total_steps} steps of {config.batch_size} samples; mean ± standard deviation over seeds.",
        f"Base: {', '.join(f'{key} {value}' for key, value in BASE.items() if value is not False)}.",
        "",
        f"![one dot per seed]({config.results}.png)",
        "",
        "| setting | greedy | against base | estimated (walk) | temperature 1 | seeds | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, rows in groups.items():
        chain, sampled = ([getattr(r, name) for r in rows] for name in ("chain", "sampled"))
        difference = "" if base is None or setting == "base" else f"{statistics.fmean(chain) - base:+.3f}"
        walk = f"{statistics.fmean(r.walk for r in rows):.3f}"
        seconds = f"{statistics.median(r.seconds for r in rows):.0f}"
        cells = (setting, shown(chain), difference, walk, shown(sampled), str(len(rows)), seconds)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(config: SweepConfig, results: Sequence[Result], path: Path) -> None:
    """One dot per seed and a bar for the mean, a line at the base; greedy on the left, temperature 1 on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(results)
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 + 0.32 * len(groups)), sharey=True)
    for axis, name, title in zip(axes, ("chain", "sampled"), ("greedy", "temperature 1")):
        for row, results_of in enumerate(groups.values()):
            values = [getattr(result, name) for result in results_of]
            axis.plot(values, [row] * len(values), "o", markersize=4, color="#1f77b4", alpha=0.6)
            axis.plot([statistics.fmean(values)], [row], "|", markersize=14, markeredgewidth=2, color="#d62728")
        if "base" in groups:
            axis.axvline(statistics.fmean(getattr(r, name) for r in groups["base"]), color="grey", linewidth=0.8)
        axis.set_title(f"{title}, chains of {CHAIN}", fontsize=9)
        axis.set_xlabel("tokens per verification pass", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(groups)), list(groups))
    axes[0].invert_yaxis()
    figure.tight_layout()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
