"""The stages of the pipeline as the stress test kills them: flags of the script, and what must be the same afterwards.

Every stage reads shared inputs and writes below a directory of its own, so that any number of runs can be compared.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fake_chat_server import FakeServer

ROOT = Path(__file__).resolve().parent.parent
TINY_TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"
NUM_ROWS = 160
TOTAL_STEPS = 14


class Host:
    """The fork server of kill_host.py."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("kill_host.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._reply() == "ready"

    def run(
        self,
        stage: Stage,
        inputs: Inputs,
        root: Path,
        at_event: int | None = None,
        after_s: float | None = None,
        max_file_bytes: int | None = None,
        log: Path | None = None,
    ) -> dict[str, Any]:
        """One run of a stage: {"status", "events", "seconds"}; its output goes to `log`, by default beside `root`."""
        root.mkdir(parents=True, exist_ok=True)
        request = {
            "script": stage.script,
            "flags": stage.flags(inputs, root),
            "root": str(root),
            "log": str(log or log_of(root)),
            "at_event": at_event,
            "after_s": after_s,
            "max_file_bytes": max_file_bytes,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply: dict[str, Any] = self._reply()
        return reply

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def log_of(root: Path) -> Path:
    """Where a run's output goes: beside its directory, since the directory is compared."""
    return root.with_name(f"{root.name}.log")


class ServerThread:
    """A FakeServer in a thread; it outlives the runs that are killed."""

    def __init__(self) -> None:
        self.server = FakeServer(latency_s=0.004, jitter=0.9, fault_share=0.1, fault_kinds=["http-500", "half-body"])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self._loop).result(10)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@dataclass
class Inputs:
    """What all runs read. checkpoint: a finished training run, for the export."""

    directory: Path
    address: str
    checkpoint: Path | None = None

    @property
    def rows(self) -> Path:
        return self.directory / "rows.jsonl"

    @property
    def draft_config(self) -> Path:
        return self.directory / "draft.json"

    def write(self) -> None:
        """Conversations of 1 to 4 turns, some of them twice, and the config of a small draft."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(NUM_ROWS):
            turns: list[dict[str, str]] = []
            for turn in range(1 + i % 2):
                turns.append({"role": "user", "content": f"Question {i % 150} turn {turn}: how many apples are {i}?"})
                turns.append({"role": "assistant", "content": f"There are {i} apples. " * (1 + i % 3)})
            lines.append(json.dumps({"id": f"r{i}", "conversations": turns}) + "\n")
        self.rows.write_text("".join(lines))
        config = json.loads((ROOT / "configs" / "tiny-target-eagle3.json").read_text())
        small = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "draft_vocab_size": 96}
        self.draft_config.write_text(json.dumps(config | small))


Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A script, its flags for one run, and what of its directory must not depend on kills."""

    script: str
    flags: Callable[[Inputs, Path], list[str]]
    result: Callable[[Path], Result]
    prepare: Callable[[Inputs, Path], None] = lambda _inputs, _root: None


def train_flags(inputs: Inputs, root: Path) -> list[str]:
    return [
        "--target-model-path", str(TINY_TARGET), "--target-backend", "fake", "--train-data-path", str(inputs.rows),
        "--draft-model-config", str(inputs.draft_config), "--cache-dir", str(root / "cache"),
        "--output-dir", str(root / "run"), "--max-length", "96", "--ttt-length", "2", "--batch-size", "1",
        "--init", "random", "--total-steps", str(TOTAL_STEPS), "--log-interval", "1", "--save-interval", "2",
        "--save-total-limit", "2", "--precision", "fp32",
    ]  # fmt: skip


def cache_flags(inputs: Inputs, root: Path) -> list[str]:
    return [
        "--target-model-path", str(TINY_TARGET), "--train-data-path", str(inputs.rows), "--cache-dir", str(root),
        "--max-length", "96", "--draft-vocab-size", "96", "--num-proc", "1",
    ]  # fmt: skip


