"""Layouts of quantised weights, each packed here number by number as its writer documents it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.core.hub import load_config
from specforge_lite.core.weight_files import read_weight, weight_files
from specforge_lite.model.target_head import load_target_head

ROWS, COLUMNS, GROUP = 16, 32, 8  # of the weight: output and input features
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def to_int32(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def pack(numbers: list[int], bits: int) -> int:
    return to_int32(sum(number << (bits * i) for i, number in enumerate(numbers)))


def random_parts(bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned numbers [R, C], zeros [R, G], scales [R, G]."""
    torch.manual_seed(seed)
    groups = COLUMNS // GROUP
    numbers = torch.randint(0, 1 << bits, (ROWS, COLUMNS))
    return numbers, torch.randint(0, 1 << bits, (ROWS, groups)), torch.rand(ROWS, groups) + 0.1


def awq() -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    numbers, zeros, scales = random_parts(4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed = lambda t: torch.tensor(  # noqa: E731  [R, n] -> [n, R/8]
        [[pack([int(t[8 * i + o, n]) for o in order], 4) for i in range(ROWS // 8)] for n in range(t.shape[1])],
        dtype=torch.int32,
    )
    parts = {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scales.half().T.contiguous()}
    group = torch.arange(COLUMNS) // GROUP
    return parts, (numbers - zeros[:, group]) * scales.half().float()[:, group], {"quant_method": "awq"}


def gptq(bits: int, v2: bool, act_order: bool) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    numbers, zeros, scales = random_parts(bits)
    count = 32 // bits
    group = torch.arange(COLUMNS) // GROUP
    if act_order:
        group = group[torch.randperm(COLUMNS)]
    qweight = [
        [pack([int(numbers[r, count * i + j]) for j in range(count)], bits) for r in range(ROWS)]
        for i in range(COLUMNS // count)
    ]
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    qzeros = [
        [pack([int(stored[count * i + j, g]) for j in range(count)], bits) for i in range(ROWS // count)]
        for g in range(COLUMNS // GROUP)
    ]
    parts = {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": scales.half().T.contiguous(),
        "g_idx": group.int(),
    }
    config = {"quant_method": "gptq", "bits": bits} | ({"checkpoint_format": "gptq_v2"} if v2 else {})
    return parts, (numbers - zeros[:, group]) * scales.half().float()[:, group], config


def packed_integers(bits: int, symmetric: bool) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    numbers, zeros, scales = random_parts(bits)
    count, half = 32 // bits, 1 << (bits - 1)
    rows = [
        [pack([int(n) for n in row[count * i : count * (i + 1)]], bits) for i in range(COLUMNS // count)]
        for row in numbers
    ]
    parts = {
        "weight_packed": torch.tensor(rows, dtype=torch.int32),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if not symmetric:
        down = [
            [pack([int(zeros[count * i + j, g]) for j in range(count)], bits) for g in range(zeros.shape[1])]
            for i in range(ROWS // count)
        ]
        parts["weight_zero_point"] = torch.tensor(down, dtype=torch.int32)
    group = torch.arange(COLUMNS) // GROUP
    zero = half if symmetric else zeros[:, group]
    return parts, (numbers - zero) * scales.bfloat16().float()[:, group], {"quant_method": "compressed-tensors"}


def channel_int8() -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    numbers, scale = torch.randint(-128, 128, (ROWS, COLUMNS)).to(torch.int8), torch.rand(ROWS, 1).bfloat16()
    parts = {"weight": numbers, "weight_scale": scale}
    return parts, numbers.float() * scale.float(), {"quant_method": "compressed-tensors"}


def nvfp4(modelopt: bool) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (ROWS, COLUMNS))
    scale = (torch.rand(ROWS, COLUMNS // 16) * 200 + 1).to(torch.float8_e4m3fn)
    values = torch.tensor([(-1 if code & 8 else 1) * FP4[code & 7] for code in codes.flatten().tolist()])
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    whole = torch.tensor(0.03)
    factor = whole if modelopt else 1 / whole
    parts = {"weight_scale": scale, "weight": packed, "weight_scale_2": whole}
    if not modelopt:
        parts = {"weight_scale": scale, "weight_packed": packed, "weight_global_scale": factor.reshape(1)}
    expected = values.view(ROWS, COLUMNS) * (scale.float() * whole).repeat_interleave(16, 1)
    return parts, expected, {"quant_method": "modelopt" if modelopt else "compressed-tensors"}


CASES = {
    "awq": awq(),
    **{
        f"gptq-{bits}{'-v2' * v2}{'-act_order' * act}": gptq(bits, v2, act)
        for bits in (2, 4, 8) for v2 in (False, True) for act in (False, True)
    },
    **{f"packed-{bits}{'-symmetric' * symmetric}": packed_integers(bits, symmetric)
       for bits in (4, 8) for symmetric in (False, True)},
    "int8": channel_int8(),
    "nvfp4": nvfp4(False),
    "nvfp4-modelopt": nvfp4(True),
}  # fmt: skip


def save(directory: Path, parts: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file({f"lm_head.{name}": tensor for name, tensor in parts.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_what_its_writer_meant(tmp_path: Path, case: str) -> None:
    parts, expected, config = CASES[case]
    save(tmp_path, parts, config)
    weight = read_weight(weight_files(tmp_path), "lm_head.weight")
    assert weight is not None
    assert weight.shape == (ROWS, COLUMNS)
    torch.testing.assert_close(weight, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["awq", "gptq-4", "packed-4-symmetric", "nvfp4"])
def test_the_head_of_a_target_is_read_from_packed_weights(tiny_target: Path, tmp_path: Path, case: str) -> None:
    """The tiny target with rows of its head replaced by the packed numbers, tiled: logits are the dequantised ones."""
    target = Path(shutil.copytree(tiny_target, tmp_path / "target"))
    stored = load_file(target / "model.safetensors")
    hidden = stored["model.norm.weight"].shape[0]
    parts, expected, quantization = CASES[case]
    name = next(name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in stored)
    config = json.loads((target / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "quantization_config": quantization}
    stored.setdefault("model.embed_tokens.weight", stored[name])
    stored.pop("lm_head.weight", None)
    assert hidden % COLUMNS == 0
    columns = hidden // COLUMNS  # copies side by side, along the input
    along_input = {"qweight": 0, "qzeros": 0, "scales": 0, "g_idx": 0, "weight_packed": 1, "weight_scale": 1}
    tiled = {
        part: torch.cat([tensor] * columns, along_input[part]) if part in along_input else tensor
        for part, tensor in parts.items()
    }
    if "g_idx" in parts:
        groups = COLUMNS // GROUP
        tiled["g_idx"] = torch.cat([parts["g_idx"] + i * groups for i in range(columns)])
    if "weight_shape" in parts:
        tiled["weight_shape"] = torch.tensor([ROWS, hidden])
    save_file(
        {**stored, **{f"lm_head.{part}": t.contiguous() for part, t in tiled.items()}}, target / "model.safetensors"
    )
    (target / "config.json").write_text(json.dumps(config))
    head = load_target_head(target, load_config(str(target), False))
    torch.testing.assert_close(head.lm_head_VH.float(), torch.cat([expected.float()] * columns, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("parts", "config", "message"),
    [
        ({"weight": torch.zeros(4, 4, dtype=torch.uint8)}, {"quant_method": "bitsandbytes"},
         "quantised as bitsandbytes"),
        ({"qweight": torch.zeros(3, 16, dtype=torch.int32), "scales": torch.ones(4, 16), "g_idx": torch.zeros(32)},
         {"quant_method": "gptq"}, "GPTQ with 3 bits"),
        ({"qweight": torch.zeros(32, 2, dtype=torch.int32), "scales": torch.ones(4, 16)},
         {"quant_method": "awq", "version": "gemv"}, "AWQ of version gemv"),
        ({"weight_packed": torch.zeros(4, 5, dtype=torch.int32), "weight_scale": torch.ones(4, 1),
          "weight_shape": torch.tensor([4, 32])}, {}, r"weight_packed \(4, 5\) for 4 x 32"),
        ({"weight": torch.zeros(4, 6, dtype=torch.int8), "weight_scale": torch.ones(4, 4)}, {}, "do not fit together"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path, parts: dict[str, Tensor], config: dict[str, Any], message: str
) -> None:
    from specforge_lite.model.target_head import read_tensor

    save(tmp_path, parts, config)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_tensor(tmp_path, "lm_head.weight", "output head")
