"""Plans made on the host, carried to a device in one transfer that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of each tensor inside the one buffer that carries a plan


PlanT = TypeVar("PlanT")


def on_device(plan: PlanT, device: torch.device | str) -> PlanT:
    """Nested dataclasses of host tensors with all tensors on a device."""
    if torch.device(device).type == "cpu":
        return plan
    tensors: list[Tensor] = []
    _visit(plan, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    moved = iter(upload(tensors, device))
    return _visit(plan, lambda _tensor: next(moved))  # type: ignore[no-any-return]


def _visit(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dataclasses with every tensor changed, in the order of their fields."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_visit(item, change) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _visit(getattr(value, f.name), change) for f in fields(value)})
    return value


def upload(tensors: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """Copies of host tensors on a device, carried over by one buffer (page-locked for CUDA, so nothing waits)."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for part, tensor in zip(buffer.split(sizes), tensors):
        part[: tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    parts = buffer.to(device, non_blocking=True).split(sizes)
    return [part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in zip(parts, tensors)]
