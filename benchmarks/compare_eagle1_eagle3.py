"""EAGLE-1 against EAGLE-3: the same target, data, steps and batches; decoded acceptance on prompts not trained on.

    python benchmarks/compare_eagle1_eagle3.py                        # the shipped target, about five minutes on a core
    python benchmarks/compare_eagle1_eagle3.py --train-data-path train.jsonl --eval-data-path eval.jsonl

Without data, prompts that ship with the package are answered by the target itself first. Both drafts then train from
the same captured hidden states. Stages that are done are not run again. Greedy answers of small models repeat
themselves, which every draft guesses; so sampling is shown as well. OUTPUT_DIR/comparison.md and .json are the table.
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

from specforge_lite.core.errors import EngineError
from specforge_lite.core.files import atomic_file
from specforge_lite.core.log import info, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.data.prompts import encode_prompt_file
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"eagle1": "scripts/train_eagle1.py", "eagle3": "scripts/train_eagle3_online.py"}
# What differs between the two runs besides the algorithm: EAGLE-1's schedule, whose own defaults are made for 800,000
# steps; and its learning rate may be given, since the best of one need not be the best of the other.
OWN_FLAGS = {"eagle1": ["--schedule-steps", "none"], "eagle3": ["--ttt-length", "5"]}
CHAIN, TREE = TreeShape.chain(5), TreeShape(24, 5, 6)


class DraftsConfig(Section):
    """Train drafts on one target's answers and decode with them."""

    target_model_path: str = str(ROOT / "specforge_lite" / "assets" / "tiny_target")
    target_backend: Literal["hf", "sglang", "vllm"] = "hf"
    train_data_path: Path | None = Field(None, description="conversations the target produced; default: made here")
    eval_data_path: Path | None = Field(None, description="others, to decode")
    output_dir: Path
    num_train: int = Field(800, ge=8, description="prompts answered for training, when made here")
    num_eval: int = Field(30, ge=1, description="prompts to decode")
    total_steps: int = Field(1500, ge=1)
    batch_size: int = Field(2, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    max_new_tokens: int = Field(80, ge=1)
    max_length: int = Field(512, ge=8, description="tokens of a sample at most")
    states_dtype: Literal["fp32", "bf16"] = Field("fp32", description="of the target that is captured, and its states")


class CompareConfig(DraftsConfig):
    """Train both kinds of draft and decode with them."""

    output_dir: Path = Path("outputs/eagle1_eagle3")
    eagle1_learning_rate: float = Field(2e-3, gt=0)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Row:
    """One draft. Lengths are tokens per pass of the target; identical: greedy answers are the target's."""

    name: str
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
    states = out / "states"
    capture_states(config, train, states)
    rates = {"eagle1": config.eagle1_learning_rate, "eagle3": config.learning_rate}
    rows = []
    for algorithm, script in SCRIPTS.items():
        flags = ["--learning-rate", str(rates[algorithm]), *OWN_FLAGS[algorithm]]
        draft = train_draft(config, script, states, out / algorithm, config.seed, *flags)
        rows.append(decode(config, algorithm, draft, evaluation))
    with atomic_file(out / "comparison.json") as file:
        json.dump([asdict(row) for row in rows], file, indent=2)
    with atomic_file(out / "comparison.md") as file:
        file.write(markdown_of(rows, config))
    Console().print(table_of(rows, config))


def call(*command: str) -> None:
    """Run a script of this repository; raises EngineError when it fails."""
    info(f"\n$ python {' '.join(command)}")
    result = subprocess.run([sys.executable, *command], cwd=ROOT)
    if result.returncode:
        raise EngineError(f"{command[0]} ended with exit code {result.returncode}; see above")


def make_data(config: DraftsConfig, out: Path) -> tuple[Path, Path]:
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


def capture_states(config: DraftsConfig, train: Path, states: Path, *flags: str) -> None:
    """The target's hidden states on the training data, once."""
    if (states / "train" / "manifest.json").exists():
        return
    call(
        "scripts/capture_hidden_states.py", "--target-model-path", config.target_model_path, "--train-data-path",
        str(train), "--offline-dir", str(states), "--cache-dir", str(states.parent / "cache"), "--target-backend",
        config.target_backend, "--target-dtype", "float32" if config.states_dtype == "fp32" else "bfloat16",
        "--states-dtype", config.states_dtype, "--max-length", str(config.max_length), *flags,
    )  # fmt: skip


def train_draft(config: DraftsConfig, script: str, states: Path, run: Path, seed: int, *flags: str) -> Path:
    """Train a draft, or go on where a run was cut short. Returns its last checkpoint, in `run`."""
    draft = run / f"step_{config.total_steps}"
    if not draft.exists():
        call(
            script, "--target-model-path", config.target_model_path, "--offline-dir", str(states), "--cache-dir",
            str(states.parent / "cache"), "--output-dir", str(run), "--total-steps", str(config.total_steps),
            "--batch-size", str(config.batch_size), "--warmup-ratio", "0.05", "--lr-schedule", "cosine",
            "--max-grad-norm", "0.5", "--seed", str(seed), "--eval-interval", "0", "--save-interval", "250",
            "--save-total-limit", "1", "--log-interval", "100", *flags,
        )  # fmt: skip
    return draft


def decode(config: DraftsConfig, name: str, draft: Path, evaluation: Path) -> Row:
    """Answer the held-out prompts with a draft: a chain, a tree, and a chain at temperature 1."""
    model = SpeculativeModel.from_pretrained(config.target_model_path, draft, dtype="float32")
    encoded = encode_prompt_file(evaluation, config.num_eval, config.target_model_path)
    prompts = [token_ids for _, token_ids in encoded]
    length = config.max_new_tokens
    plain = model.run(prompts, GenerationSettings(length), speculative=False)
    chain = model.run(prompts, GenerationSettings(length, shape=CHAIN))
    tree = model.run(prompts, GenerationSettings(length, shape=TREE))
    sampled = model.run(prompts, GenerationSettings(length, temperature=1.0, seed=0, shape=CHAIN))
    answers = [[answer.tokens for answer in output.answers] for output in (plain, chain, tree)]
    assert model.drafter is not None
    return Row(
        name,
        sum(p.numel() for p in model.drafter.draft.parameters()),
        chain.stats.tokens_per_pass,
        tree.stats.tokens_per_pass,
        sampled.stats.tokens_per_pass,
        answers[0] == answers[1] == answers[2],
    )


COLUMNS = ("draft", "parameters", "chain of 5, greedy", "tree of 24, greedy", "chain of 5, T=1", "output identical")


def cells_of(row: Row) -> list[str]:
    lengths = (f"{value:.2f}" for value in (row.chain, row.tree, row.chain_sampled))
    return [row.name, f"{row.parameters:,}", *lengths, "yes" if row.identical else "no"]


def title_of(config: CompareConfig) -> str:
    return (
        f"tokens per verification pass after {config.total_steps} steps of {config.batch_size} samples,"
        f" {config.num_eval} prompts not trained on"
    )


def table_of(rows: list[Row], config: CompareConfig) -> Table:
    table = Table(title=title_of(config), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "draft" else "right")
    for row in rows:
        table.add_row(*cells_of(row))
    return table


def markdown_of(rows: list[Row], config: CompareConfig) -> str:
    """The same table as markdown."""
    lines = [[*COLUMNS], ["---"] * len(COLUMNS), *(cells_of(row) for row in rows)]
    rates = f"learning rate {config.learning_rate:g}, EAGLE-1 {config.eagle1_learning_rate:g}, seed {config.seed}"
    return f"{title_of(config)}; {rates}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    run_script(main)
