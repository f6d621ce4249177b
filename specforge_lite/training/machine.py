"""Settings against the machine: what it cannot do is replaced."""

from __future__ import annotations

import os
from typing import Any

import torch

from specforge_lite.core.log import info
from specforge_lite.model.device import usable_dtype
from specforge_lite.training.settings import TrainConfig


def use_deterministic_kernels() -> None:
    """`--deterministic`: sums on CUDA in a fixed order, before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def backend_of(config: TrainConfig) -> str:
    """The engine that `--target-backend` means on this machine."""
    if config.target.target_backend != "auto":
        return config.target.target_backend
    from specforge_lite.serving.environment import choose_backend

    return choose_backend(config.target)


def fit_to_device(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with what the device cannot do replaced, one line each, before anything is loaded. Raises ConfigError
    where no attention backend fits."""
    training: dict[str, Any] = {}
    if config.training.compile:
        from specforge_lite.model.fused import compiler_problem

        if problem := compiler_problem(device):
            info(f"--compile: {problem}; training without it")
            training["compile"] = False
    if device.type == "cuda":
        from specforge_lite.training.gpu_share import attention_on_gpu

        training["draft_attention_backend"] = attention_on_gpu(config)
        return config.with_values(training=training)
    if config.training.draft_attention_backend == "flex_attention":
        info("--draft-attention-backend flex_attention: has no backward pass on a CPU; training with sdpa")
        training["draft_attention_backend"] = "sdpa"
    if config.training.precision == "fp16":
        info("--precision fp16: CPUs have no fast fp16 arithmetic (a hundred times slower); training in fp32")
        training["precision"] = "fp32"
    if config.training.precision == "bf16" and usable_dtype(torch.bfloat16, device.type) != torch.bfloat16:
        info("--precision bf16: this CPU has no AVX-512 (thirty times slower than fp32); training in fp32")
        training["precision"] = "fp32"
    sections: dict[str, dict[str, Any]] = {"training": training}
    if config.distributed.cpu_offload:
        info("--cpu-offload: there is no GPU here, everything lies in CPU memory already; without it")
        sections["distributed"] = {"cpu_offload": False}
    if config.target.tp_size > 1 and backend_of(config) == "hf":
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks % config.target.tp_size:
            info(
                f"--tp-size {config.target.tp_size}: the hf engine splits a target over torchrun ranks, here"
                f" {ranks}; the whole target runs in each"
            )
            sections["target"] = {"tp_size": 1}
    return config.with_values(**sections)
