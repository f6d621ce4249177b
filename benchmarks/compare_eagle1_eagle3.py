"""EAGLE-1 against EAGLE-3: the same target, data, steps and batches; decoded acceptance on prompts not trained on.

    python benchmarks/compare_eagle1_eagle3.py                        # the shipped target, about ten minutes on 2 cores
    python benchmarks/compare_eagle1_eagle3.py --train-data-path train.jsonl --eval-data-path eval.jsonl

Without data, prompts that ship with the package are answered by the target itself first. Stages that are done are not
run again. Greedy answers of small models repeat themselves, which every draft guesses; so sampling is shown as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.cli import Section, parse_config
from specforge_lite.compare import read_prompts
from specforge_lite.errors import EngineError
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.log import info, run_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"eagle1": "scripts/train_eagle1.py", "eagle3": "scripts/train_eagle3_online.py"}
# What differs between the two runs besides the algorithm: nothing but EAGLE-1's schedule, whose own defaults are made
# for 800,000 steps.
OWN_FLAGS = {"eagle1": ["--schedule-steps", "none"], "eagle3": []}
CHAIN, TREE = TreeShape.chain(5), TreeShape(24, 5, 6)


class CompareConfig(Section):
    """Train both kinds of draft and decode with them."""

    target_model_path: str = str(ROOT / "specforge_lite" / "assets" / "tiny_target")
    target_backend: Literal["hf", "sglang", "vllm"] = "hf"
    train_data_path: Path | None = Field(None, description="conversations the target produced; default: made here")
    eval_data_path: Path | None = Field(None, description="others, to decode")
    output_dir: Path = Path("outputs/eagle1_eagle3")
    num_train: int = Field(600, ge=8, description="prompts answered for training, when made here")
    num_eval: int = Field(30, ge=1, description="prompts to decode")
    total_steps: int = Field(300, ge=1)
    batch_size: int = Field(4, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    max_new_tokens: int = Field(120, ge=1)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Row:
    """One line of the table. Lengths are tokens per pass of the target; identical: greedy answers are the target's."""

    algorithm: str
    parameters: int
    chain: float
    tree: float
    chain_sampled: float
    identical: bool


def main() -> None:
    config = parse_config(CompareConfig, description=__doc__ or "")
    out = config.output_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    train, evaluation = make_data(config, out)
    rows = []
    for algorithm in SCRIPTS:
        run, draft = out / algorithm, out / f"{algorithm}-draft"
        if not (draft / "config.json").exists():
            train_draft(config, algorithm, train, run)
            call("scripts/export_draft.py", "--checkpoint", str(run), "--output-dir", str(draft), "--dtype", "float32")
        rows.append(decode(config, algorithm, draft, evaluation))
    (out / "comparison.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    Console().print(table_of(rows, config))


def call(*command: str) -> None:
    """Run a script of this repository; raises EngineError when it fails."""
    info(f"\n$ python {' '.join(command)}")
    result = subprocess.run([sys.executable, *command], cwd=ROOT)
    if result.returncode:
        raise EngineError(f"{command[0]} ended with exit code {result.returncode}; see above")


def make_data(config: CompareConfig, out: Path) -> tuple[Path, Path]:
    """The given files, or shipped prompts answered by the target."""
    if config.train_data_path is not None and config.eval_data_path is not None:
        return config.train_data_path.resolve(), config.eval_data_path.resolve()
    total = config.num_train + config.num_eval
    if not (out / "data").exists():
        call(
            "scripts/prepare_data.py", "--dataset", "gsm8k-sample", "--output-path", str(out / "data"),
            "--sample-size", str(total), "--split-eval", str(config.num_eval / total), "--seed", "0",
        )  # fmt: skip
    for split in ("train", "eval"):
        if not (out / f"{split}.jsonl").exists():
            call(
                "scripts/generate_data_by_target.py", "--model-name", config.target_model_path, "--raw-data-file",
                str(out / "data" / f"gsm8k-sample_{split}.jsonl"), "--output-dir", str(out / f"answers_{split}"),
                "--output-file", str(out / f"{split}.jsonl"), "--target-backend", config.target_backend,
                "--target-dtype", "float32", "--max-tokens", "160",
            )  # fmt: skip
    return out / "train.jsonl", out / "eval.jsonl"


def train_draft(config: CompareConfig, algorithm: str, train: Path, run: Path) -> None:
    call(
        SCRIPTS[algorithm], "--target-model-path", config.target_model_path, "--train-data-path", str(train),
        "--cache-dir", str(run.parent / "cache"), "--output-dir", str(run), "--target-backend",
        config.target_backend, "--target-dtype", "float32", "--max-length", "512", "--total-steps",
        str(config.total_steps), "--batch-size", str(config.batch_size), "--learning-rate",
        str(config.learning_rate), "--warmup-ratio", "0.05", "--lr-schedule", "cosine", "--max-grad-norm", "0.5",
        "--seed", str(config.seed), "--eval-interval", "0", "--save-interval", "0", "--log-interval", "50",
        *OWN_FLAGS[algorithm],
    )  # fmt: skip


def decode(config: CompareConfig, algorithm: str, draft: Path, evaluation: Path) -> Row:
    """Answer the held-out prompts with a draft: a chain, a tree, and a chain at temperature 1."""
    model = SpeculativeModel.from_pretrained(config.target_model_path, draft, dtype="float32")
    assert model.tokenizer is not None
    prompts = [
        list(model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        for messages in read_prompts(evaluation, config.num_eval)
    ]
    length = config.max_new_tokens
    plain = model.run(prompts, GenerationSettings(length), speculative=False)
    chain = model.run(prompts, GenerationSettings(length, shape=CHAIN))
    tree = model.run(prompts, GenerationSettings(length, shape=TREE))
    sampled = model.run(prompts, GenerationSettings(length, temperature=1.0, seed=config.seed, shape=CHAIN))
    answers = [[answer.tokens for answer in output.answers] for output in (plain, chain, tree)]
    assert model.drafter is not None
    return Row(
        algorithm,
        sum(p.numel() for p in model.drafter.draft.parameters()),
        chain.stats.acceptance_length,
        tree.stats.acceptance_length,
        sampled.stats.acceptance_length,
        answers[0] == answers[1] == answers[2],
    )


def table_of(rows: list[Row], config: CompareConfig) -> Table:
    table = Table(
        title=f"acceptance length after {config.total_steps} steps of {config.batch_size} samples,"
        f" {config.num_eval} prompts not trained on",
        title_justify="left",
    )
    columns = ("draft", "parameters", "chain of 5, greedy", "tree of 24, greedy", "chain of 5, T=1", "output identical")
    for column in columns:
        table.add_column(column, justify="left" if column == "draft" else "right")
    for row in rows:
        lengths = (f"{value:.2f}" for value in (row.chain, row.tree, row.chain_sampled))
        table.add_row(row.algorithm, f"{row.parameters:,}", *lengths, "yes" if row.identical else "no")
    return table


if __name__ == "__main__":
    run_script(main)
