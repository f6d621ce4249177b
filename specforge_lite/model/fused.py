"""torch.compile for small functions that lie between matrix products.

The matrix products themselves run at the same rate compiled or not. What is fused is the memory traffic around them:
norms, RoPE, SwiGLU, the loss. All sizes are dynamic, so a run compiles each function once, whatever its batches hold;
no row or a single one would be a graph of its own each (torch takes 0 and 1 for constants), and runs as it is.
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
        _COMPILED[function] = _unless_tiny(function, torch.compile(function, dynamic=True))
    return _COMPILED[function]  # type: ignore[return-value]


def _unless_tiny(plain: Callable[P, R], compiled: Callable[P, R]) -> Callable[P, R]:
    """`compiled` where the first argument, a tensor, has at least two rows."""

    def call(*arguments: P.args, **options: P.kwargs) -> R:
        rows = len(arguments[0])  # type: ignore[arg-type]
        return (compiled if rows > 1 else plain)(*arguments, **options)

    return call
