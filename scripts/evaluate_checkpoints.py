"""Evaluate every checkpoint of a run: a table, a curve, and the best one.

    python scripts/evaluate_checkpoints.py outputs/run
    python scripts/evaluate_checkpoints.py CKPT_DIR --basepath MODEL --testpath eval.jsonl     (EAGLE's state_N)

Target and data are those of the run unless given. Results go to RUN_DIR/evaluation; checkpoints that were evaluated
before are not evaluated again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from specforge_lite.core.log import info, run_script
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.evaluation.checkpoints import (
    Checkpoint,
    CheckpointResults,
    best_entry,
    find_checkpoints,
    run_settings,
    settings_of,
)
from specforge_lite.evaluation.run import (
    MeasureSection,
    engine_for,
    evaluate_draft,
    open_eval_data,
    open_target_files,
    position_rows,
)
from specforge_lite.report.figures import plot_checkpoints


class CheckpointsSection(MeasureSection):
    """Which checkpoints, and what makes one the best."""

    run_dir: Path = Field(description="output directory of a run, with step_N or EAGLE's state_N in it")
    output_dir: Path | None = Field(None, description="default: RUN_DIR/evaluation")
    metric: Literal["tau_walk", "tau_chain", "tau_sampling", "accuracy", "loss"] = Field(
        "tau_walk", description="the best checkpoint by this; accuracy and loss: of position 0"
    )
    draft_model_config: Path | None = Field(
        None, description="config.json of the drafts in state_N; default: beside them, else told from their tensors"
    )


class CheckpointsConfig(Section):
    """Evaluate all checkpoints of a run."""

    target: TargetSection
    data: DataSection = DataSection()
    checkpoints: CheckpointsSection

    @model_validator(mode="before")
    @classmethod
    def _from_run(cls, values: Any) -> Any:
        """What is not given is as it was in the run."""
        given = values.get("checkpoints") if isinstance(values, dict) else None
        if not isinstance(given, dict) or given.get("run_dir") is None:
            return values
        before = run_settings(Path(given["run_dir"]))
        return {**values, **{name: {**before[name], **(values.get(name) or {})} for name in before}}


def main() -> None:
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):  # `evaluate_checkpoints.py RUN_DIR` needs no flag
        words.insert(0, "--run-dir")
    config = parse_config(CheckpointsConfig, words, description=__doc__ or "")
    options = config.checkpoints
    found = find_checkpoints(options.run_dir)
    dataset = open_eval_data(config.target, config.data)
    output_dir = options.output_dir or options.run_dir / "evaluation"
    settings = settings_of(
        options, config.target.target_model_path, str(config.data.eval_data_path), dataset.fingerprint
    )
    results = CheckpointResults(output_dir / "checkpoints.json", settings, options.metric)
    todo = [checkpoint for checkpoint in found if not results.take_earlier(checkpoint)]
    info(f"{options.run_dir}: {len(found)} checkpoints, {len(found) - len(todo)} evaluated before")
    if todo:
        evaluate_all(todo, config, dataset, results)
    order = {checkpoint.name: place for place, checkpoint in enumerate(found)}
    results.entries.sort(key=lambda entry: order[entry["name"]])
    results.finish()
    figure = output_dir / "checkpoints.png"
    plot_checkpoints(figure, results.entries, options.metric, options.run_dir.resolve().name)
    print_entries(results.entries, options.metric)
    info(f"results: {results.path}, {figure}")


def evaluate_all(todo: list[Checkpoint], config: CheckpointsConfig, dataset: Any, results: CheckpointResults) -> None:
    """Evaluate checkpoints one after another, with one engine."""
    options = config.checkpoints
    files = open_target_files(config.target, options.device)
    first = todo[0].load(files, options.draft_model_config)
    with engine_for(first, config.target, config.data, files.device) as engine:
        for place, checkpoint in enumerate(todo):
            draft = first if place == 0 else checkpoint.load(files, options.draft_model_config)
            title = f"{checkpoint.name} ({place + 1}/{len(todo)})"
            result = evaluate_draft(draft, files, dataset, engine, options, title=title)
            results.add(checkpoint, {"positions": position_rows(result), **result.to_dict()})


def print_entries(entries: list[dict[str, Any]], metric: str) -> None:
    best = best_entry(entries, metric)
    table = Table(title=f"best by {metric}: {best['name'] if best else 'none'}")
    for column in ("", "checkpoint", "tau walk", "tau chain", "tau sampling", "accuracy 0", "loss 0"):
        table.add_column(column, justify="right")
    for entry in entries:
        values = (entry["tau_walk"], entry["tau_chain"], entry["tau_sampling"], entry["accuracy"][0], entry["loss"][0])
        table.add_row("*" if entry is best else "", entry["name"], *(f"{value:.4f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
