"""The whole pipeline on the target that ships with the package; `make quickstart` runs it.

    prepare -> regenerate answers with the target -> cache and vocabulary map -> train EAGLE-3 online -> evaluate
    -> export and check -> generate with and without the draft -> with a serving engine: serve the draft in it

--draft-kind dspark and dflash do the same with a block draft, which both engines serve on GPUs only (vLLM a DFlash
draft on a CPU too).

Every stage is a command that you can run by hand; each is printed before it runs. Stages that are done are not run
again (delete the output directory to start over).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.core.errors import EngineError
from specforge_lite.core.local_ranks import num_local_ranks
from specforge_lite.core.log import format_seconds, info, run_script
from specforge_lite.core.settings import Section, parse_config

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"
NUM_TRAIN, NUM_EVAL = 1000, 40
# By kind: name, drafted tokens per pass, flags of the training.
DRAFT_KINDS: dict[str, tuple[str, int, list[str]]] = {
    "eagle3": ("EAGLE-3", 5, ["--draft-model-config", "configs/tiny-target-eagle3.json", "--ttt-length", "5"]),
    "dspark": ("DSpark", 7, ["--draft-kind", "dspark", "--block-size", "7", "--num-draft-layers", "2"]),
    "dflash": ("DFlash", 7, ["--draft-kind", "dflash", "--block-size", "8", "--num-draft-layers", "2"]),
}


class QuickstartConfig(Section):
    """The pipeline on the shipped target."""

    engine: Literal["hf", "sglang", "vllm"] = Field("hf", description="runs the target in every stage")
    draft_kind: Literal["eagle3", "dspark", "dflash"] = "eagle3"
    output_dir: Path | None = Field(
        None, description="default: outputs/quickstart, with -ENGINE and -KIND where they are not hf and eagle3"
    )
    num_train: int = Field(NUM_TRAIN, ge=8, description="prompts to train on")
    num_eval: int = Field(NUM_EVAL, ge=1, description="other prompts, to evaluate and decode")
    num_epochs: int = Field(4, ge=1)
    num_procs: int | None = Field(
        None, ge=1, description="trainer processes; default: one per visible GPU, on a CPU at most 2"
    )

    @property
    def directory(self) -> Path:
        """Where everything goes: one for each engine and kind, so that none passes for what another has done."""
        other = [word for word in (self.engine, self.draft_kind) if word not in ("hf", "eagle3")]
        return (self.output_dir or Path("outputs") / "-".join(["quickstart", *other])).resolve()


class Stages:
    """Runs commands one after another and keeps what is done."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.seconds: dict[str, float] = {}

    def run(self, name: str, done: Path, command: Sequence[str], threads: int = 0) -> None:
        """Run `command` unless `done` exists. Raises EngineError naming the stage when it fails."""
        if done.exists():
            info(f"\n== {name}: done before ({done})")
            return
        info(f"\n== {name}\n$ {shlex.join(_short(word) for word in command)}")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1)}
        start = time.monotonic()
        result = subprocess.run(list(command), env=environment, cwd=ROOT)
        if result.returncode < 0 or result.returncode == 130:
            raise KeyboardInterrupt
        if result.returncode:
            raise EngineError(f"quickstart: stage '{name}' ended with exit code {result.returncode}; see above")
        self.seconds[name] = time.monotonic() - start


def _short(word: str) -> str:
    return "python" if word == sys.executable else word.replace(f"{ROOT}/", "")


def main() -> None:
    config = parse_config(QuickstartConfig, description=__doc__ or "")
    num_procs = num_local_ranks(config.num_procs)
    out = config.directory
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    stages = Stages(out)
    python, target = sys.executable, str(TARGET)
    num_rows = config.num_train + config.num_eval
    kind, chain, training = DRAFT_KINDS[config.draft_kind]

    stages.run(
        "prepare",
        out / "data" / "gsm8k-sample_train.jsonl",
        [python, "scripts/prepare_data.py", "--dataset", "gsm8k-sample", "--output-path", str(out / "data"),
         "--sample-size", str(num_rows), "--split-eval", str(config.num_eval / num_rows), "--seed", "0"],
    )  # fmt: skip
    with regeneration_server(config) as address:
        for split in ("eval", "train"):
            regenerate(stages, config, split, address)
    data = [
        "--target-model-path", target, "--train-data-path", str(out / "train.jsonl"),
        "--eval-data-path", str(out / "eval.jsonl"), "--cache-dir", str(out / "cache"),
        "--max-length", "512",
    ]  # fmt: skip
    stages.run(
        "build cache and vocabulary map",
        out / "cache" / ".built",
        [python, "scripts/build_eagle3_dataset_cache.py", *data,
         *(training[:2] if config.draft_kind == "eagle3" else []), "--view-train-data", "1"],
    )  # fmt: skip
    (out / "cache" / ".built").touch()
    run_dir, exported = out / "run", out / "draft"
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_procs)]
    stages.run(
        f"train {kind} online",
        exported / "config.json",
        [*launcher, "scripts/train_eagle3_online.py", *data, *training,
         "--output-dir", str(run_dir), "--target-backend", config.engine, "--target-dtype", "float32",
         "--num-epochs", str(config.num_epochs), "--batch-size", "2", "--learning-rate", "2e-3",
         "--warmup-ratio", "0.05", "--log-interval", "20", "--eval-interval", "500", "--save-interval", "500",
         "--save-total-limit", "2"],
        threads=1,
    )  # fmt: skip
    stages.run(
        "export",
        exported / "config.json",
        [python, "scripts/export_draft.py", "--checkpoint", str(run_dir), "--output-dir", str(exported)],
    )
    stages.run(
        "check the exported draft",
        out / "checked",
        [python, "scripts/check_draft.py", str(exported), "--target-model-path", target],
    )
    stages.run(
        "evaluate",
        out / "evaluation.json",
        [python, "scripts/evaluate_draft.py", *data[:2], *data[4:], "--draft-model-path", str(exported),
         "--target-backend", config.engine, "--target-dtype", "float32", "--chain-length", str(chain),
         "--save-results", str(out / "evaluation.json")],
    )  # fmt: skip
    stages.run(
        "generate with and without the draft",
        out / "decoding.json",
        [python, "scripts/compare_generation.py", "--base-model-path", target, "--draft-model-path", str(exported),
         "--prompts", str(out / "eval.jsonl"), "--num-draft-tokens", str(chain),
         "--output", str(out / "decoding.json")],
        threads=1,
    )  # fmt: skip
    if config.engine != "hf":  # compares acceptance and text with our decoder's, and fails where they differ
        stages.run(
            f"serve the draft in {config.engine}",
            out / f"serving_{config.engine}.json",
            [python, "scripts/compare_serving.py", "--backend", config.engine, "--target-model-path", target,
             "--draft-model-path", str(exported), "--prompts", str(out / "eval.jsonl"),
             "--num-draft-tokens", str(chain), "--output", str(out / f"serving_{config.engine}.json"),
             "--log-dir", str(out / "serving")],
            threads=1,
        )  # fmt: skip
    finish(config, out, run_dir, chain, time.monotonic() - started)


