"""A draft for code completion, from source files to decoded acceptance: every stage is a command you can run by hand.

    cut holes into source files (split by file) -> let the target fill the training holes -> train EAGLE-3 -> export
    -> fill holes of files the draft has never seen, with and without it: acceptance, exact match, BLEU

The default is the standard library of the running Python and the target that ships with the package, some minutes on
one core. With a target of your own: --target-model-path, --source-dir, and more rows. Stages that are done are not run
again (delete the output directory to start over).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from pydantic import Field

from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.log import format_seconds, info, run_script
from specforge_lite.core.settings import Section, parse_config

ROOT = Path(__file__).resolve().parent.parent
TINY_TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"


class WalkthroughConfig(Section):
    """The pipeline for code completion."""

    target_model_path: str = str(TINY_TARGET)
    source_dir: Path = Field(Path(sysconfig.get_path("stdlib")), description="source files; default: the stdlib")
    exclude_dirs: tuple[str, ...] = Field(
        ("site-packages", "test", "tests", "idlelib", "lib2to3"), description="names of directories to pass over"
    )
    output_dir: Path = Path("outputs/fim")
    num_rows: int = Field(900, ge=16, description="holes to train and evaluate on")
    split_eval: float = Field(0.1, gt=0, lt=1, description="share of FILES held out")
    num_eval: int = Field(60, ge=1, description="held-out holes to fill, at most")
    total_steps: int = Field(400, ge=1)
    batch_size: int = Field(4, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    draft_vocab_size: int | None = Field(2048, ge=1, description="none: the trainer's default")
    max_context_chars: int = Field(400, ge=100, description="characters before and after a hole")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a completion")
    max_length: int = Field(384, ge=32, description="tokens of a sample")
    num_draft_tokens: int = Field(5, ge=1, description="chain of drafted tokens per pass")
    target_backend: str = Field("hf", description="engine of the target: hf, sglang, vllm or auto")
    seed: int = Field(0, ge=0)


def main() -> None:
    config = parse_config(WalkthroughConfig, description=__doc__ or "")
    out = config.output_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    train, evaluation = prepare(config, out)
    target = ["--target-model-path", config.target_model_path]
    run(
        out / "train.jsonl",
        "generate_data_by_target", "--model-name", config.target_model_path, "--raw-data-file", str(train),
        "--output-dir", str(out / "answers"), "--output-file", str(out / "train.jsonl"), "--target-backend", "hf",
        "--target-dtype", "float32", "--max-tokens", str(config.max_new_tokens),
    )  # fmt: skip
    vocabulary = str(config.draft_vocab_size).lower()
    run(
        out / "draft" / "config.json",
        "train_eagle3_online", *target, "--train-data-path", str(out / "train.jsonl"), "--cache-dir",
        str(out / "cache"), "--output-dir", str(out / "run"), "--target-backend", config.target_backend,
        "--target-dtype", "float32", "--max-length", str(config.max_length), "--total-steps", str(config.total_steps),
        "--batch-size", str(config.batch_size), "--learning-rate", str(config.learning_rate), "--warmup-ratio", "0.05",
        "--ttt-length", str(config.num_draft_tokens), "--draft-vocab-size", vocabulary, "--eval-interval", "0",
        "--save-interval", "0", "--log-interval", "50", "--seed", str(config.seed),
    )  # fmt: skip
    run(
        out / "draft" / "config.json",
        "export_draft", "--checkpoint", str(out / "run"), "--output-dir", str(out / "draft"), "--dtype", "float32",
    )  # fmt: skip
    run(
        out / "completions.json",
        "evaluate_completions", *target, "--draft-model-path", str(out / "draft"), "--eval-data-path",
        str(evaluation), "--num-rows", str(config.num_eval), "--num-draft-tokens", str(config.num_draft_tokens),
        "--max-new-tokens", str(config.max_new_tokens), "--max-length", str(config.max_length), "--save-results",
        str(out / "completions.json"),
    )  # fmt: skip
    finish(out / "completions.json", time.monotonic() - started)


def prepare(config: WalkthroughConfig, out: Path) -> tuple[Path, Path]:
    """(training, held-out) holes. Raises ConfigError should a file be in both."""
    train, evaluation = (out / "data" / f"fim_{part}.jsonl" for part in ("train", "eval"))
    run(
        train,
        "prepare_data", "--dataset", "fim", "--source-dir", str(config.source_dir), "--exclude-dirs",
        *config.exclude_dirs, "--output-path", str(out / "data"), "--sample-size", str(config.num_rows),
        "--split-eval", str(config.split_eval), "--max-context-chars", str(config.max_context_chars), "--seed",
        str(config.seed),
    )  # fmt: skip
    sources = [{json.loads(line)["source"] for line in path.open(encoding="utf-8")} for path in (train, evaluation)]
    if shared := sources[0] & sources[1]:
        raise ConfigError(f"{out / 'data'}: {min(shared)} is in training and in held-out data")
    info(f"{len(sources[0])} files to train on, {len(sources[1])} other files held out")
    return train, evaluation


def run(done: Path, script: str, *words: str) -> None:
    """Run a script of this directory unless `done` exists. Raises EngineError when it fails."""
    if done.exists():
        info(f"\n== {script}: done before ({done})")
        return
    shown = shlex.join(word.replace(f"{ROOT}/", "") for word in words)
    info(f"\n$ python scripts/{script}.py {shown}")
    tiny = {"OMP_NUM_THREADS": "1"} if str(TINY_TARGET) in words else {}  # more threads would only wait for each other
    result = subprocess.run([sys.executable, f"scripts/{script}.py", *words], cwd=ROOT, env={**tiny, **os.environ})
    if result.returncode < 0 or result.returncode == 130:
        raise KeyboardInterrupt
    if result.returncode:
        raise EngineError(f"scripts/{script}.py ended with exit code {result.returncode}; see above")


def finish(results: Path, seconds: float) -> None:
    """The RESULT line."""
    values = json.loads(results.read_text(encoding="utf-8"))
    with_draft, without = values["with_draft"], values["without_draft"]
    identical = values["num_identical"] == values["num_rows"]
    if not identical or with_draft != without:
        raise EngineError(
            f"{results}: {values['num_identical']} of {values['num_rows']} completions are the target's own"
        )
    info(f"total time: {format_seconds(seconds)}")
    print(
        f"RESULT acceptance_length={values['acceptance_length']:.2f} exact_match={with_draft['exact_match']:.1%}"
        f" bleu={with_draft['bleu']:.1f}/100 bleu_without={without['bleu']:.1f}/100 identical=yes",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
