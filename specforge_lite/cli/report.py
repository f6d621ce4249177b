"""Write one self-contained report.html of a run: training curves, acceptance, generations, speed-up, provenance.

python scripts/make_report.py --run-dir outputs/my-draft
python scripts/make_report.py --run-dir outputs/my-draft --evaluation eval.json --speedup speedup.jsonl
"""

from __future__ import annotations

from pathlib import Path

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info
from specforge_lite.core.settings import Section, flag, parse_config

FIGURE_FILE = "training_curves.png"
CURVES_HELP = """\
Write training_curves.png: losses and accuracies by position, acceptance estimates and learning rate of a run.

python scripts/plot_training.py outputs/run                    (its metrics.jsonl)
python scripts/plot_training.py wandb_export.csv               (or .json: history of a wandb run, EAGLE's as well)
"""


class ReportConfig(Section):
    """Write one self-contained report.html: training curves, acceptance, generations, speed-up, provenance."""

    run_dir: Path | None = flag(None, "output directory of a training run: metrics and provenance")
    metrics: Path | None = flag(None, "metrics.jsonl, where it is not in --run-dir")
    evaluation: Path | None = flag(None, "JSON of evaluate_draft.py --save-results")
    decoding: Path | None = flag(None, "JSON of decoded prompts (specforge_lite.report.Decoding)")
    errors: Path | None = flag(None, "errors.json of evaluate_draft.py --error-analysis")
    speedup: Path | None = flag(None, "JSON lines of bench_model_speedup.py")
    provenance: Path | None = flag(None, "provenance.json, where it is not in --run-dir")
    title: str | None = flag(None, "default: the name of the run")
    output: Path | None = flag(None, "default: report.html in --run-dir")


def main() -> None:
    config = parse_config(ReportConfig, positional="--run-dir")
    from specforge_lite.core.files import read_json
    from specforge_lite.core.jsonl import read_jsonl
    from specforge_lite.report import write_report
    from specforge_lite.report.sources import find_run_files

    found = find_run_files(config.run_dir) if config.run_dir else None
    output = config.output or (config.run_dir / "report.html" if config.run_dir else None)
    if output is None:
        raise ConfigError("give --run-dir or --output")
    provenance = config.provenance or (found.provenance if found else None)
    path = write_report(
        output,
        title=config.title or (config.run_dir.resolve().name if config.run_dir else output.stem),
        metrics_path=config.metrics or (found.metrics if found else None),
        evaluation=read_json(config.evaluation) if config.evaluation else None,
        decoding=read_json(config.decoding) if config.decoding else None,
        speedup_rows=read_jsonl(config.speedup) if config.speedup else None,
        provenance=read_json(provenance) if provenance else None,
        errors=read_json(config.errors) if config.errors else None,
    )
    info(f"wrote {path}")


class PlotConfig(Section):
    """What to plot, and where."""

    input: Path = flag(
        ..., "a run's directory, metrics.jsonl, or a wandb export (.csv, .json, .jsonl)", "--run-dir", "--wandb-export"
    )
    output: Path | None = flag(None, f"default: {FIGURE_FILE} beside the input")
    title: str | None = flag(None, "default: the name of the run or file")


def curves() -> None:
    config = parse_config(PlotConfig, description=CURVES_HELP, positional="--input")
    from specforge_lite.report.training_curves import curves_of, plot_curves, read_rows
    from specforge_lite.training.reporting import METRICS_FILE

    found = curves_of(read_rows(config.input), str(config.input))
    directory = config.input if config.input.is_dir() else config.input.parent
    output = config.output or directory / FIGURE_FILE
    name = directory.resolve().name if config.input.name in ("", METRICS_FILE) else config.input.resolve().stem
    plot_curves(found, output, config.title or name)
    info(f"wrote {output}: {len(found)} curves")
