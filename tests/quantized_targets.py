"""The shipped target with its linear layers quantised, rounded to the nearest, in the layouts that engines serve.

weights = quantize(TARGET, tmp_path / "int8", "int8")    # writes the directory, with config.json and tokenizer
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
Packed = tuple[dict[str, Tensor], Tensor]  # tensors of a layer by the ends of their names, and the weight they make
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(numbers: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Numbers of 4 bits -> int32, eight of `dim` in one, in this order from the low bits on."""
    eights = numbers.long().movedim(dim, -1).unflatten(-1, (-1, 8))[..., list(order)]
    whole = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int().movedim(-1, dim).contiguous()


def grouped(weight_RC: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers 0..15 [R, C], zeros and scales [R, G], and the weight [R, C] that they make."""
    groups_RGC = weight_RC.unflatten(1, (-1, GROUP))
    if symmetric:
        scales = (groups_RGC.abs().amax(-1) / 7).bfloat16().float()
        zeros = torch.full_like(scales, 8)
    else:
        low, high = groups_RGC.amin(-1).clamp(max=0), groups_RGC.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round()
    numbers = (groups_RGC / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return numbers.flatten(1), zeros, scales, ((numbers - zeros[..., None]) * scales[..., None]).flatten(1)


def int8(weight_RC: Tensor) -> Packed:
    scale = weight_RC.abs().amax(1, keepdim=True) / 127
    numbers = (weight_RC / scale).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}, numbers * scale


def fp8(weight_RC: Tensor) -> Packed:
    scale = weight_RC.abs().max() / 448
    numbers = (weight_RC / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, (numbers.float() * scale).bfloat16().float()


def packed_int4(weight_RC: Tensor) -> Packed:
    numbers, _, scales, weight = grouped(weight_RC, True)
    parts = {"weight_packed": packed(numbers, 1), "weight_scale": scales.bfloat16()}
    return parts | {"weight_shape": torch.tensor(weight_RC.shape)}, weight


def awq(weight_RC: Tensor) -> Packed:
    numbers, zeros, scales, weight = grouped(weight_RC, False)
    parts = {"qweight": packed(numbers.T, 1, AWQ_ORDER), "qzeros": packed(zeros.T, 1, AWQ_ORDER)}
    return parts | {"scales": scales.T.half().contiguous()}, weight


def gptq(weight_RC: Tensor) -> Packed:
    numbers, zeros, scales, weight = grouped(weight_RC, True)
    parts = {"qweight": packed(numbers.T, 0), "qzeros": packed(zeros.T - 1, 1), "scales": scales.T.half().contiguous()}
    return parts | {"g_idx": (torch.arange(weight_RC.shape[1]) // GROUP).int()}, weight


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    group |= {} if inputs is None else {"input_activations": {"symmetric": True, "dynamic": True, **inputs}}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


_INT8, _FP8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
SCHEMES: dict[str, tuple[Callable[[Tensor], Packed], dict[str, Any]]] = {
    "int8": (int8, _compressed("int-quantized", _INT8 | {"strategy": "channel"}, _INT8 | {"strategy": "token"})),
    "packed-int4": (
        packed_int4,
        _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, None),
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
         "modules_to_not_convert": ["lm_head"]},
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
         "checkpoint_format": "gptq"},
    ),
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}),
    "fp8-compressed": (
        fp8,
        _compressed("float-quantized", _FP8 | {"strategy": "tensor"}, _FP8 | {"strategy": "token"}),
    ),
}  # fmt: skip


def quantize(target: Path, directory: Path, scheme: str) -> dict[str, Tensor]:
    """A copy of `target` whose layers are quantised; embedding, norms and head stay as they are. Returns all weights,
    as an engine should multiply with them."""
    pack, config = SCHEMES[scheme]
    shutil.copytree(target, directory)
    stored, weights = {}, load_file(target / "model.safetensors")
    for name, tensor in weights.items():
        parts: dict[str, Tensor] = {"weight": tensor}
        if "_proj." in name:
            parts, weights[name] = pack(tensor.float())
        stored |= {name.removesuffix("weight") + part: values for part, values in parts.items()}
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    written = json.loads((target / "config.json").read_text()) | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(written))
    return weights
