"""Small training runs for the trainer's tests: random data on disk, the deterministic fake engine, a tiny draft.

Runs in processes of their own come from a fork server that has imported torch once, so that starting one is cheap.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge_lite.capture.base import TargetEngine, TargetInfo
from specforge_lite.capture.offline import OfflineEngine, OfflinePart, capture_offline
from specforge_lite.capture.settings import CaptureSection
from specforge_lite.core.files import atomic_directory, exclusive
from specforge_lite.core.log import run_script as run_main
from specforge_lite.data.store import StoreWriter, TokenizedDataset
from specforge_lite.data.vocab import build_vocab_map
from specforge_lite.model.draft import DraftConfig
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead
from specforge_lite.serving.process import free_port
from specforge_lite.training.block import DsparkConfig
from specforge_lite.training.distributed import World, open_world
from specforge_lite.training.loop import Trainer
from specforge_lite.training.reporting import ExitSummary, Reporter, StopRequest, catch_signals, open_reporter
from specforge_lite.training.settings import TrainConfig
from specforge_lite.training.wiring import RunData, RunModels
from tests.fake_engine import FakeEngine, Fault
from tests.script_runner import ROOT, load_script

VOCAB_SIZE, DRAFT_VOCAB_SIZE, HIDDEN = 97, 40, 16
INFO = TargetInfo(
    "fake", num_layers=5, hidden_size=HIDDEN, vocab_size=VOCAB_SIZE, max_length=512, aux_layer_ids=(0, 1, 3)
)


@dataclass
class Run:
    """One run of the trainer. settings: flat TrainConfig leaves by section."""

    root: Path
    name: str = "run"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    latency_s: float = 0.0
    num_samples: int = 24
    target_length: int = INFO.max_length  # tokens that the target accepts
    offline: bool = False  # from states that `capture` wrote
    kind: str = "eagle3"

    @property
    def output_dir(self) -> Path:
        return self.root / self.name

    def config(self) -> TrainConfig:
        data = self.root / "train.jsonl"
        data.touch()
        values: dict[str, dict[str, Any]] = {
            "target": {"target_model_path": str(self.root), "target_backend": "fake"},
            "data": {"train_data_path": str(data), "cache_dir": str(self.root / "cache"), "max_length": 64},
            "draft": {"draft_vocab_size": DRAFT_VOCAB_SIZE},
            "training": {"total_steps": 6, "ttt_length": 3, "eval_interval": 0, "batch_size": 2},
            "optimizer": {"learning_rate": 3e-3},
            "checkpoint": {"output_dir": str(self.output_dir), "save_interval": 0},
            "logging": {"log_interval": 1},
            "distributed": {"dist_timeout": 1.0},
        }
        if self.kind == "dspark":
            values["draft"], values["training"]["num_anchors"] = {"mask_token_id": VOCAB_SIZE - 1}, 3
            del values["training"]["ttt_length"]
        for section, leaves in self.settings.items():
            values[section] |= leaves
        return (DsparkConfig if self.kind == "dspark" else TrainConfig).model_validate(values)

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics() if "loss" in row]

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.output_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def step(self) -> int:
        """Last step in the heartbeat file; 0 before there is one."""
        path = self.output_dir / "heartbeat.json"
        return int(json.loads(path.read_text())["step"]) if path.exists() else 0


def make_dataset(directory: Path, num_samples: int = 24, seed: int = 0, prefix: str = "s") -> TokenizedDataset:
    """Samples of 12..40 tokens with one or two supervised spans."""
    with exclusive(directory, "test data"):  # ranks ask at the same time
        if not directory.exists():
            with atomic_directory(directory) as temporary:
                _write_dataset(temporary, num_samples, seed, prefix)
    return TokenizedDataset.open(directory)


def _write_dataset(directory: Path, num_samples: int, seed: int, prefix: str) -> None:
    generator = np.random.default_rng(seed)
    writer = StoreWriter(directory)
    for index in range(num_samples):
        length = int(generator.integers(12, 41))
        ids = np.minimum(generator.geometric(0.06, length), VOCAB_SIZE) - 1
        mask = np.zeros(length, dtype=bool)
        mask[4 : 4 + length // 3] = True
        mask[-5:] = True
        writer.add(f"{prefix}{index}", index + 1, ids, mask)
    writer.finish({"seed": seed, "num_samples": num_samples})


def make_head(seed: int = 1) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return TargetHead(randn(VOCAB_SIZE, HIDDEN), randn(VOCAB_SIZE, HIDDEN), torch.ones(HIDDEN), 1e-5)


def make_models(data: TokenizedDataset, seed: int = 0, kind: str = "eagle3") -> RunModels:
    size = DRAFT_VOCAB_SIZE if kind == "eagle3" else VOCAB_SIZE
    vocab_map = build_vocab_map(data, VOCAB_SIZE, size, data.fingerprint)
    config = DraftConfig(HIDDEN, 24, 4, 2, VOCAB_SIZE, size, algorithm=kind, aux_layer_ids=INFO.aux_layer_ids)
    if kind == "dspark":
        config = config.replace(
            num_hidden_layers=2, block_size=4, mask_token_id=VOCAB_SIZE - 1, markov_rank=6, confidence_head=True
        )
    draft = build_draft(config, vocab_map.d2t, vocab_map.t2d)
    init_random(draft, seed)
    identity = {"draft": config.to_dict(), "target": "t", "data": data.fingerprint, "vocab_map": vocab_map.fingerprint}
    return RunModels(draft, make_head(), identity)


@contextmanager
def open_trainer(run: Run, world: World, reporter: Reporter, stop: StopRequest) -> Any:
    data = make_dataset(run.root / f"data-{run.num_samples}", run.num_samples)
    evaluation = make_dataset(run.root / "data-eval", 7, seed=9, prefix="e")
    info = replace(INFO, max_length=run.target_length)
    engine: TargetEngine = FakeEngine(info, run.latency_s, run.faults)
    if run.offline:
        parts = [OfflinePart(run.root / "offline" / part) for part in ("train", "eval")]
        data, evaluation, engine = parts[0].dataset, parts[1].dataset, OfflineEngine(parts)
    try:
        config = run.config()
        models = make_models(data, kind=run.kind)
        yield Trainer(config, world, RunData(data, evaluation), engine, models, reporter, stop)
    finally:
        engine.close()


def capture(run: Run, dtype: str = "fp32") -> None:
    """Write the states that an `offline` run reads."""
    config = CaptureSection.model_validate({"offline_dir": run.root / "offline", "states_dtype": dtype, "shard_mb": 1})
    for part, name, count, seed, prefix in (("train", "data-24", 24, 0, "s"), ("eval", "data-eval", 7, 9, "e")):
        dataset = make_dataset(run.root / name, count, seed, prefix)
        capture_offline(dataset, FakeEngine(INFO), run.root / "offline" / part, config)


def train(run: Run, change: Callable[[Trainer], None] | None = None) -> ExitSummary:
    """Run the trainer in this process, with whatever world the environment names."""
    config = run.config()
    with catch_signals() as stop, open_world(config.distributed) as world, open_reporter(config, world) as reporter:
        with open_trainer(run, world, reporter, stop) as trainer:
            if change is not None:
                change(trainer)
            summary: ExitSummary = trainer.train()
    if stop:
        sys.exit(stop.exit_code)
    return summary


def weights(checkpoint: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "draft.safetensors")


# ----------------------------------------------------------------------------------------------------------- processes

_context = multiprocessing.get_context("forkserver")
# What a run imports late, a second and a half in each process that it would be imported in.
_context.set_forkserver_preload(
    ["tests.training_runs", "transformers.models.auto", "transformers.models.llama.modeling_llama", "torch._dynamo"]
)


def _start_fork_server() -> None:
    """The server does not get our sys.path (Python 3.11), so it finds the modules to preload by PYTHONPATH."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start_ranks(
    world_size: int, target: Callable[..., Any], arguments: tuple[Any, ...], log_dir: Path
) -> list[ForkServerProcess]:
    """Start one process per rank; each calls `target(*arguments)` with its output in log_dir/rank_R.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    _start_fork_server()
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = str(log_dir / f"rank_{rank}.log")
        process = _context.Process(
            target=_rank_main, args=(environment if world_size > 1 else {}, log, target, arguments)
        )
        process.start()
        processes.append(process)
    return processes


def _rank_main(environment: dict[str, str], log: str, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    target(*arguments)


@dataclass
class ScriptProcess:
    """A script that runs in a process of its own; outputs: its stdout and stderr."""

    process: ForkServerProcess
    command: list[str]
    outputs: list[Path]

    def end(self) -> CompletedProcess[str]:
        """Wait for it."""
        (code,) = wait([self.process], 240)
        return CompletedProcess(self.command, code, *(file.read_text() for file in self.outputs))


def run_script(name: str, words: Sequence[str], directory: Path, **environment: str) -> CompletedProcess[str]:
    """What `start_script` starts, to its end."""
    return start_script(name, words, directory, **environment).end()


def start_script(name: str, words: Sequence[str], directory: Path, **environment: str) -> ScriptProcess:
    """Start what `python NAME WORDS` does, NAME from the repository's root, without a new interpreter that imports
    torch. directory: for its output.
    """
    files = [directory / f"{Path(name).stem}.{stream}" for stream in ("stdout", "stderr")]
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.write_text("")
    _start_fork_server()
    process = _context.Process(target=_script_main, args=(name, list(words), environment, list(map(str, files))))
    process.start()
    return ScriptProcess(process, [name, *words], files)


def _script_main(name: str, words: list[str], environment: dict[str, str], outputs: list[str]) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = [name, *words]
    run_main(load_script(name).main)


def run_ranks(world_size: int, target: Callable[..., Any], arguments: tuple[Any, ...], log_dir: Path) -> list[int]:
    """Exit codes of all ranks."""
    processes = start_ranks(world_size, target, arguments, log_dir)
    return wait(processes)


def wait(processes: list[ForkServerProcess], timeout_s: float = 60) -> list[int]:
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]
