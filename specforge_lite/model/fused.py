"""torch.compile for small functions that lie between matrix products.

The matrix products themselves run at the same rate compiled or not. What is fused is the memory traffic around them:
norms, RoPE, SwiGLU, the loss. All sizes are dynamic, so a run compiles each function once, whatever its batches hold;
no row or a single one would be a graph of its own each (torch takes 0 and 1 for constants), and runs as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_COMPILED: dict[Callable[..., object], Callable[..., object]] = {}


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """The compiled form of a module-level function, made at its first call and kept; the function itself where its
    first argument, a tensor, has less than two rows."""
    if function not in _COMPILED:
        made = torch.compile(function, dynamic=True)

        def call(*arguments: P.args, **options: P.kwargs) -> R:
            rows = len(arguments[0])  # type: ignore[arg-type]
            return (made if rows > 1 else function)(*arguments, **options)

        _COMPILED[function] = call
    return _COMPILED[function]  # type: ignore[return-value]


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this machine."""
    if device.type == "cuda":
        from specforge_lite.model.device_cuda import triton_problem

        return triton_problem()
    compilers = ("g++", "clang++", os.environ.get("CXX", "g++"))
    return None if any(map(shutil.which, compilers)) else "no C++ compiler (g++ or clang++; or CXX) for Inductor"
