"""Attention and loss compiled through Inductor and Triton to sm_90 cubins, forward and backward, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_codegen.hopper import SHARED_MEMORY_LIMIT

pytestmark = [pytest.mark.codegen, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
# (query heads, key heads, head width): Llama-3.1-8B and Qwen3-8B, Llama-3.3-70B, Qwen2.5-7B, no groups, 40 heads, tiny
SHAPES = ((32, 8, 128), (64, 8, 128), (28, 4, 128), (16, 16, 128), (40, 8, 128), (4, 2, 32))
ROWS = (20, 60, 120, 700, 4096)
DTYPES = ("bfloat16", "float32")
DEFAULT = [
    "flex:bfloat16:32:8:128:60",  # torch's own kernel for few rows has no configuration for these sizes
    "flex:bfloat16:32:8:128:700",
    "flex:bfloat16:28:4:128:20",
    "flex:float32:16:16:128:120",
    "flex:float32:4:2:32:60",
    "block:bfloat16:32:8:128:300",
    *(f"loss:{dtype}:{loss}" for dtype in DTYPES for loss in ("ce", "lk", "lk_alpha")),
    *(f"gate:{dtype}" for dtype in DTYPES),
]


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device guard, built."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    include = Path(str(spec.origin)).parent / "include"
    library = tmp_path_factory.mktemp("guard") / "cuda_guard.so"
    source = Path(__file__).parent / "cuda_guard.cpp"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{include}", str(source), "-o", str(library)], check=True
    )
    return library


def compile_cases(guard: Path, cases: list[str], scratch: Path) -> dict[str, dict[str, Any]]:
    """What the compiler made of each case, in a process with a GPU that is not there."""
    caches = {name: str(scratch / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.gpu_codegen.compile_cases", str(guard), *cases]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cases), process.stderr[-2000:]
    return {line["case"]: line for line in lines}


@pytest.fixture(scope="module")
def compiled(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return compile_cases(guard, DEFAULT, tmp_path_factory.mktemp("cache"))


def check(result: dict[str, Any]) -> None:
    assert result["error"] is None, f"{result['case']}: {result['error']}"
    assert result["kernels"], result["case"]
    for name, shared in result["kernels"]:
        assert shared <= SHARED_MEMORY_LIMIT, f"{result['case']}: {name} needs {shared} bytes of shared memory"
    if result["case"].startswith(("flex", "block")):
        assert set(result["graphs"]) == {"forward", "backward"}, result["case"]
        assert any("flex_attention_backward" in name for name, _ in result["kernels"]), result["case"]


@pytest.mark.parametrize("case", DEFAULT)
def test_compiles_to_cubins(case: str, compiled: dict[str, dict[str, Any]]) -> None:
    check(compiled[case])


@pytest.mark.stress
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_number_of_rows(shape: tuple[int, int, int], dtype: str, guard: Path, tmp_path: Path) -> None:
    cases = [f"flex:{dtype}:{':'.join(map(str, shape))}:{rows}" for rows in ROWS]
    for result in compile_cases(guard, cases, tmp_path).values():
        check(result)
