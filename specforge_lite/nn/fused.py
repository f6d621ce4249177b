"""torch.compile for small functions that lie between matrix products.

The matrix products themselves run at the same rate compiled or not. What is fused is the memory traffic around them:
norms, RoPE, SwiGLU, the loss. All sizes are dynamic, so a run compiles each function once, whatever its batches hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_COMPILED: dict[Callable[..., object], Callable[..., object]] = {}


def fused(function: Callable[P, R], compiled: bool = True) -> Callable[P, R]:
    """The compiled form of a module-level function (made at its first call and kept), or the function itself."""
    if not compiled:
        return function
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function, dynamic=True)
    return _COMPILED[function]  # type: ignore[return-value]
