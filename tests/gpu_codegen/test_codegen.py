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

from tests.gpu_codegen.compile_cases import ROWS
from tests.gpu_codegen.hopper import SHARED_MEMORY_LIMIT

pytestmark = [pytest.mark.codegen, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
# (query heads, key heads, head width): Llama-3.1-8B and Qwen3-8B, Llama-3.3-70B, Qwen2.5-7B, no groups, 40 heads, tiny
SHAPES = ("32:8:128", "64:8:128", "28:4:128", "16:16:128", "40:8:128", "4:2:32")
DTYPES = ("float32", "bfloat16")
# Those that compile longest first: two are compiled at a time.
CASES = [
    *(f"flex:{dtype}:{shape}" for dtype in DTYPES for shape in SHAPES),
    *(f"block:{case}" for case in ("bfloat16:32:8:128", "bfloat16:32:4:128", "float32:4:2:32")),
    *(f"blockloss:float32:{kind}" for kind in ("dspark", "dflash")),
    *(f"loss:{dtype}:{loss}" for dtype in DTYPES for loss in ("ce", "lk", "lk_alpha")),
    *(f"gate:{dtype}:{direction}" for dtype in DTYPES for direction in ("forward", "backward")),
]
MOST_GRAPHS = 4


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


@pytest.fixture(scope="module")
def compiled(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of each case, in processes with a GPU that is not there."""
    scratch = tmp_path_factory.mktemp("cache")
    caches = {name: str(scratch / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.gpu_codegen.compile_cases", str(guard), *CASES]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(CASES), process.stderr[-2000:]
    print("\nCPU seconds:", {result["case"]: result["seconds"] for result in results})
    return {result["case"]: result for result in results}


@pytest.mark.parametrize("case", CASES)
def test_compiles_to_cubins_for_every_number_of_rows(case: str, compiled: dict[str, dict[str, Any]]) -> None:
    result = compiled[case]
    assert result["error"] is None
    assert result["ran"] == list(ROWS)
    assert result["kernels"]
    for name, shared in result["kernels"]:
        assert shared <= SHARED_MEMORY_LIMIT, f"{name} needs {shared} bytes of shared memory"
    assert result["graphs"].count("forward") <= MOST_GRAPHS
    if case.startswith(("flex:", "block:")):
        assert result["graphs"].count("backward") == result["graphs"].count("forward")
        names = [name for name, _ in result["kernels"] if name.startswith("triton_tem")]
        assert sum("flex_attention_backward" in name for name in names) == result["graphs"].count("backward")
        assert sum("flex_attention_backward" not in name for name in names) == result["graphs"].count("forward")