def capture_flags(inputs: Inputs, root: Path) -> list[str]:
    return [
        "--target-model-path", str(TINY_TARGET), "--target-backend", "fake", "--train-data-path", str(inputs.rows),
        "--cache-dir", str(root / "cache"), "--max-length", "96", "--offline-dir", str(root / "states"),
        "--states-dtype", "fp32", "--shard-mb", "2",
    ]  # fmt: skip


def regenerate_flags(inputs: Inputs, root: Path) -> list[str]:
    return [
        "--raw-data-file", str(inputs.rows), "--output-dir", str(root / "out"), "--output-file",
        str(root / "merged.jsonl"), "--server-address-port", inputs.address, "--num-per-shard", "20",
        "--max-concurrency", "8", "--retry-base-seconds", "0.01",
    ]  # fmt: skip


def export_flags(inputs: Inputs, root: Path) -> list[str]:
    return ["--checkpoint", str(inputs.checkpoint), "--output-dir", str(root / "draft"), "--overwrite"]


def bundle_flags(inputs: Inputs, root: Path) -> list[str]:
    return [
        "--checkpoint", str(inputs.checkpoint), "--bundle", str(root / "bundle"), "--overwrite",
        "--target-model-path", str(TINY_TARGET), "--tokenizer-from", str(TINY_TARGET),
    ]  # fmt: skip


def prepare_flags(inputs: Inputs, root: Path) -> list[str]:
    return ["--dataset", str(inputs.rows), "--output-path", str(root / "data.jsonl"), "--split-eval", "0.2"]


def whole_tree(root: Path) -> Result:
    """Every file below `root`, hidden ones too, with its hash; of locks only the name."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): "lock" if path.name.endswith(".lock") else digest(path) for path in files}


def trained(root: Path) -> Result:
    """Tensors of the checkpoints, losses of all steps, and the names of all files; times differ from run to run."""
    result: Result = {}
    for name, value in whole_tree(root).items():
        volatile = name.startswith("run/") and not name.endswith(".safetensors")
        result[name] = "present" if volatile else value
    metrics = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    result["losses"] = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    return result


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def older_draft(inputs: Inputs, root: Path) -> None:
    """An earlier export in the place of the new one: --overwrite must never leave neither."""
    name = "bundle" if root.name.startswith("bundle") else "draft"
    (root / name).mkdir(parents=True)
    (root / name / "model.safetensors").write_bytes(b"an older draft")


STAGES: dict[str, Stage] = {
    "training": Stage("train_eagle3_online", train_flags, trained),
    "dataset cache": Stage("build_eagle3_dataset_cache", cache_flags, whole_tree),
    "offline capture": Stage("capture_hidden_states", capture_flags, whole_tree),
    "regeneration": Stage("generate_data_by_target", regenerate_flags, whole_tree),
    "export": Stage("export_draft", export_flags, whole_tree, older_draft),
    "bundle": Stage("export_draft", bundle_flags, whole_tree, older_draft),
    "prepare data": Stage("prepare_data", prepare_flags, whole_tree),
}


def difference(expected: Result, found: Result) -> str:
    """What differs, for a person; empty if nothing does."""
    lines = [f"missing: {name}" for name in expected if name not in found]
    lines += [f"left over: {name}" for name in found if name not in expected]
    lines += [f"differs: {name}" for name in expected if name in found and expected[name] != found[name]]
    return "; ".join(lines)


def has_traceback(log: str) -> bool:
    return re.search(r"^Traceback", log, re.MULTILINE) is not None


def make_inputs(host: Host, directory: Path) -> Iterator[Inputs]:
    """What all stages read, with a finished run to export; the answering server lives as long as the iterator."""
    server = ServerThread()
    shared = Inputs(directory / "inputs", server.server.address)
    shared.write()
    root = directory / "for-export"
    assert host.run(STAGES["training"], shared, root)["status"] == 0, log_of(root).read_text()
    shared.checkpoint = root / "run" / f"step_{TOTAL_STEPS}"
    yield shared
    server.close()
