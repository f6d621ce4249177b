"""Write training_curves.png: losses and accuracies by position, acceptance estimates and learning rate of a run.

python scripts/plot_training.py outputs/run                    (its metrics.jsonl)
python scripts/plot_training.py wandb_export.csv               (or .json: history of a wandb run, EAGLE's as well)
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

from specforge_lite.core.log import info, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.report.training_curves import curves_of, plot_curves, read_rows
from specforge_lite.training.trackers import METRICS_FILE

FIGURE_FILE = "training_curves.png"


class PlotConfig(Section):
    """What to draw, and where."""

    input: Path = Field(
        description="a run's directory, metrics.jsonl, or a wandb export (.csv, .json, .jsonl)",
        json_schema_extra={"flags": ["--run-dir", "--wandb-export"]},
    )
    output: Path | None = Field(None, description=f"default: {FIGURE_FILE} beside the input")
    title: str | None = Field(None, description="default: the name of the run or file")


def main() -> None:
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):  # `plot_training.py RUN_DIR` needs no flag
        words.insert(0, "--input")
    config = parse_config(PlotConfig, words, description=__doc__ or "")
    curves = curves_of(read_rows(config.input), str(config.input))
    directory = config.input if config.input.is_dir() else config.input.parent
    output = config.output or directory / FIGURE_FILE
    name = directory.resolve().name if config.input.name in ("", METRICS_FILE) else config.input.resolve().stem
    plot_curves(curves, output, config.title or name)
    info(f"wrote {output}: {len(curves)} curves")


if __name__ == "__main__":
    run_script(main)
