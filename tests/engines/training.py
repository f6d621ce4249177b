"""Real training runs for the live tests: the commands a user would type, on answers of the shipped target."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"
PROMPTS = ROOT / "specforge_lite" / "assets" / "prompts" / "gsm8k_test.jsonl"
NUM_ROWS = 32
NUM_STEPS = 50


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_script(*words: str) -> str:
    """What it printed."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class TrainingRun:
    """A training command in a process of its own."""

    def __init__(self, words: list[str], output_dir: Path, shm: Path, log: Path) -> None:
        self.output_dir, self.shm, self._log = output_dir, shm, log
        with log.open("w") as file:
            self._process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)

    def log(self) -> str:
        return self._log.read_text()

    def losses(self) -> list[float]:
        path = self.output_dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row["loss"] for row in rows if "loss" in row]

    def wait_for_step(self, step: int, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if f"step {step}/" in self.log():
                return True
            time.sleep(0.2)
        return f"step {step}/" in self.log()

    def wait(self, seconds: float) -> int:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return -1

    def newest_checkpoint(self) -> Path:
        return max(self.output_dir.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))

    def server_main(self) -> int:
        """Process id of the server that the run launched: the child of the watchdog."""
        (record,) = self.shm.glob("specforge-*/.session")
        (child,) = psutil.Process(json.loads(record.read_text())["session"]).children()
        return child.pid

    def leftovers(self) -> list[str]:
        return [path.name for path in self.shm.iterdir()]

    def end(self) -> None:
        """End it with everything it started, if a test failed."""
        if self._process.poll() is None:
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for process in family:
                if process.is_running():
                    process.kill()
            self._process.wait()


class TrainingRuns:
    """Data, runs and the draft they make, each made once when first asked for."""

    max_new_tokens = 48

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._runs: list[TrainingRun] = []

    @cache  # noqa: B019  (one object for the whole session)
    def data(self) -> Path:
        raw = self.directory / "raw.jsonl"
        with PROMPTS.open() as source, raw.open("w") as file:
            for number, line in zip(range(NUM_ROWS), source, strict=False):
                message = {"role": "user", "content": json.loads(line)["question"]}
                file.write(json.dumps({"id": str(number), "conversations": [message]}) + "\n")
        self._regenerate(self.directory / "data", "--target-backend", "hf", "--target-dtype", "float32")
        return self.directory / "data" / "answers.jsonl"

    def regenerate(self, url: str, output_dir: Path) -> list[str]:
        """Greedy answers of a running server, by the script that users run."""
        self.data()
        self._regenerate(output_dir, "--server-address-port", url)
        return self.texts(output_dir / "answers.jsonl")

    def greedy_texts(self) -> list[str]:
        return self.texts(self.data())

    @staticmethod
    def texts(path: Path) -> list[str]:
        rows = [json.loads(line)["conversations"] for line in path.read_text().splitlines()]
        assert len(rows) == NUM_ROWS
        return [row[-1]["content"] for row in rows]

    def _regenerate(self, output_dir: Path, *backend: str) -> None:
        run_script(
            "scripts/generate_data_by_target.py", "--model-name", str(TARGET), "--raw-data-file",
            str(self.directory / "raw.jsonl"), "--output-dir", str(output_dir), "--output-file",
            str(output_dir / "answers.jsonl"), "--max-tokens", "96", "--temperature", "0", *backend,
        )  # fmt: skip

    def start(
        self, backend: str, *flags: str, ranks: int = 2, name: str | None = None, prefix: Sequence[str] = ()
    ) -> TrainingRun:
        output = self.directory / (name or backend)
        shm = self.directory / f"shm-{name or backend}"
        shm.mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [
            "scripts/train_eagle3_online.py", "--target-model-path", str(TARGET), "--target-backend", backend,
            "--target-dtype", "float32", "--draft-model-config", "configs/tiny-target-eagle3.json",
            "--train-data-path", str(self.data()), "--cache-dir", str(self.directory / "cache"), "--output-dir",
            str(output), "--max-length", "256", "--batch-size", "2", "--ttt-length", "3", "--total-steps",
            str(NUM_STEPS), "--learning-rate", "2e-3", "--warmup-ratio", "0.05", "--log-interval", "1",
            "--save-interval", "4", "--seed", "0", "--transport-dir", str(shm), "--requests-in-flight", "8", *flags,
        ]  # fmt: skip
        run = TrainingRun(
            [*prefix, *(launcher if ranks > 1 else [sys.executable]), *command], output, shm, output.with_suffix(".log")
        )
        self._runs.append(run)
        return run

    def start_attached(self, url: str, backend: str) -> TrainingRun:
        """One rank that attaches to a server and waits for six seconds at most when it is gone."""
        words = ["--target-url", url, "--dist-timeout", "0.1", "--total-steps", "5000"]
        return self.start(backend, *words, ranks=1, name=f"attached-{backend}")

    @cache  # noqa: B019
    def hf_losses(self) -> list[float]:
        run = self.start("hf")
        assert run.wait(280) == 0, run.log()
        return run.losses()

    @cache  # noqa: B019
    def exported_draft(self) -> Path:
        self.hf_losses()
        exported = self.directory / "draft"
        words = ("--checkpoint", str(self.directory / "hf"), "--output-dir", str(exported), "--dtype", "float32")
        run_script("scripts/export_draft.py", *words)
        return exported

    @cache  # noqa: B019
    def exported_eagle1_draft(self) -> Path:
        """A draft that learned these answers by heart: what a server accepts of it is far from nothing."""
        run, exported = self.directory / "eagle1", self.directory / "eagle1-draft"
        run_script(
            "scripts/train_eagle1.py", "--target-model-path", str(TARGET), "--target-backend", "hf", "--target-dtype",
            "float32", "--train-data-path", str(self.data()), "--cache-dir", str(self.directory / "cache"),
            "--output-dir", str(run), "--max-length", "256", "--batch-size", "4", "--total-steps", "80",
            "--learning-rate", "2e-3", "--warmup-ratio", "0.05", "--schedule-steps", "none", "--max-grad-norm", "0.5",
            "--eval-epochs", "none", "--save-interval", "0", "--seed", "0",
        )  # fmt: skip
        words = ("--checkpoint", str(run), "--output-dir", str(exported), "--dtype", "float32")
        run_script("scripts/export_draft.py", *words)
        return exported

    @cache  # noqa: B019
    def prompts(self) -> list[list[int]]:
        """Token ids of the questions, as the chat template lays them out."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(TARGET)
        rows = [json.loads(line)["conversations"][:1] for line in self.data().read_text().splitlines()[:16]]
        encoded = [tokenizer.apply_chat_template(r, add_generation_prompt=True, return_dict=True) for r in rows]
        return [list(found["input_ids"]) for found in encoded]

    def decode_settings(self) -> Any:
        from specforge_lite.inference.speculative import GenerationSettings

        return GenerationSettings(max_new_tokens=self.max_new_tokens)

    def end(self) -> None:
        for run in self._runs:
            run.end()


def wait_shares(log: str) -> list[int]:
    """The step lines' shares of time spent waiting for the target, in per cent."""
    return [int(share) for share in re.findall(r"^step .* wait (\d+)%", log, re.M)]
