"""Targets that need more than one device, or that are quantised, in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specforge_lite.core.devices import num_gpus
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config, local_directory, model_class
from specforge_lite.core.log import format_bytes, info
from specforge_lite.core.weight_files import logical_names, read_weight, safetensors_files, weight_files
from specforge_lite.model.target_head import read_tensor

# Of a GPU's memory; the rest is for activations, caches and the draft.
WEIGHTS_SHARE = 0.85
# quant_method of checkpoints that are dequantised here on a CPU, where transformers needs another package for each or
# reads some of their layouts only, and the endings of what lies beside a weight in them (core/quantized.py).
DEQUANTISED = ("awq", "compressed-tensors", "fp8", "gptq", "modelopt")
QUANTISED_PARTS = ("qzeros", "scales", "g_idx", "_scale", "_scale_2", "_scale_inv", "_shape", "_zero_point")


def _weight_bytes(model_path: str, dtype: str) -> float:
    directory = local_directory(model_path)
    stored = sum(file.stat().st_size for file in safetensors_files(directory))
    stored_dtype = getattr(load_config(directory).get_text_config(), "dtype", None)
    if dtype == "auto" or not isinstance(stored_dtype, torch.dtype):
        return stored
    return float(stored) * getattr(torch, dtype).itemsize / stored_dtype.itemsize


def quantized_loader(
    config: Any, model_path: str, device: torch.device | str, trust_remote_code: bool, in_parts: bool = False
) -> Callable[..., Any] | None:
    """On a CPU a loader that dequantises, called as `from_pretrained` is, for what it reads; elsewhere None: refused is
    what transformers would load as plain numbers, and an FP8 checkpoint that would fail in its first forward.

    in_parts: for tensor parallelism. config: loses its `quantization_config` where the loader dequantises.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    found = config.quantization_config
    values = found if isinstance(found, dict) else found.to_dict()
    method = values.get("quant_method")
    if torch.device("cuda" if device == "auto" else device).type == "cpu" and method in DEQUANTISED:
        if in_parts:
            raise ConfigError(f"tp_size: {model_path} is dequantised on a CPU, which one process does alone")
        info(f"{model_path}: {method} weights, dequantised; activations are not rounded, as servers may do")
        del config.quantization_config
        with torch.device("meta"):
            kind = type(model_class(config).from_config(config, trust_remote_code=trust_remote_code))
        return partial(_load_dequantized, kind)
    if values and method not in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"):
        raise ConfigError(
            f"target_model_path {model_path}: quantised as {method}, which transformers does not load; use"
            " --target-backend sglang or vllm"
        )
    if method != "fp8" or values.get("dequantize"):
        return None
    from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

    # Below 8.9 transformers dequantises by itself.
    if torch.cuda.get_device_capability(None if device == "auto" else device) >= (8, 9) and not is_kernels_available():
        raise ConfigError(
            f"target_model_path {model_path}: an FP8 checkpoint, which transformers runs on a GPU only with the package"
            f" 'kernels', not installed here: pip install 'kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}', or"
            " use --target-backend sglang or vllm"
        )
    return None


def _load_dequantized(kind: Any, model_path: str, **options: Any) -> Any:
    """`kind.from_pretrained` with weights that are read here (its auto class insists on files)."""
    directory = local_directory(model_path)
    found = kind.from_pretrained(None, state_dict=dequantized_weights(directory), **options)
    model = found[0] if isinstance(found, tuple) else found
    if (directory / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(directory)
    return found


def dequantized_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint by their names in the model, quantised ones as the numbers an engine multiplies with.

    Raises CheckpointError naming a weight that is stored in a form which is not read.
    """
    files = weight_files(directory)
    found: dict[str, Tensor] = {}
    for name in logical_names(files):
        if not name.endswith(QUANTISED_PARTS):
            weight = read_weight(files, name)
            found[name] = read_tensor(directory, name, "weight") if weight is None else weight
    return found


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
