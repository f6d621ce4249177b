"""`make gpu-proof` on a CPU: its stages run with small shapes, and a stage that fails is named with its line.
(`make gpu-proof-rehearsal` runs them as the command does, `resume` among them.)"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.gpu_proof import Stage, make_stages, report, run
from tests.script_runner import ROOT
from tests.training_runs import run_script


def test_the_stages_run_with_small_shapes(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in make_stages(True, tmp_path)}
    lines = {
        "parity": "sdpa against eager, bf16: loss", "mfu": "bf16-100",
        "mfu-plan": "MFU: predicted 5", "transport": "GB/s",
    }  # fmt: skip
    for name, line in lines.items():
        script, *words = stages[name].command[1:]
        done = run_script(str((ROOT / script).relative_to(ROOT)), words, tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert re.search(stages[name].expected, done.stdout), name
        assert line in done.stdout + done.stderr, name


def test_a_stage_that_fails_is_named_with_its_line() -> None:
    code = "print('fine'); print('error: the plan is off by +40%'); print('bye'); raise SystemExit(1)"
    failed = run(Stage("memory", [sys.executable, "-c", code]))
    assert failed.failing == "error: the plan is off by +40%"
    silent = run(Stage("tests", [sys.executable, "-c", "print('0 selected')"], r"\d+ passed"))
    assert silent.failing.startswith("ended well, but without")
    assert "| memory | error: the plan is off by +40% |" in report([failed], "x")


def test_the_real_run_has_every_stage_and_the_8b_shape(tmp_path: Path) -> None:
    stages = {stage.name: " ".join(stage.command) for stage in make_stages(False, tmp_path)}
    assert [*stages][:4] == ["environment", "tests", "parity", "resume"]
    assert "-m gpu tests" in stages["tests"]
    assert "--shape 8b --device cuda" in stages["mfu"]
    for kind in ("", "-dspark", "-dflash"):  # and those engines that are installed
        assert f"quickstart-hf{kind}" in stages


def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    done = run_script("benchmarks/gpu_proof.py", [], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no NVIDIA GPU here; --rehearse" in done.stderr
