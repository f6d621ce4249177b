"""Packs random weights with vLLM's and compressed-tensors' own functions: run inside vLLM's environment.

python quantized_layouts.py DIRECTORY      writes NAME/{model,expected}.safetensors and NAME/config.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack, pack_cols, quantize_weights
from vllm.scalar_type import scalar_types

ROWS, COLUMNS, GROUP = 64, 96, 32


def write(name: str, config: dict, parts: dict, expected_RC: torch.Tensor) -> None:
    directory = Path(sys.argv[1]) / name
    directory.mkdir()
    contiguous = {f"lm_head.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(contiguous, directory / "model.safetensors")
    save_file({"weight": expected_RC.float().contiguous()}, directory / "expected.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))


def main() -> None:
    torch.manual_seed(0)
    weight_CR = torch.randn(COLUMNS, ROWS)
    expected, numbers, scales, zeros = quantize_weights(weight_CR, scalar_types.uint4, GROUP, zero_points=True)
    parts = {"qweight": awq_pack(numbers, 4, COLUMNS, ROWS), "scales": scales}
    parts["qzeros"] = awq_pack(zeros, 4, COLUMNS // GROUP, ROWS)
    write("awq", {"quant_method": "awq"}, parts, expected.T)
    parts = {"qweight": gptq_pack(numbers, 4, COLUMNS, ROWS), "scales": scales}
    parts["qzeros"] = pack_cols(zeros, 4, COLUMNS // GROUP, ROWS)
    parts["g_idx"] = (torch.arange(COLUMNS) // GROUP).int()
    write("gptq", {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, parts, expected.T)
    numbers = torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8)
    scale = torch.rand(ROWS, COLUMNS // GROUP)
    parts = {"weight_packed": pack_to_int32(numbers, 4), "weight_scale": scale}
    parts["weight_shape"] = torch.tensor([ROWS, COLUMNS])
    write("packed", {}, parts, numbers * scale.repeat_interleave(GROUP, 1))
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[torch.randint(0, 8, (ROWS, COLUMNS))]
    values = values * torch.where(torch.rand(ROWS, COLUMNS) < 0.5, -1.0, 1.0)
    scale = (torch.rand(ROWS, COLUMNS // 16) * 100 + 1).to(torch.float8_e4m3fn)
    parts = {"weight_packed": pack_fp4_to_uint8(values), "weight_scale": scale}
    parts["weight_global_scale"] = torch.tensor([40.0])
    write("nvfp4", {}, parts, values * (scale.float() / 40.0).repeat_interleave(16, 1))


main()