@contextmanager
def regeneration_server(config: QuickstartConfig) -> Iterator[str | None]:
    """URL of the engine that answers the prompts; None where transformers does, or all answers are there."""
    answered = all((config.directory / f"{split}.jsonl").exists() for split in ("eval", "train"))
    if config.engine == "hf" or answered:
        yield None
        return
    from specforge_lite.serving.session import ServingOptions, ServingSession

    options = ServingOptions(
        config.engine,
        str(TARGET),
        dtype="float32",
        max_length=1024,
        concurrency=64,
        log_dir=config.directory / "serving",
    )
    with ServingSession(options) as session:
        yield session.url


def regenerate(stages: Stages, config: QuickstartConfig, split: str, address: str | None) -> None:
    """Let the target answer the prompts itself: a draft learns to guess what its target says, not what a book says."""
    out = stages.output_dir
    stages.run(
        f"regenerate answers ({split})",
        out / f"{split}.jsonl",
        [sys.executable, "scripts/generate_data_by_target.py", "--model-name", str(TARGET), "--raw-data-file",
         str(out / "data" / f"gsm8k-sample_{split}.jsonl"), "--output-dir", str(out / f"regenerated_{split}"),
         "--output-file", str(out / f"{split}.jsonl"), "--max-tokens", "160",
         *(["--server-address-port", address] if address else ["--target-backend", "hf", "--target-dtype", "float32"])],
        threads=1,
    )  # fmt: skip


def finish(config: QuickstartConfig, out: Path, run_dir: Path, chain: int, seconds: float) -> None:
    """The table, the report, and the RESULT line."""
    from specforge_lite.core.files import read_json
    from specforge_lite.report import write_report
    from specforge_lite.report.sources import find_run_files

    evaluation = json.loads((out / "evaluation.json").read_text())
    decoding = json.loads((out / "decoding.json").read_text())
    provenance = find_run_files(run_dir).provenance  # of the newest checkpoint
    report = write_report(
        out / "report.html",
        title="specforge_lite quickstart",
        metrics_path=run_dir / "metrics.jsonl",
        evaluation=evaluation,
        decoding=decoding,
        provenance=read_json(provenance) if provenance else None,
    )
    tokens = decoding["num_tokens"]
    saved = 1 - decoding["num_passes"] / decoding["num_passes_without"]
    identical = decoding["num_identical"] == decoding["num_prompts"]
    table = Table(title=f"{decoding['num_prompts']} prompts the draft was not trained on, chains of {chain}")
    for column in ("", "without draft", "with draft"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("acceptance length, decoded", "1.00", f"{decoding['acceptance_length']:.2f}")
    if config.engine != "hf":
        served = json.loads((out / f"serving_{config.engine}.json").read_text())["acceptance_length"]
        table.add_row(f"acceptance length, served by {config.engine}", "", f"{served:.2f}")
    for k, accuracy in enumerate(evaluation["accuracy"][:chain]):
        table.add_row(f"accuracy, position {k}", "", f"{accuracy:.1%}")
    passes = [decoding[key] / tokens for key in ("num_passes_without", "num_passes")]
    table.add_row("target passes per token", *(f"{value:.2f}" for value in passes))
    table.add_row("tokens/s", f"{decoding['tokens_per_second_without']:.0f}", f"{decoding['tokens_per_second']:.0f}")
    table.add_row("outputs identical", "", "yes" if identical else "no")
    Console().print(table)
    info(f"report: {report}\ntotal time: {format_seconds(seconds)}")
    print(
        f"RESULT acceptance_length={decoding['acceptance_length']:.2f} forward_passes_saved={saved:.0%}"
        f" identical={'yes' if identical else 'no'}",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
