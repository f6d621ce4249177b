"""What a machine can compute a training pass with: dtypes and attention backends, decided before anything is loaded."""

from __future__ import annotations

import platform
from functools import cache

import torch

from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.core.log import warn

ATTENTION_BACKENDS = ("eager", "sdpa", "flex_attention")
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
            warn_once(f"{FLAG} flex_attention: torch has no backward for it on a CPU; using sdpa, equal results")
        return "sdpa"
    from specforge_lite.model.device_cuda import choose_on_gpu

    return choose_on_gpu(name, device_type, dtype, head_dim)


@cache
def warn_once(message: str) -> None:
    """A warning that is shown once however often it is given."""
    warn(message)
