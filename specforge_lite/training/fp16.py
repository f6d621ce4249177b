"""`--precision fp16`: the loss scale, for GPUs without bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_lite.training.settings import OptimizerSection

SCALER_COUNTERS = ("loss_scale", "loss_scale_steps", "loss_scale_hysteresis")


class LossScaler:
    """Loss scale of fp16 training: small gradients times a large number do not vanish; the optimizer divides it out.

        gradients finite   the update happens; after `loss_scale_window` such steps the scale doubles
        an infinity        the update is skipped; the second time (`--hysteresis 2`) and from then on the scale halves

    These are DeepSpeed's rules, and its names. Everything is kept on the device, so that no step waits for it. Static
    where `--loss-scale` gives a number: infinities are then only skipped.
    """

    def __init__(self, config: OptimizerSection, device: torch.device | str) -> None:
        self._config = config
        start = (config.loss_scale or 2.0**config.initial_scale_power, 0, config.loss_scale_hysteresis)
        self.scale, self._steps, self._left = (torch.tensor(float(value), device=device) for value in start)

    def can_fall(self) -> Tensor:
        """bool scalar: an overflow is part of the search for the scale, not a failure."""
        if self._config.loss_scale:
            return torch.zeros_like(self.scale, dtype=torch.bool)
        return self.scale > self._config.min_loss_scale

    def update(self, overflow: Tensor) -> None:
        """Count the result of one step. overflow: bool scalar."""
        if self._config.loss_scale:
            return
        full = float(self._config.loss_scale_hysteresis)
        falls = overflow & (self._left <= 1)
        grown = ~overflow & (self._steps + 1 >= self._config.loss_scale_window)
        lower = (self.scale / 2).clamp(min=self._config.min_loss_scale)
        self.scale = torch.where(falls, lower, torch.where(grown, self.scale * 2, self.scale))
        self._left = torch.where(grown, full, torch.where(overflow & ~falls, self._left - 1, self._left))
        self._steps = torch.where(overflow | grown, 0.0, self._steps + 1)

    def state(self) -> dict[str, float]:
        """For a checkpoint (waits for the device)."""
        return dict(zip(SCALER_COUNTERS, (float(x) for x in (self.scale, self._steps, self._left))))

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's counters; one of a run without a scale changes nothing."""
        if all(name in state for name in SCALER_COUNTERS):
            for tensor, name in zip((self.scale, self._steps, self._left), SCALER_COUNTERS):
                tensor.fill_(state[name])
