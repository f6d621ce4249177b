"""What a machine can compute a training pass with: dtypes and attention backends, decided before anything is loaded."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.core.log import warn

ATTENTION_BACKENDS = ("eager", "sdpa", "flex_attention")
FLASH_MAX_HEAD_DIM = 256
FLEX_MIN_HEAD_DIM = 16
FLAG = "draft_attention_backend"


def usable_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """`dtype`, or fp32 for bf16 and fp16 where the CPU has no products for it and takes 30 times as long as in fp32."""
    if device_type != "cpu" or dtype != torch.bfloat16 or platform.machine() not in ("x86_64", "AMD64"):
        return dtype
    return dtype if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else torch.float32


def attention_dtype(compute_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """bf16 and fp16 on a CPU attend in fp32: the CPU's 16-bit flash backward is slower than that, and less precise."""
    half = compute_dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and device_type == "cpu" else compute_dtype


def choose_attention(name: str, device_type: str, dtype: torch.dtype | None = None, head_dim: int | None = None) -> str:
    """The backend that `--draft-attention-backend` means on this machine; one line on stderr where it is another one.

    dtype, head_dim: of the draft, where known. Raises ConfigError if nothing fits.
    """
    if name != "auto" and name not in ATTENTION_BACKENDS:
        raise ConfigError(f"{FLAG}: unknown value '{name}'{suggest(name, ATTENTION_BACKENDS)}")
    if name == "eager":
        return name
    if device_type == "cpu":
        if name == "flex_attention":
            _warn_once(f"{FLAG} flex_attention: torch has no backward for it on a CPU; using sdpa, equal results")
        return "sdpa"
    flash = flash_problem(dtype, head_dim)
    flex = flex_problem(head_dim) if device_type == "cuda" else None if name == "flex_attention" else "no CUDA device"
    if name != "sdpa" and flex is None:
        return "flex_attention"
    if flash is None:
        if name != "sdpa" and device_type == "cuda":
            _warn_once(f"{FLAG} flex_attention: {flex}; using sdpa, equal results")
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


@cache
def _warn_once(message: str) -> None:
    warn(message)
