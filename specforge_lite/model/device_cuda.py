"""Which attention backends a GPU can run, and whether Triton can compile there."""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

from specforge_lite.core.errors import ConfigError
from specforge_lite.model.device import FLAG, warn_once

FLASH_MAX_HEAD_DIM = 256
FLEX_MIN_HEAD_DIM = 16


def choose_on_gpu(name: str, device_type: str, dtype: torch.dtype | None, head_dim: int | None) -> str:
    """The backend that `auto`, `sdpa` or `flex_attention` means on a GPU. Raises ConfigError if nothing fits."""
    flash = flash_problem(dtype, head_dim)
    flex = flex_problem(head_dim) if device_type == "cuda" else None if name == "flex_attention" else "no CUDA device"
    if name != "sdpa" and flex is None:
        return "flex_attention"
    if flash is None:
        if name != "sdpa" and device_type == "cuda":
            warn_once(f"{FLAG} flex_attention: {flex}; using sdpa, equal results")
        return "sdpa"
    remedy = "use flex_attention" if flex is None else f"and flex_attention needs more: {flex}; use --precision bf16"
    raise ConfigError(f"{FLAG} sdpa: {flash}; {remedy}, or eager for short samples")


def flash_problem(dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """Why FlashAttention cannot run such a draft on a GPU."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"its CUDA kernels take bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and (head_dim % 8 or head_dim > FLASH_MAX_HEAD_DIM):
        return f"its CUDA kernels take head widths that are multiples of 8 up to {FLASH_MAX_HEAD_DIM}, not {head_dim}"
    return None


def flex_problem(head_dim: int | None) -> str | None:
    """Why flex_attention cannot run such a draft on the GPU of this machine."""
    if head_dim is not None and head_dim < FLEX_MIN_HEAD_DIM:
        return f"its kernel takes head widths from {FLEX_MIN_HEAD_DIM}, not {head_dim}"
    return triton_problem()


@cache
def triton_problem() -> str | None:
    """Why Triton cannot compile here: it builds a small C extension at its first kernel."""
    compiler = os.environ.get("CC") or next((c for c in ("gcc", "clang", "cc") if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        return "no C compiler (gcc or clang; or CC) for Triton; apt-get install gcc"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"{header} is missing, which Triton compiles against; apt-get install python3-dev"
    return None
