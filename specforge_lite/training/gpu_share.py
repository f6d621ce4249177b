"""Settings against a GPU: the draft's attention, and how much memory the target's server gets of a shared one."""

from __future__ import annotations

import os

import torch

from specforge_lite.core.hub import load_config, local_directory
from specforge_lite.core.log import format_bytes, info
from specforge_lite.core.weight_files import safetensors_files
from specforge_lite.model.config_json import config_from_file
from specforge_lite.model.device import choose_attention
from specforge_lite.model.draft import DraftConfig
from specforge_lite.training.estimate import Workload, memory_fraction, plan_memory
from specforge_lite.training.machine import backend_of
from specforge_lite.training.settings import TrainConfig


def attention_on_gpu(config: TrainConfig) -> str:
    """The attention backend for the draft's dtype and heads. Raises ConfigError where none fits."""
    training = config.training
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(training.precision, torch.bfloat16)
    return choose_attention(training.draft_attention_backend, "cuda", dtype, _draft_shape(config).head_dim)


def _draft_shape(config: TrainConfig) -> DraftConfig:
    """The draft's shape as `--draft-model-config` says it, or derived from the target's; before anything is loaded."""
    if config.draft.draft_model_config is not None:
        return config_from_file(config.draft.draft_model_config)
    target = load_config(config.target.target_model_path, config.target.trust_remote_code)
    return DraftConfig.from_target(target, config.draft.draft_vocab_size, config.algorithm)


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
    if backend_of(config) not in ("sglang", "vllm"):
        return config
    if target.engine_devices is not None and _physical(device) not in target.engine_devices.split(","):
        return config
    training, total = config.training, torch.cuda.get_device_properties(device).total_memory
    layers, draft = config.with_target_defaults().target.aux_layer_ids, _draft_shape(config)
    draft = draft.replace(**config.draft_shape(draft, load_config(target.target_model_path, target.trust_remote_code)))
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
