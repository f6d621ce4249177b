"""Packed weights, written by vLLM's and compressed-tensors' own functions and read by ours."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specforge_lite.core.weight_files import read_weight, weight_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    writer = Path(__file__).with_name("quantized_layouts.py")
    command = [str(ROOT / ".venv-vllm" / "bin" / "python"), str(writer), str(directory)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return directory


@pytest.mark.parametrize("name", ["awq", "gptq", "packed", "nvfp4"])
def test_a_weight_is_what_the_engine_multiplies_with(packed: Path, name: str) -> None:
    expected = load_file(packed / name / "expected.safetensors")["weight"]
    (packed / name / "expected.safetensors").rename(packed / f"{name}.safetensors")
    weight = read_weight(weight_files(packed / name), "lm_head.weight")
    assert weight is not None
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
