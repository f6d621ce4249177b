"""A weight that a checkpoint stores as integers or 4-bit floats, back as the numbers that an engine multiplies with.

Layouts (R output, C input features, G groups along the input):

    AWQ, gemm        qweight int32 [C, R/8], qzeros [G, R/8], scales [G, R]; 4 bits, outputs in the order of AWQ_ORDER
    GPTQ             qweight int32 [C*b/32, R], qzeros [G, R*b/32], scales [G, R], g_idx [C]; v1 stores zeros minus one
    pack-quantized   weight_packed int32 [R, C*b/32], weight_shape, weight_scale [R, G], weight_zero_point, weight_g_idx
    int-quantized    weight int8 [R, C], weight_scale
    NVFP4            weight_packed uint8 [R, C/2], weight_scale fp8 [R, C/16] / weight_global_scale: compressed-tensors
                     weight uint8 [R, C/2], weight_scale fp8 [R, C/16] * weight_scale_2: modelopt

Sources: AutoAWQ `awq/utils/packing_utils.py`, GPTQModel `nn_modules/qlinear/torch.py`, compressed-tensors 0.17
`compressors/`, vLLM `quantization/modelopt.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.errors import CheckpointError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an int32 holds the output of this number
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def read_quantized(
    files: dict[str, Path], name: str, tensor: Tensor | None, read: Callable[[str], Tensor | None]
) -> Tensor | None:
    """See `weight_files.read_weight`. tensor: what the files have under `name` itself."""
    if tensor is None or not tensor.is_floating_point():
        return dequantized(name.removesuffix("weight"), read, quantization_of(files))
    # DeepSeek and transformers write *_scale_inv (which multiplies all the same), compressed-tensors *_scale.
    scale = next((s for ending in ("_scale_inv", "_scale") if (s := read(name + ending)) is not None), None)
    return None if scale is None else dequantize(tensor, scale)


def dequantized(stem: str, read: Callable[[str], Tensor | None], config: dict[str, Any]) -> Tensor | None:
    """The weight [R, C] of the layer `stem` (ends with a dot) in fp32; None where no layout of the list is there.

    read: one tensor of the checkpoint by its name, None where it is not there; config: the model's
    `quantization_config`. Raises CheckpointError for tensors that contradict each other, and for a layout that is known
    and not read.
    """
    part = lambda name: read(stem + name)  # noqa: E731
    qweight, packed, weight = part("qweight"), part("weight_packed"), part("weight")
    try:
        if qweight is not None:
            scales = part("scales")
            if scales is None:
                return None
            is_gptq = qweight.shape[1] == scales.shape[1]
            return (_gptq if is_gptq else _awq)(qweight, scales.float(), part, config)
        if packed is not None and packed.dtype == torch.uint8:
            return _fp4(packed, part("weight_scale"), part("weight_global_scale"), None)
        if packed is not None:
            return _pack_quantized(packed, part)
        if weight is not None and weight.dtype == torch.uint8 and (second := part("weight_scale_2")) is not None:
            return _fp4(weight, part("weight_scale"), None, second)
        if weight is not None and weight.dtype == torch.int8 and (scale := part("weight_scale")) is not None:
            return _times_groups(weight.float(), scale.float().reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1))
    except (RuntimeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{stem}weight: its quantised parts do not fit together: {error}") from None
    return None


def _unpacked(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned numbers of `bits` bits along `dim`, the lowest bits first."""
    count = 32 // bits
    shifts = torch.arange(count, dtype=torch.int32) * bits
    last = packed.movedim(dim, -1)
    numbers = (last[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(-2).movedim(-1, dim)


def _awq(qweight: Tensor, scales_GR: Tensor, part: Callable[[str], Tensor | None], config: dict[str, Any]) -> Tensor:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or qweight.shape[1] * 8 != scales_GR.shape[1]:
        raise CheckpointError(
            f"AWQ of version {version} with {tuple(qweight.shape)}: expected version gemm with 4 bits"
        )
    order = torch.tensor(AWQ_ORDER).argsort()
    in_order = lambda t: _unpacked(t, 4, 1).unflatten(1, (-1, 8))[..., order].flatten(1)  # noqa: E731
    qzeros = part("qzeros")
    zeros_GR = in_order(qzeros) if qzeros is not None else torch.full_like(scales_GR, 8)
    group = torch.arange(len(qweight)) // (len(qweight) // len(scales_GR))
    return ((in_order(qweight) - zeros_GR[group]) * scales_GR[group]).T.contiguous()


def _gptq(qweight: Tensor, scales_GR: Tensor, part: Callable[[str], Tensor | None], config: dict[str, Any]) -> Tensor:
    g_idx, qzeros = part("g_idx"), part("qzeros")
    if g_idx is None:
        bits, size = int(config.get("bits", 4)), int(config.get("group_size", 128))
        columns = len(qweight) * 32 // bits
        g_idx = torch.arange(columns) // (columns if size < 0 else size)
    bits = len(qweight) * 32 // len(g_idx)
    if bits not in (2, 4, 8):
        raise CheckpointError(f"GPTQ with {bits} bits: expected 2, 4 or 8")
    zeros_GR = torch.full_like(scales_GR, 1 << (bits - 1))
    if qzeros is not None:
        # v1 stores zeros minus one, which wraps around in `bits` bits.
        more = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        zeros_GR = ((_unpacked(qzeros, bits, 1) + more) & ((1 << bits) - 1)).float()
    group = g_idx.long()
    return ((_unpacked(qweight, bits, 0) - zeros_GR[group]) * scales_GR[group]).T.contiguous()


def _pack_quantized(packed: Tensor, part: Callable[[str], Tensor | None]) -> Tensor | None:
    shape, scale, zero, g_idx = (part(f"weight_{name}") for name in ("shape", "scale", "zero_point", "g_idx"))
    if shape is None or scale is None:
        return None
    rows, columns = (int(size) for size in shape)
    bits = next((b for b in (8, 4, 2) if -(-columns // (32 // b)) == packed.shape[1]), 0)
    if not bits:
        raise CheckpointError(f"weight_packed {tuple(packed.shape)} for {rows} x {columns}: expected 2, 4 or 8 bits")
    numbers = _unpacked(packed, bits, 1)[:, :columns] - (1 << (bits - 1))
    scale = scale.float().reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1)
    zeros = None
    if zero is not None:
        zeros = zero.float()
        if zero.dtype == torch.int32:
            zeros = (_unpacked(zero, bits, 0)[:rows] - (1 << (bits - 1))).float()
    group = None if g_idx is None or int(g_idx.min()) < 0 else g_idx.long()
    return _times_groups(numbers.float(), scale, zeros, group)


def _times_groups(
    numbers_RC: Tensor, scale: Tensor, zeros: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """(numbers - zeros) * scale; scale and zeros: [R or 1, G]. group: [C], the group of each column."""
    columns = numbers_RC.shape[1]
    if group is None:
        if columns % scale.shape[1]:
            raise RuntimeError(f"{scale.shape[1]} scales for {columns} columns")
        group = torch.arange(columns) // (columns // scale.shape[1])
    if zeros is not None:
        numbers_RC = numbers_RC - zeros[:, group]
    return numbers_RC * scale[:, group]


def _fp4(packed: Tensor, scale: Tensor | None, divisor: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """Two E2M1 numbers a byte, the even column in the low half."""
    if scale is None or (divisor is None and factor is None):
        return None
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    whole = scale.float() / divisor.float() if divisor is not None else scale.float() * factor.float()  # type: ignore[union-attr]
    return _times_groups(table[halves.long()], whole)


def quantization_of(files: dict[str, Path]) -> dict[str, Any]:
    """`quantization_config` of the config.json beside the files; empty where there is none."""
    place = next(iter(files.values())).parent / "config.json"
    try:
        found = json.loads(place.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def dequantize(weight: Tensor, scale: Tensor) -> Tensor | None:
    """fp8 weight [R, C] times its scale (one number, [R], [R, 1], or one per block [a, b]) in bf16; None where the
    shapes do not go together. Blocks are as wide as a power of two."""
    value = weight.float()
    if scale.numel() == 1:
        return (value * scale.float().reshape(())).bfloat16()
    if scale.dim() == 1:
        scale = scale[:, None]
    if weight.dim() != 2 or scale.dim() != 2 or any(s > w for s, w in zip(scale.shape, weight.shape)):
        return None
    expanded = scale.float()
    for dim, size in enumerate(weight.shape):
        if scale.shape[dim] == 1:
            continue
        width = 1 << (-(-size // scale.shape[dim]) - 1).bit_length()
        if -(-size // width) != scale.shape[dim]:
            return None
        expanded = expanded.repeat_interleave(width, dim).narrow(dim, 0, size)
    return (value * expanded).bfloat16()
