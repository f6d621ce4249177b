"""Settings against the machine: what a CPU cannot do is replaced, a GPU shared with the target's server is divided."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from specforge_lite.core.hub import load_config, local_directory
from specforge_lite.core.log import format_bytes, info
from specforge_lite.core.weight_files import safetensors_files
from specforge_lite.model.device import choose_attention, triton_problem, usable_dtype
from specforge_lite.model.draft import DraftConfig
from specforge_lite.training.settings import TrainConfig


def use_deterministic_kernels() -> None:
    """`--deterministic`: sums on CUDA in a fixed order, before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _backend(config: TrainConfig) -> str:
    if config.target.target_backend != "auto":
        return config.target.target_backend
    from specforge_lite.serving.environment import choose_backend

    return choose_backend(config.target)


def fit_to_device(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with what the device cannot do replaced, one line each, before anything is loaded. Raises ConfigError
    where no attention backend fits."""
    training: dict[str, Any] = {}
    compiler = triton_problem() if device.type == "cuda" else _cpp_problem()
    if config.training.compile and compiler is not None:
        info(f"--compile: {compiler}; training without it")
        training["compile"] = False
    if device.type == "cuda":
        precision = config.training.precision
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
        name, head_dim = config.training.draft_attention_backend, _draft_config(config).head_dim
        training["draft_attention_backend"] = choose_attention(name, "cuda", dtype, head_dim)
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
    if config.target.tp_size > 1 and _backend(config) == "hf":
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks % config.target.tp_size:
            info(
                f"--tp-size {config.target.tp_size}: the hf engine splits a target over torchrun ranks, here"
                f" {ranks}; the whole target runs in each"
            )
            sections["target"] = {"tp_size": 1}
    return config.with_values(**sections)


def _cpp_problem() -> str | None:
    compilers = ("g++", "clang++", os.environ.get("CXX", "g++"))
    return None if any(map(shutil.which, compilers)) else "no C++ compiler (g++ or clang++; or CXX) for Inductor"


def _target_config(config: TrainConfig) -> Any:
    return load_config(config.target.target_model_path, config.target.trust_remote_code)


def _draft_config(config: TrainConfig) -> DraftConfig:
    if config.draft.draft_model_config is not None:
        return DraftConfig.from_json(config.draft.draft_model_config)
    return DraftConfig.from_target(_target_config(config), config.draft.draft_vocab_size, config.algorithm)


def _physical(device: torch.device) -> str:
    """The device's name among all of the host, as `--engine-devices` gives them: this process may see only some."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = device.index or 0
    return visible.split(",")[index].strip() if visible else str(index)


def share_of_gpu(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with `mem_frac` chosen where a launched server shares this rank's GPU and none was given: engines take
    70 to 92% otherwise. Raises ConfigError, with the numbers, where both do not fit."""
    target = config.target
    if device.type != "cuda" or target.mem_frac is not None or target.target_url or config.training.offline_dir:
        return config
    if _backend(config) not in ("sglang", "vllm"):
        return config
    if target.engine_devices is not None and _physical(device) not in target.engine_devices.split(","):
        return config
    from specforge_lite.training.estimate import Workload, memory_fraction, plan_memory

    training, total = config.training, torch.cuda.get_device_properties(device).total_memory
    layers, draft = config.with_target_defaults().target.aux_layer_ids, _draft_config(config)
    draft = draft.replace(**config.draft_shape(draft, _target_config(config)))
    load = Workload(
        draft if layers is None else draft.replace(aux_layer_ids=layers),
        tokens=training.max_tokens_per_batch or training.batch_size * config.data.max_length,
        num_steps=training.ttt_length,
        precision="bf16" if training.precision == "auto" else training.precision,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        sp_size=config.distributed.sp_size,
        sharding=config.distributed.sharding,
        cpu_offload=config.distributed.cpu_offload,
        optim=config.optimizer.optim,
        activation_checkpointing=training.activation_checkpointing,
        sample_length=config.data.max_length,
        device_memory=total,
        **{name: value for name, value in training.loss_settings().items() if name == "num_anchors"},
    )
    plan = plan_memory(load)
    weights = sum(path.stat().st_size for path in safetensors_files(local_directory(target.target_model_path)))
    fraction = memory_fraction(plan, weights / target.tp_size, total)
    info(
        f"mem_frac {fraction}: the target's server shares this GPU of {format_bytes(total)} with the trainer, whose"
        f" peak is {format_bytes(plan.peak)} by the memory plan"
    )
    return config.with_values(target={"mem_frac": fraction})
