"""Why torch cannot use a GPU that is there."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def why_unusable(driver_device: Path, driver_facts: Path) -> str:
    """driver_device, driver_facts: what the kernel driver creates."""
    built = torch.version.cuda
    if built is None:
        return f"there is an NVIDIA GPU, but torch {torch.__version__} is a build without CUDA; install the CUDA build"
    if not driver_device.exists():
        return f"there is an NVIDIA driver ({driver_facts}), but this container has no GPU; start it with --gpus all"
    try:
        found = re.search(r"\b(\d{3,}(?:\.\d+)+)\b", (driver_facts / "version").read_text())
    except OSError:
        found = None
    driver = f"driver {found[1]}" if found else "the driver"
    return (
        f"there is an NVIDIA GPU, but torch {torch.__version__} (CUDA {built}) cannot use it: {driver} is too old for"
        f" CUDA {built}, or no visible device works (see nvidia-smi, CUDA_VISIBLE_DEVICES)"
    )
