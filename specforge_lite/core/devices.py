"""Which devices this process may use, and how many ranks to start on this host.

A run that was meant for a GPU never falls back to the CPU silently: a GPU that torch cannot use is an error.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_lite.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

# What the NVIDIA kernel driver creates. The second is visible in containers that were started without the GPUs.
DRIVER_DEVICE = Path("/dev/nvidiactl")
DRIVER_FACTS = Path("/proc/driver/nvidia")
CPU_RANKS = 2


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
    raise ConfigError(f"{_why_unusable()}; to use the CPU instead, set CUDA_VISIBLE_DEVICES=-1")


def _why_unusable() -> str:
    import torch

    built = torch.version.cuda
    if built is None:
        return f"there is an NVIDIA GPU, but torch {torch.__version__} is a build without CUDA; install the CUDA build"
    if not DRIVER_DEVICE.exists():
        return f"there is an NVIDIA driver ({DRIVER_FACTS}), but this container has no GPU; start it with --gpus all"
    try:
        found = re.search(r"\b(\d{3,}(?:\.\d+)+)\b", (DRIVER_FACTS / "version").read_text())
    except OSError:
        found = None
    driver = f"driver {found[1]}" if found else "the driver"
    return (
        f"there is an NVIDIA GPU, but torch {torch.__version__} (CUDA {built}) cannot use it: {driver} is too old for"
        f" CUDA {built}, or no visible device works (see nvidia-smi, CUDA_VISIBLE_DEVICES)"
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


def num_local_ranks(requested: int | None = None) -> int:
    """Trainer processes to start on this host: one per visible GPU, else at most `CPU_RANKS` of its cores.

    Raises ConfigError for a `requested` number above the visible GPUs: a GPU holds one rank.
    """
    count = num_gpus()
    if requested is None:
        return count or min(CPU_RANKS, len(os.sched_getaffinity(0)))
    if count and requested > count:
        raise ConfigError(f"{requested} processes: this host has {count} visible GPU(s); start one process per GPU")
    return requested
