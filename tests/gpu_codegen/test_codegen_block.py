"""The compiled loss of block drafts and their attention, as `test_codegen.py` has EAGLE-3's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu_codegen import test_codegen
from tests.gpu_codegen.test_codegen import check, compile_cases

pytestmark = [pytest.mark.codegen, pytest.mark.timeout(1800)]
# Qwen3-8B and Llama-3.1-8B, Qwen3-30B-A3B, the shipped target; DSpark's loss and DFlash's
CASES = [
    "block:bfloat16:32:8:128:300",
    "block:bfloat16:32:4:128:60,700",
    "block:float32:4:2:32:120",
    *(f"blockloss:float32:{kind}" for kind in ("dspark", "dflash")),
]

guard = test_codegen.guard


@pytest.fixture(scope="module")
def compiled(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return compile_cases(guard, CASES, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("case", CASES)
def test_compiles_to_cubins(case: str, compiled: dict[str, dict[str, Any]]) -> None:
    check(compiled[case])
