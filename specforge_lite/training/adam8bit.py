"""`--optim adamw_8bit`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from specforge_lite.model.device_cuda import triton_problem
from specforge_lite.training.settings import OptimizerSection


class Adam8bit:
    """AdamW from torchao: 2 bytes of state per parameter instead of 8.

    Moments are kept in blocks of 256 values with one scale each (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
    Quantization"); tensors below 4,096 values stay fp32. The update itself is computed in fp32. It cannot skip a step
    on the device, so unlike plain AdamW every step waits for the verdict on its gradient.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerSection) -> None:
        from torchao.optim import AdamW8bit

        betas = (config.adam_beta1, config.adam_beta2)
        self._adam = AdamW8bit(groups, lr=0.0, betas=betas, eps=config.adam_eps)
        self.state: dict[Tensor, dict[str, Tensor]] = self._adam.state
        self._parameters: list[Tensor] = [p for group in self._adam.param_groups for p in group["params"]]
        # A step without gradient at rate 0, so that saving and loading never meet a missing state.
        kept = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        with self._uncompiled():
            self._adam.step()
        for parameter, gradient in zip(self._parameters, kept):
            parameter.grad = gradient
            self.state[parameter]["step"].zero_()

    @torch.no_grad()
    def update(self, rate: float, scale: Tensor, skipped: Tensor) -> None:
        """One update with gradient / scale, unless `skipped` (scalars on the device). Waits for the device."""
        if bool(skipped):
            return
        torch._foreach_div_([p.grad for p in self._parameters if p.grad is not None], scale)
        for group in self._adam.param_groups:
            group["lr"].fill_(rate)
        with self._uncompiled():
            self._adam.step()

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """torchao compiles the update of each shape: worth it on a GPU, and 15 seconds of a start on a CPU."""
        on_gpu = self._parameters[0].device.type == "cuda"
        return nullcontext() if on_gpu and triton_problem() is None else torch.compiler.set_stance("force_eager")
