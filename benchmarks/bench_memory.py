"""Peak memory of a training step: measured against the planner's prediction, term by term, and its growth with length.

    python benchmarks/bench_memory.py                                            # three small CPU shapes
    python benchmarks/bench_memory.py --cases long@4096:fp32-75 long@8192:fp32-75 long@16384:fp32-75     # the slope
    python benchmarks/bench_memory.py --cases wide:bf16-75 --terms

A case is SHAPE[@LENGTH]:DTYPE-PERCENT[-checkpointing], shapes as in bench_training.py, PERCENT supervised tokens in one
span at the end. Each runs in a process of its own, with the trainer's own draft, gradients and AdamW. The peak is that
of the resident set above a process that has made one tiny training step, so that libraries do not count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from pydantic import Field

from benchmarks.bench_training import SHAPES, Shape, make_draft, make_inputs
from specforge_lite.core.errors import ConfigError, SpecforgeError, suggest
from specforge_lite.core.log import run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.training.distributed import World
from specforge_lite.training.estimate import MemoryPlan, Workload, plan_memory
from specforge_lite.training.optimizer import DraftOptimizer
from specforge_lite.training.parallel import ReplicatedDraft
from specforge_lite.training.settings import OptimizerSection

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MB = 2**20


class MemoryBenchConfig(Section):
    """Which cases, and how they are shown."""

    cases: tuple[str, ...] = Field(
        ("small:fp32-75", "small@2048:fp32-25", "small@1024:bf16-75"), description="SHAPE[@LENGTH]:DTYPE-PERCENT"
    )
    num_steps: int = Field(2, ge=1, description="optimizer steps; the peak is over all of them")
    terms: bool = Field(False, description="also the predicted terms of each case")
    measure: str | None = Field(None, description="measure one case in this process, print JSON")
    output: Path | None = Field(None, description="write the figures as json")


@dataclass(frozen=True)
class Case:
    """One line of the table. checkpointing: of activations."""

    shape: Shape
    precision: str
    supervised: float
    checkpointing: bool

    @classmethod
    def parse(cls, text: str) -> Case:
        """`long@4096:fp32-75`; raises ConfigError."""
        place, _, rest = text.partition(":")
        name, _, length = place.partition("@")
        precision, _, percent = rest.partition("-")
        percent, _, option = percent.partition("-")
        if name not in SHAPES:
            raise ConfigError(f"cases: {text}: unknown shape '{name}'{suggest(name, SHAPES)}")
        if precision not in DTYPES or option not in ("", "checkpointing"):
            raise ConfigError(f"cases: {text}: expected SHAPE[@LENGTH]:DTYPE-PERCENT[-checkpointing]")
        shape = replace(SHAPES[name], length=int(length)) if length else SHAPES[name]
        return cls(shape, precision, float(percent) / 100, option == "checkpointing")

    def predict(self) -> MemoryPlan:
        """What the planner says of it."""
        shape = self.shape
        draft = DraftConfig(
            hidden_size=shape.hidden, intermediate_size=shape.ffn, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, draft_vocab_size=shape.draft_vocab,
        )  # fmt: skip
        return plan_memory(
            Workload(
                draft,
                shape.batch * shape.length,
                shape.num_steps,
                self.precision,
                "cpu",
                self.supervised,
                activation_checkpointing=self.checkpointing,
                captured_ahead=0,
            )
        )

    def measure(self, num_steps: int) -> dict[str, float]:
        """MB above a process with libraries: inputs and weights, the peak; and CPU-seconds of the last step."""
        replace(self, shape=SHAPES["test"])._train(1)
        _release()
        before = _resident_mb("VmRSS")
        return {name: value - before if name != "seconds" else value for name, value in self._train(num_steps).items()}

    def _train(self, num_steps: int) -> dict[str, float]:
        dtype, shape = DTYPES[self.precision], self.shape
        batch, head, d2t, t2d = make_inputs(shape, self.supervised, "cpu")
        batch, head = batch.to("cpu", dtype), head.to("cpu", dtype)
        parallel = ReplicatedDraft(make_draft(shape, d2t, t2d), World(0, 1, torch.device("cpu"), 60.0))
        optimizer = DraftOptimizer(parallel.parameters, OptimizerSection(), 100)
        settings = TTTSettings(
            num_steps=shape.num_steps,
            attention_backend="sdpa",
            compute_dtype=dtype,
            activation_checkpointing=self.checkpointing,
        )
        _release()
        inputs, seconds = _resident_mb("VmRSS"), 0.0
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
        for step in range(num_steps):
            start = time.process_time()
            parallel.begin_step()
            output = parallel.forward(batch, head, settings)
            parallel.backward(output.loss, last=True)
            square_sum = parallel.reduce_gradients()
            optimizer.step(step, output.counted_K[0], output.loss.detach(), square_sum)
            del output
            seconds = time.process_time() - start
        return {"inputs": inputs, "peak": _resident_mb("VmHWM"), "seconds": seconds}


def _release() -> None:
    """Give freed memory back to the system (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SpecforgeError(f"no {field} in /proc/self/status")


def measure_apart(text: str, num_steps: int) -> dict[str, float]:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--measure", text, "--num-steps", str(num_steps)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SpecforgeError(f"{text}: {(result.stderr.splitlines() or ['no output'])[-1]}")
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def row_of(text: str, num_steps: int) -> dict[str, Any]:
    """Predicted and measured figures of a case, MB."""
    case, plan = Case.parse(text), Case.parse(text).predict()
    measured = measure_apart(text, num_steps)
    return {
        "case": text,
        "tokens": case.shape.batch * case.shape.length,
        "predicted_stays": sum(plan.stays.values()) / MB,
        "measured_inputs": measured["inputs"],
        "predicted_peak": plan.peak / MB,
        "measured_peak": measured["peak"],
        "seconds": measured["seconds"],
        "terms": {name: size / MB for name, size in plan.peak_terms.items()},
    }


def main() -> None:
    config = parse_config(MemoryBenchConfig, description=__doc__ or "")
    torch.set_num_threads(1)
    if config.measure is not None:
        print(json.dumps(Case.parse(config.measure).measure(config.num_steps)))
        return
    print(f"{platform.machine()}, one thread, torch {torch.__version__}; MB")
    print("| case | inputs and weights, predicted | measured | peak, predicted | measured | ratio | CPU-s a step |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for text in config.cases:
        rows.append(row := row_of(text, config.num_steps))
        figures = [row[kind] for kind in ("predicted_stays", "measured_inputs", "predicted_peak", "measured_peak")]
        cells = [text, *(f"{x:.0f}" for x in figures), f"{figures[2] / figures[3]:.2f}", f"{row['seconds']:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    for first, second in pairwise(rows):
        if second["tokens"] > first["tokens"]:
            slope = 1000 / (second["tokens"] - first["tokens"])
            measured, predicted = (slope * (second[k] - first[k]) for k in ("measured_peak", "predicted_peak"))
            print(
                f"{first['case']} to {second['case']}: {measured:.0f} MB per 1,000 tokens (predicted {predicted:.0f})"
            )
    if config.terms:
        show_terms(rows)
    if config.output:
        config.output.write_text(json.dumps({"argv": sys.argv[1:], "rows": rows}, indent=1))


def show_terms(rows: list[dict[str, Any]]) -> None:
    """The predicted terms of each case, largest first."""
    for row in rows:
        print(f"\n| {row['case']}: term | MB |\n|---|---|")
        for name, size in sorted(row["terms"].items(), key=lambda item: -item[1]):
            if size >= 0.5:
                print(f"| {name} | {size:.0f} |")
        print(f"| sum | {row['predicted_peak']:.0f} |\n| measured | {row['measured_peak']:.0f} |")


if __name__ == "__main__":
    run_script(main)
