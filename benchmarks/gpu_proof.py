"""Everything that a machine with NVIDIA GPUs must show, in one command: `make gpu-proof`.

    python benchmarks/gpu_proof.py                       every stage; writes benchmarks/results/gpu_NAME.md
    python benchmarks/gpu_proof.py --stages parity mfu   some of them
    python benchmarks/gpu_proof.py --rehearse            the same stages on a CPU with small shapes

A stage is a command of its own. All run, whatever fails; the last line names the first failing line of the first stage
that failed, and the exit code is 1. Serving stages run where `make engine-sglang` and `make engine-vllm` were run.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from pydantic import Field

from specforge_lite.core.devices import num_gpus
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import format_seconds, info, run_script
from specforge_lite.core.settings import Section, parse_config

ROOT = Path(__file__).resolve().parent.parent
TINY_TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"
TAIL_LINES = 12
# Largest difference of loss and gradients between backends, relative to the gradients' norm. bf16 keeps 8 bits.
PARITY_TOLERANCE = {"cuda": 0.03, "cpu": 0.03}
MEMORY_TOLERANCE = 0.2
# Share of the predicted MFU that the measured one must reach.
MFU_SHARE = 0.7


class GpuProofConfig(Section):
    """What to run, and where the report goes."""

    stages: tuple[str, ...] = Field((), description="only these stages, by name; default: all")
    rehearse: bool = Field(False, description="on a CPU with small shapes: shows that the stages themselves work")
    output: Path | None = Field(None, description="report; default: benchmarks/results/gpu_NAME.md")
    run_stage: str | None = Field(None, description="run one stage of this file in this process (used by itself)")
    figures: Path | None = Field(None, description="with --run-stage mfu-plan: what bench_training.py wrote")


@dataclass
class Stage:
    """A command and what it must show. expected: a pattern that its output must hold."""

    name: str
    command: list[str]
    expected: str = ""
    timeout_s: float = 3600.0


@dataclass
class Outcome:
    """What a stage showed. failing: the line that says why it failed; empty where it did not."""

    stage: Stage
    seconds: float
    failing: str
    tail: list[str] = field(default_factory=list)


def main() -> int:
    config = parse_config(GpuProofConfig, description=__doc__ or "")
    if config.run_stage is not None:
        return INTERNAL_STAGES[config.run_stage]("cpu" if config.rehearse else "cuda", config.figures)
    if not config.rehearse and not num_gpus():
        raise ConfigError("gpu_proof: no NVIDIA GPU here; --rehearse runs its stages on a CPU with small shapes")
    with TemporaryDirectory() as scratch:
        stages = make_stages(config.rehearse, Path(scratch))
        unknown = set(config.stages) - {stage.name for stage in stages}
        if unknown:
            names = ", ".join(stage.name for stage in stages)
            raise ConfigError(f"--stages {' '.join(sorted(unknown))}: unknown; known: {names}")
        outcomes = [run(stage) for stage in stages if not config.stages or stage.name in config.stages]
    name = "rehearsal" if config.rehearse else re.sub(r"\W+", "_", torch.cuda.get_device_name(0)).strip("_").lower()
    output = config.output or ROOT / "benchmarks" / "results" / f"gpu_{name}.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report(outcomes, name), encoding="utf-8")
    info(f"wrote {output}")
    failed = [outcome for outcome in outcomes if outcome.failing]
    if failed:
        print(f"FAILED {failed[0].stage.name}: {failed[0].failing}", file=sys.stderr, flush=True)
    return int(bool(failed))


def make_stages(rehearse: bool, scratch: Path) -> list[Stage]:
    """All stages in order: cheap ones first."""
    python, tests = sys.executable, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    own = [python, str(Path(__file__)), *(["--rehearse"] if rehearse else []), "--run-stage"]
    bench = [python, "benchmarks/bench_training.py", "--no-memory", "--rounds", "3"]
    shape = ["--shape", "test"] if rehearse else ["--shape", "8b", "--device", "cuda", "--rounds", "7"]
    tokens = ["32", "--hidden-size", "64", "--num-samples", "4", "--num-rounds", "1"] if rehearse else ["1024"]
    gpu_tests = ["tests/model/test_initialize.py"] if rehearse else ["-m", "gpu", "tests"]
    stages = [
        Stage("environment", [python, "scripts/verify_installation.py"]),
        Stage("tests", [*tests, *gpu_tests], r"\d+ passed"),
        Stage("parity", [*own, "parity"], "all backends agree"),
        Stage("resume", [*own, "resume"], "the same bits"),
        Stage("memory", [*own, "memory"], "memory plan"),
        Stage("mfu", [*bench, *shape, "--variants", "bf16-100", "--output", str(scratch / "mfu.json")]),
        Stage("mfu-plan", [*own, "mfu-plan", "--figures", str(scratch / "mfu.json")], "MFU"),
        Stage("transport", [python, "benchmarks/bench_capture.py", "--transport-only", "--transport-tokens", *tokens]),
    ]
    small = ["--num-train", "8", "--num-eval", "2", "--num-epochs", "1"] if rehearse else []
    for engine in ("hf", "sglang", "vllm"):
        if engine != "hf" and (rehearse or not (ROOT / f".venv-{engine}" / "bin" / "python").exists()):
            continue
        for kind in ("eagle3", "dspark", "dflash"):  # trained, exported, served: acceptance and text as our decoder's
            name = f"quickstart-{engine}" + f"-{kind}" * (kind != "eagle3")
            own = ["--engine", engine, "--draft-kind", kind, "--output-dir", str(scratch / name)]
            stages.append(Stage(name, [python, "scripts/quickstart.py", *own, *small], "RESULT .*identical=yes"))
    return stages


def run(stage: Stage) -> Outcome:
    """Run a stage, show how it went, and find the line that says why it failed."""
    info(f"{stage.name}: {' '.join(word.replace(sys.executable, 'python') for word in stage.command)}")
    start = time.monotonic()
    try:
        done = subprocess.run(
            stage.command,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=stage.timeout_s,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = -1, str(error.stdout or "") + f"\nstill running after {stage.timeout_s:.0f} s"
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    failing = ""
    if code != 0:
        marks = re.compile(r"error:|Error|FAILED|assert")
        failing = next(
            (line for line in reversed(lines) if marks.search(line)), lines[-1] if lines else f"exit code {code}"
        )
    elif stage.expected and not re.search(stage.expected, output):
        failing = f"ended well, but without '{stage.expected}' in its output"
    seconds = time.monotonic() - start
    info(f"{stage.name}: {'FAILED' if failing else 'ok'} after {format_seconds(seconds)}")
    return Outcome(stage, seconds, failing, lines[-TAIL_LINES:])


def report(outcomes: list[Outcome], name: str) -> str:
    """Markdown: machine, a table of stages, and the last lines of each."""
    gpus = [torch.cuda.get_device_name(i) for i in range(num_gpus())]
    lines = [
        f"# GPU proof: {name}",
        "",
        f"{datetime.now(UTC).date()}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python"
        f" {platform.python_version()}; {', '.join(gpus) or 'no GPU (rehearsal with small shapes)'}",
        "",
        "| stage | result | time |",
        "|---|---|---|",
    ]
    lines += [f"| {o.stage.name} | {o.failing or 'ok'} | {format_seconds(o.seconds)} |" for o in outcomes]
    for outcome in outcomes:
        lines += ["", f"## {outcome.stage.name}", "", "```", *outcome.tail, "```"]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------- stages of this file


def parity(device: str, figures: Path | None) -> int:
    """Loss and gradients of each attention backend against `eager`, all in bf16, of an EAGLE-3 and a DSpark draft."""
    from benchmarks.bench_training import SHAPES, Shape, make_draft, make_inputs
    from benchmarks.block_step import block_draft, block_inputs
    from specforge_lite.model.draft import TTTSettings

    shape = SHAPES["test"] if device == "cpu" else Shape(1024, 16, 4, 2816, 32000, 8000, 2, 700)
    batch, head, d2t, t2d = make_inputs(shape, 0.75, device)
    for kind, inputs, make in (
        ("EAGLE-3", (batch, head), lambda: make_draft(shape, d2t, t2d)),
        ("DSpark", block_inputs(shape, 0.75), lambda: block_draft(shape)),
    ):
        parts = [part.to(device, torch.bfloat16) for part in inputs]
        found: dict[str, tuple[float, torch.Tensor]] = {}
        for backend in ("eager", "sdpa", *(["flex_attention"] if device == "cuda" else [])):
            draft = make().to(device)
            settings = TTTSettings(shape.num_steps, attention_backend=backend, compute_dtype=torch.bfloat16)
            output = draft(*parts, settings)
            output.loss.backward()
            flat = torch.cat([p.grad.flatten() for p in draft.parameters() if p.grad is not None])
            found[backend] = (float(output.loss.detach()), flat)
        loss, gradient = found.pop("eager")
        for backend, (other_loss, other) in found.items():
            difference = float((other - gradient).norm() / gradient.norm())
            print(
                f"{kind}, {backend} against eager, bf16: loss {other_loss / loss - 1:+.2e}, gradients {difference:.2e}"
            )
            if not (difference < PARITY_TOLERANCE[device] and abs(other_loss / loss - 1) < PARITY_TOLERANCE[device]):
                print(f"error: {kind}: {backend} differs from eager by more than {PARITY_TOLERANCE[device]}")
                return 1
    print("all backends agree")
    return 0


def resume(device: str, figures: Path | None) -> int:
    """8 steps in one life against 5 + 3 with `--deterministic`: the same bits; and what the flag costs."""
    rows = [
        {"id": str(i), "conversations": [
            {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"one {i} two three four five"}]}
        for i in range(16)
    ]  # fmt: skip
    with TemporaryDirectory() as scratch:
        data = Path(scratch) / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        seconds = {}
        for name, steps, extra in (
            ("whole", 8, ["--deterministic"]),
            ("parts", 5, ["--deterministic"]),
            ("parts", 8, ["--deterministic"]),
            ("plain", 8, []),
        ):
            words = [
                "--target-model-path", str(TINY_TARGET), "--target-backend", "hf", "--train-data-path", str(data),
                "--output-dir", f"{scratch}/{name}", "--cache-dir", f"{scratch}/cache", "--max-length", "64",
                "--batch-size", "2", "--lr-schedule", "constant", "--warmup-steps", "0", "--ttt-length", "3",
                "--total-steps", str(steps), "--precision", "bf16" if device == "cuda" else "fp32", *extra,
            ]  # fmt: skip
            start = time.monotonic()
            subprocess.run([sys.executable, "scripts/train_eagle3_online.py", *words], cwd=ROOT, check=True)
            seconds[name, steps] = time.monotonic() - start
        files = [Path(scratch) / name / "step_8" / "draft.safetensors" for name in ("whole", "parts")]
        if files[0].read_bytes() != files[1].read_bytes():
            print("error: a run that was stopped after 5 of 8 steps has other weights than one that was not")
            return 1
    print(f"the same bits; with --deterministic {seconds['whole', 8]:.1f} s, without {seconds['plain', 8]:.1f} s")
    return 0


def memory(device: str, figures: Path | None) -> int:
    """Peak of a training step against the plan: of the 8B shape on a GPU, of a small one on a CPU."""
    if device == "cpu":
        from benchmarks.bench_memory import Case

        case = Case.parse("small:fp32-75")
        measured, predicted = float(case.measure(2)["peak"]) * 2**20, case.predict().peak
    else:
        from benchmarks.bench_training import SHAPES, Variant, make_step
        from specforge_lite.model.draft import DraftConfig
        from specforge_lite.training.estimate import Workload, plan_memory

        shape = SHAPES["8b"]
        step = make_step(Variant.parse("bf16-100"), shape, device)
        for _ in range(2):
            step()
        measured = float(torch.cuda.max_memory_allocated())
        draft = DraftConfig(shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.vocab, shape.draft_vocab)
        total = torch.cuda.get_device_properties(0).total_memory
        load = Workload(draft, shape.batch * shape.length, shape.num_steps, captured_ahead=0, device_memory=total)
        predicted = plan_memory(load).peak
    print(f"memory plan {predicted / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB")
    if abs(measured / predicted - 1) > MEMORY_TOLERANCE:
        print(f"error: the plan is off by {measured / predicted - 1:+.0%}, more than {MEMORY_TOLERANCE:.0%}")
        return 1
    return 0


def mfu(device: str, figures: Path | None) -> int:
    """Measured MFU of the stage before against the plan's; on a CPU both are printed only."""
    from specforge_lite.model.draft import DraftConfig
    from specforge_lite.training.estimate import Workload, step_time

    assert figures is not None
    row = next(row for row in json.loads(figures.read_text())["rows"] if row["variant"] == "bf16-100")
    draft = DraftConfig(4096, 14336, 32, 8, 128256, 32000)
    predicted = step_time(Workload(draft, 8192)).mfu
    measured = row.get("mfu")
    if device == "cpu" or measured is None:
        print(f"MFU: predicted {predicted:.0%} for the 8B shape on Hopper; nothing to compare on a CPU")
        return 0
    print(f"MFU: measured {measured:.0%}, predicted {predicted:.0%}")
    if measured < MFU_SHARE * predicted:
        print(f"error: MFU {measured:.0%} is below {MFU_SHARE:.0%} of the predicted {predicted:.0%}")
        return 1
    return 0


INTERNAL_STAGES = {"parity": parity, "resume": resume, "memory": memory, "mfu-plan": mfu}

if __name__ == "__main__":
    run_script(main)
