"""AdamW with 8-bit moments (`--optim adamw_8bit`), from torchao: 2 bytes of state per parameter instead of 8.

Moments are kept in blocks of 256 values with one scale each (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization"); tensors below 4,096 values stay fp32. The update itself is computed in fp32. It cannot skip a step on
the device, so unlike plain AdamW every step waits for the verdict on its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError
from specforge_lite.training.settings import TORCHAO, OptimizerSection


class Adam8bit:
    """torchao's AdamW8bit with what `DraftOptimizer` needs of torch's fused AdamW."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerSection) -> None:
        if find_spec("torchao") is None:
            raise ConfigError(f"optim adamw_8bit: needs torchao, which is not installed: pip install {TORCHAO}")
        from torchao.optim import AdamW8bit

        betas = (config.adam_beta1, config.adam_beta2)
        self._adam = AdamW8bit(groups, lr=0.0, betas=betas, eps=config.adam_eps)
        self._parameters: list[Tensor] = [p for group in self._adam.param_groups for p in group["params"]]
        self._make_states()

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Parameter -> step, exp_avg, exp_avg_sq; the last two may be torchao's 8-bit tensors."""
        return self._adam.state  # type: ignore[no-any-return]

    @torch.no_grad()
    def update(self, rate: float, scale: Tensor, skipped: Tensor) -> None:
        """One update with gradient / scale, unless `skipped` (scalars on the device). Waits for the device."""
        if bool(skipped):
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_div_(gradients, scale)
        for group in self._adam.param_groups:
            group["lr"].fill_(rate)
        with _uncompiled(self._parameters[0].device):
            self._adam.step()

    def _make_states(self) -> None:
        """A step without gradient at rate 0, so that saving and loading never meet a missing state."""
        kept = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        with _uncompiled(self._parameters[0].device):
            self._adam.step()
        for parameter, gradient in zip(self._parameters, kept):
            parameter.grad = gradient
            self.state[parameter]["step"].zero_()


@contextmanager
def _uncompiled(device: torch.device) -> Iterator[None]:
    """torchao compiles the update of each shape: worth it on a GPU, and 15 seconds of a start on a CPU."""
    if device.type == "cuda":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def plain(tensor: Tensor) -> Tensor:
    """A moment as an ordinary fp32 tensor; the tensor itself where it is one."""
    if type(tensor).__module__.startswith("torchao."):
        return tensor.dequantize()
    return tensor
