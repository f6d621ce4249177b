"""Target families in real engines: what the table of docs/engines.md says was run, and what it says is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from specforge_lite.capture.hf import HfEngine
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config
from specforge_lite.core.sections import TargetSection
from specforge_lite.model.target_head import load_target_head
from specforge_lite.serving.registry import open_engine
from specforge_lite.types import TokenizedSample
from tests.target_families import REMOTE_FAMILIES, save_family

AUX = (1, 2, 3)
LENGTHS = (1, 5, 33, 100, 200)
RELATIVE = 1e-4


def section(engine: str, path: Path, shm: Path, trust: bool = False) -> TargetSection:
    return TargetSection(
        target_model_path=str(path), target_backend=engine, target_dtype="float32", aux_layer_ids=AUX,
        transport_dir=shm, trust_remote_code=trust,
    )  # fmt: skip


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Row by row: the largest difference of a row against the largest value of that row."""
    return float(((got - want).abs().amax(-1) / want.abs().amax(-1)).max())


@pytest.mark.parametrize(
    ("engine_name", "family"),
    [("vllm", "qwen3-moe"), ("vllm", "gpt-oss"), ("vllm", "minicpm4"), ("sglang", "qwen3-moe")],
)
def test_states_of_a_family_equal_transformers(
    engine_name: str, family: str, tmp_path: Path, tiny_target: Path
) -> None:
    trust = family in REMOTE_FAMILIES
    path, shm = save_family(family, tmp_path / "model", wide=True), tmp_path / "shm"
    shm.mkdir()
    for file in tiny_target.glob("tokenizer*"):  # vLLM wants one for some families
        shutil.copy(file, path)
    oracle = HfEngine(str(path), AUX, dtype="float32", device="cpu", trust_remote_code=trust)
    head = load_target_head(path, load_config(path, trust))
    engine = open_engine(section(engine_name, path, shm, trust), 200, log_dir=tmp_path / "log", wait_minutes=8)
    try:
        generator = torch.Generator().manual_seed(0)
        for length in LENGTHS:
            ids = torch.randint(0, oracle.info.vocab_size, (length,), generator=generator)
            sample = TokenizedSample("s", ids, ids >= 0)
            (got,), (want,) = engine.capture([sample]), oracle.capture([sample])
            assert relative_error(got.aux_LAH, want.aux_LAH) < RELATIVE
            last = got.last_LH if got.last_is_normed else head.norm(got.last_LH)
            assert relative_error(last, want.last_LH) < RELATIVE
    finally:
        engine.close()
        oracle.close()
    assert list(shm.iterdir()) == []


@pytest.mark.parametrize("engine_name", ["sglang", "vllm"])
@pytest.mark.parametrize("family", ["gemma3", "gemma3-vision", "cohere"])
def test_a_family_that_an_engine_gets_wrong_is_refused_before_it_is_launched(
    engine_name: str, family: str, tmp_path: Path
) -> None:
    path, shm = save_family(family, tmp_path / "model"), tmp_path / "shm"
    shm.mkdir()
    target = section(engine_name, path, shm).model_copy(update={"aux_layer_ids": (1, 2)})
    with pytest.raises(ConfigError, match=rf"target_backend {engine_name}: .*; use --target-backend hf$"):
        open_engine(target, 200, log_dir=tmp_path / "log")
    assert not (tmp_path / "log").exists()
    assert list(shm.iterdir()) == []
