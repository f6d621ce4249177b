"""What a machine computes with: dtypes and attention backends, chosen before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import parse_config
from specforge_lite.model import device, device_cuda
from specforge_lite.model.device import choose_attention, usable_dtype
from specforge_lite.model.device_cuda import flash_problem
from specforge_lite.training.machine import fit_to_device
from specforge_lite.training.settings import TrainConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROOT = Path(__file__).resolve().parents[2]
TINY_TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"


@pytest.fixture(autouse=True)
def _ask_again() -> None:
    device_cuda.triton_problem.cache_clear()
    device.warn_once.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A slim image: nothing but Python on the path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "head_dim", "expected"),
    [
        ("auto", "cpu", BF16, 64, "sdpa"),
        ("flex_attention", "cpu", FP32, 64, "sdpa"),
        ("eager", "cpu", FP32, 64, "eager"),
        ("auto", "cuda", BF16, 128, "flex_attention"),
        ("auto", "cuda", FP32, 128, "flex_attention"),
        ("flex_attention", "cuda", FP32, 80, "flex_attention"),
        ("sdpa", "cuda", BF16, 128, "sdpa"),
        ("sdpa", "cuda", FP16, 256, "sdpa"),
        ("eager", "cuda", FP32, 12, "eager"),
    ],
)
def test_the_backend_that_runs(name: str, kind: str, dtype: torch.dtype, head_dim: int, expected: str) -> None:
    assert choose_attention(name, kind, dtype, head_dim) == expected


@pytest.mark.parametrize(
    ("dtype", "head_dim", "found"),
    [(FP32, 128, "take bf16 and fp16, not float32"), (BF16, 20, "up to 256, not 20"), (BF16, 264, "not 264")],
)
def test_what_flash_attention_refuses_is_one_line(dtype: torch.dtype, head_dim: int, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as error:
        choose_attention("sdpa", "cuda", dtype, head_dim)
    assert "use flex_attention" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_compiler_flex_attention_becomes_sdpa(no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("auto", "flex_attention", "auto"):
        assert choose_attention(name, "cuda", BF16, 128) == "sdpa"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "no C compiler" in lines[0]
    with pytest.raises(ConfigError, match=r"no C compiler.*use --precision bf16"):
        choose_attention("auto", "cuda", FP32, 128)


def test_heads_too_narrow_for_flex_attention_take_sdpa(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_attention("auto", "cuda", BF16, 8) == "sdpa"
    assert "its kernel takes head widths from 16, not 8; using sdpa" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"not 12; and flex_attention needs more: .* from 16, not 12.*or eager"):
        choose_attention("sdpa", "cuda", BF16, 12)


def test_without_python_headers_flex_attention_becomes_sdpa(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_cuda.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert choose_attention("auto", "cuda", BF16, 128) == "sdpa"
    assert "Python.h is missing" in capsys.readouterr().err


def test_bf16_on_a_cpu_without_avx512_is_fp32() -> None:
    code = "import torch; from specforge_lite.model.device import usable_dtype as u; print(u(torch.bfloat16, 'cpu'))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "torch.float32"
    assert usable_dtype(BF16, "cuda") is BF16
    assert usable_dtype(torch.float64, "cpu") is torch.float64


def train_config(tmp_path: Path, *flags: str) -> TrainConfig:
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    common = [
        "--target-model-path",
        str(TINY_TARGET),
        "--train-data-path",
        str(data),
        "--output-dir",
        str(tmp_path / "run"),
    ]
    return parse_config(TrainConfig, [*common, *flags])


def test_training_on_a_gpu_settles_the_backend_first(tmp_path: Path, no_compiler: None) -> None:
    gpu = torch.device("cuda")
    assert fit_to_device(train_config(tmp_path), gpu).training.draft_attention_backend == "sdpa"
    with pytest.raises(ConfigError, match="draft_attention_backend sdpa: its CUDA kernels take bf16"):
        fit_to_device(train_config(tmp_path, "--precision", "fp32"), gpu)


def test_the_head_width_of_a_draft_without_a_file_is_the_targets(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    values = json.loads((TINY_TARGET / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, "head_dim": 12}))
    config = train_config(tmp_path, "--target-model-path", str(target), "--draft-attention-backend", "sdpa")
    with pytest.raises(ConfigError, match="multiples of 8 up to 256, not 12"):
        fit_to_device(config, torch.device("cuda"))


@pytest.mark.parametrize(("kind", "found"), [("cuda", "no C compiler"), ("cpu", "no C\\+\\+ compiler")])
def test_without_a_compiler_nothing_is_compiled(
    kind: str, found: str, tmp_path: Path, no_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not fit_to_device(train_config(tmp_path, "--compile"), torch.device(kind)).training.compile
    assert re.search(f"--compile: {found}.*; training without it", capsys.readouterr().out)


def test_training_in_bf16_on_an_old_cpu_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    config = fit_to_device(train_config(tmp_path, "--precision", "bf16"), torch.device("cpu"))
    assert config.training.precision == "fp32"
    assert "no AVX-512" in capsys.readouterr().out


def test_what_flash_takes() -> None:
    assert flash_problem(None, None) is None
    assert flash_problem(BF16, 96) is None
