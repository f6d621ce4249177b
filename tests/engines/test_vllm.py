"""The live checks against vLLM."""

from __future__ import annotations

from live_speedup import SpeedupChecks
from live_suite import CaptureChecks, oracle
from live_training import TensorParallelChecks, TrainingChecks

__all__ = ["oracle"]


class TestCapture(CaptureChecks):
    engine_name = "vllm"


class TestTensorParallel(TensorParallelChecks):
    engine_name = "vllm"


class TestTraining(TrainingChecks):
    engine_name = "vllm"
    plain_server_error = "the capture plugin is not at work in this server"


class TestSpeedup(SpeedupChecks):
    engine_name = "vllm"
    speculation = "2,3,1,4"
