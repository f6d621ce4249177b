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
    """The compiled form of a module-level function (made at its first call and kept), or the function itself; this also
    where its first argument, a tensor, has less than two rows."""
    if not compiled:
        return function
    if function not in _COMPILED:
        made = torch.compile(function, dynamic=True)

        def call(*arguments: P.args, **options: P.kwargs) -> R:
            rows = len(arguments[0])  # type: ignore[arg-type]
            return (made if rows > 1 else function)(*arguments, **options)

        _COMPILED[function] = call
    return _COMPILED[function]  # type: ignore[return-value]
