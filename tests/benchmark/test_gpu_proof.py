"""`make gpu-proof` on a CPU: its stages run with small shapes, and a stage that fails is named with its line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_proof import Stage, make_stages, report, run

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["parity", "resume", "memory", "mfu", "mfu-plan", "transport", "quickstart-hf-dspark"]


@pytest.mark.timeout(900)
def test_a_rehearsal_runs_the_stages_and_writes_the_report(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_proof.py", "--rehearse", "--output", str(tmp_path / "proof.md")]
    done = subprocess.run([*command, "--stages", *STAGES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "proof.md").read_text()
    for stage in STAGES:
        assert f"| {stage} | ok |" in text
    for line in ("all backends agree", "the same bits; with --deterministic", "memory plan 0.", "MFU: predicted 5"):
        assert line in text


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


def test_without_a_gpu_one_line_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_proof.py"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no NVIDIA GPU here; --rehearse" in done.stderr
