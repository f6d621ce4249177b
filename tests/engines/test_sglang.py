"""The live checks against SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_speedup import SpeedupChecks
from live_suite import CaptureChecks, oracle
from live_training import TensorParallelChecks, TrainingChecks

from specforge_lite.core.errors import CaptureError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.registry import open_engine

__all__ = ["oracle"]


class TestCapture(CaptureChecks):
    engine_name = "sglang"


class TestTensorParallel(TensorParallelChecks):
    engine_name = "sglang"


class TestTraining(TrainingChecks):
    engine_name = "sglang"
    plain_server_error = "without --enable-return-aux-hidden-states"


class TestSpeedup(SpeedupChecks):
    engine_name = "sglang"
    speculation = "2,3,2,6"
    temperatures = ("0",)  # with a draft it answers greedily on a CPU, which is refused


def test_a_plugin_that_sglang_did_not_load_is_noticed(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another")  # sglang goes on without ours and says nothing
    target = TargetSection(
        target_model_path=str(tiny_target), target_backend="sglang", transport_dir=tmp_path, target_dtype="float32"
    )
    with pytest.raises(CaptureError, match="the capture plugin is not at work in this server"):
        open_engine(target, 200, log_dir=tmp_path / "log", wait_minutes=5)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
