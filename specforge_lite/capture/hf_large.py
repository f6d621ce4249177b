"""Targets that need more than one device, or that are quantised, in this process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from specforge_lite.core.devices import num_gpus
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config, local_directory
from specforge_lite.core.log import format_bytes, info
from specforge_lite.core.weight_files import safetensors_files

# Of a GPU's memory; the rest is for activations, caches and the draft.
WEIGHTS_SHARE = 0.85


def _weight_bytes(model_path: str, dtype: str) -> float:
    directory = local_directory(model_path)
    stored = sum(file.stat().st_size for file in safetensors_files(directory))
    stored_dtype = getattr(load_config(directory).get_text_config(), "dtype", None)
    if dtype == "auto" or not isinstance(stored_dtype, torch.dtype):
        return stored
    return float(stored) * getattr(torch, dtype).itemsize / stored_dtype.itemsize


def check_quantization(config: Any, model_path: str, device: torch.device | str) -> None:
    """Refuse what transformers would load as plain numbers, and an FP8 checkpoint that would fail in its first forward;
    on a CPU FP8 is dequantised as it is loaded."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    found = config.quantization_config
    values = found if isinstance(found, dict) else found.to_dict()
    method = values.get("quant_method")
    if values and method not in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"):
        raise ConfigError(
            f"target_model_path {model_path}: quantised as {method}, which transformers does not load; use"
            " --target-backend sglang or vllm"
        )
    if method != "fp8" or values.get("dequantize"):
        return
    if torch.device("cuda" if device == "auto" else device).type == "cpu":
        config.quantization_config = {**values, "dequantize": True}
        return
    from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

    # Below 8.9 transformers dequantises by itself.
    if torch.cuda.get_device_capability(None if device == "auto" else device) >= (8, 9) and not is_kernels_available():
        raise ConfigError(
            f"target_model_path {model_path}: an FP8 checkpoint, which transformers runs on a GPU only with the package"
            f" 'kernels', not installed here: pip install 'kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}', or"
            " use --target-backend sglang or vllm"
        )


def fits_one_gpu(model_path: str, dtype: str, device: torch.device) -> bool:
    """False, in one line, where the weights take more than their share of a GPU."""
    needed, room = _weight_bytes(model_path, dtype), torch.cuda.get_device_properties(device).total_memory
    if needed < WEIGHTS_SHARE * room:
        return True
    info(f"{model_path}: {format_bytes(needed)} of weights, a GPU has {format_bytes(room)}: spread over {num_gpus()}")
    return False


def check_spread(model: nn.Module, model_path: str) -> None:
    """Raise ConfigError where a part of a model that was spread over the visible GPUs is on none of them."""
    left = {parameter.device.type for parameter in model.parameters()} - {"cuda"}  # `meta` where it is offloaded
    if left:
        raise ConfigError(
            f"target_model_path {model_path}: does not fit into the {num_gpus()} visible GPUs (a part is on"
            f" {min(left)}); use more of them, --target-backend sglang or vllm, or a smaller dtype"
        )
