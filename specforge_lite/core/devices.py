"""Which devices this process may use, and how many ranks to start on this host.

A run that was meant for a GPU never falls back to the CPU silently: a GPU that torch cannot use is an error.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_lite.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

# What the NVIDIA kernel driver creates. The second is visible in containers that were started without the GPUs.
DRIVER_DEVICE = Path("/dev/nvidiactl")
DRIVER_FACTS = Path("/proc/driver/nvidia")


def num_gpus() -> int:
    """Visible GPUs that torch can use; 0 where a run is to use the CPU.

    Raises ConfigError where an NVIDIA GPU is there but torch cannot use it (driver too old, CPU build of torch, or a
    container without access), unless the GPUs are hidden with CUDA_VISIBLE_DEVICES.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (hidden is not None and hidden.strip() in ("", "-1")) or not (DRIVER_DEVICE.exists() or DRIVER_FACTS.exists()):
        return 0
    from specforge_lite.core.gpu_problem import why_unusable

    raise ConfigError(
        f"{why_unusable(DRIVER_DEVICE, DRIVER_FACTS)}; to use the CPU instead, set CUDA_VISIBLE_DEVICES=-1"
    )


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name` (`cpu`, `cuda`, `cuda:1`); by default this rank's GPU if there is one, else the CPU.

    Raises ConfigError for a device that is not there or that torch cannot use.
    """
    import torch

    if name is None:
        count = num_gpus()
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device '{name}': expected cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = num_gpus()
        if (device.index or 0) >= count:
            there = f"{count} visible GPU(s) on this host" if count else "torch sees no GPU on this host"
            raise ConfigError(f"device {device}: {there}; expected {'cuda:0' if count else 'cpu'}")
    return device


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one of this thread. Every new thread starts with GPU 0 as its own, and kernels that do not
    look at their tensors (Triton's) would run there."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def without_cudnn(device: torch.device) -> AbstractContextManager[Any]:
    """Keep scaled_dot_product_attention away from cuDNN, which torch prefers in 16 bits on Hopper and Blackwell: it
    builds a plan for every new length (up to 0.4 s each), and a target meets a new one in nearly every pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels) if device.type == "cuda" else nullcontext()
