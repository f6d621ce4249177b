"""Which layers of the target an EAGLE-3 draft should read: one training per choice and seed, judged by decoding.

    python benchmarks/aux_layers.py                                   # the shipped target, about half an hour on a core
    python benchmarks/aux_layers.py --choices 1,14,26 1,14,28 --target-model-path TARGET \\
        --train-data-path train.jsonl --eval-data-path eval.jsonl     # answered by that target

The target runs once over the training data, with all layers that a choice names; every training picks its own from the
states on disk. A finished cell is a file in OUTPUT_DIR and is not run again, a training that was cut short goes on from
its checkpoint, and OUTPUT_DIR/aux_layers.md is written anew after every cell.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.compare_eagle1_eagle3 import SCRIPTS, DraftsConfig, capture_states, decode, make_data, train_draft
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import write_atomically, write_json
from specforge_lite.core.log import info, progress, run_script
from specforge_lite.core.settings import parse_config

COLUMNS = {"chain": "chain of 5, greedy", "tree": "tree of 24, greedy", "chain_sampled": "chain of 5, T=1",
           "acc0": "first token, training"}  # fmt: skip


class AuxConfig(DraftsConfig):
    """Train EAGLE-3 drafts that read different layers, and decode with them."""

    output_dir: Path = Path("outputs/aux_layers")
    choices: tuple[str, ...] = Field(("1,3,4", "1,3,6", "0,3,6"), description="0-based layer outputs, a choice a word")
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = Field(1, ge=1)
    ttt_length: int = Field(5, ge=1)
    draft_vocab_size: int = Field(1024, ge=8)


def main() -> None:
    config = parse_config(AuxConfig, description=__doc__ or "")
    out = config.output_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    train, evaluation = make_data(config, out)
    union = sorted({layer for choice in config.choices for layer in layers_of(choice)})
    capture_states(config, train, out / "states", "--aux-layer-ids", *map(str, union))
    cells = [(choice, seed) for seed in config.seeds for choice in config.choices]
    with progress(len(cells), "aux layers", "training") as bar:
        for choice, seed in cells:
            if not cell_file(out, choice, seed).exists():
                run_cell(config, out, evaluation, choice, seed)
            write_atomically(out / "aux_layers.md", table_of(config, out))
            bar.update(1)
    info(f"{out / 'aux_layers.md'}\n{table_of(config, out)}")


def layers_of(choice: str) -> list[int]:
    try:
        return [int(part) for part in choice.split(",")]
    except ValueError:
        raise ConfigError(f"choices: '{choice}': expected layer numbers with commas between them, as 1,3,6") from None


def cell_file(out: Path, choice: str, seed: int) -> Path:
    return out / f"layers_{choice.replace(',', '-')}_seed{seed}.json"


def run_cell(config: AuxConfig, out: Path, evaluation: Path, choice: str, seed: int) -> None:
    """Train and decode."""
    result = cell_file(out, choice, seed)
    run = result.with_suffix("")
    flags = ["--learning-rate", str(config.learning_rate), "--ttt-length", str(config.ttt_length)]
    flags += ["--draft-vocab-size", str(config.draft_vocab_size), "--aux-layer-ids", *map(str, layers_of(choice))]
    draft = train_draft(config, SCRIPTS["eagle3"], out / "states", run, seed, *flags)
    write_json(result, {"acc0": last_accuracy(run), **asdict(decode(config, choice, draft, evaluation))})


def last_accuracy(run: Path) -> float:
    """Mean accuracy of the first drafted token over the last quarter of the training's log."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [row["acc0"] for row in rows if "acc0" in row]
    return statistics.fmean(values[-max(1, len(values) // 4) :])


def shown(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds (n - 1), and the values."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread} ({', '.join(f'{value:.2f}' for value in values)})"


def table_of(config: AuxConfig, out: Path) -> str:
    """What is there, as markdown."""
    lines = [["outputs of layers", *COLUMNS.values(), "output identical"], ["---"] * (len(COLUMNS) + 2)]
    for choice in config.choices:
        files = [cell_file(out, choice, seed) for seed in config.seeds]
        cells = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        if cells:
            identical = f"{sum(cell['identical'] for cell in cells)} of {len(cells)}"
            lines.append([choice, *(shown([cell[name] for cell in cells]) for name in COLUMNS), identical])
    seeds = ", ".join(map(str, config.seeds))
    title = (
        f"{config.total_steps} steps of {config.batch_size} sample(s), K {config.ttt_length}, draft vocabulary"
        f" {config.draft_vocab_size}, learning rate {config.learning_rate:g}, seeds {seeds}: mean ± standard deviation"
        f" (each seed). Tokens per verification pass; {config.num_eval} prompts not trained on,"
        f" {config.max_new_tokens} tokens each."
    )
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    run_script(main)
