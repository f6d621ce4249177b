"""AdamW on fp32 master weights with a schedule, a global divisor, clipping, and a device-side guard against NaN.

The gradients that arrive are SUMS over counted positions of all ranks and micro batches. The fused kernel divides them
on the fly (`grad_scale`) and does nothing at all when told so (`found_inf`), the hooks that torch made for GradScaler:
so dividing, clipping and skipping a bad step need neither a pass over memory nor a value on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.errors import CheckpointError
from specforge_lite.training.adam8bit import Adam8bit, plain
from specforge_lite.training.loss_scale import LossScaler
from specforge_lite.training.settings import OptimizerSection, warmup_length


def learning_rate_at(config: OptimizerSection, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then cosine, linear or constant."""
    total_steps = config.schedule_steps or total_steps
    warmup = warmup_length(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = (1 + math.cos(math.pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * left


NOT_FINITE, OVERFLOW = 1.0, 2.0


@dataclass
class UpdateResult:
    """Scalars on the device: norm of the mean gradient before clipping, and whether the update was skipped:

    0 it was not, NOT_FINITE, or OVERFLOW: a gradient too large for fp16, at a loss scale that can still fall.
    """

    grad_norm: Tensor
    skipped: Tensor


class FusedAdam:
    """torch's fused AdamW with fp32 moments."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerSection) -> None:
        betas = (config.adam_beta1, config.adam_beta2)
        self._adam = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)
        for parameter in (p for group in groups for p in group["params"]):
            self._adam.state[parameter] = {  # now, so that saving and loading never meet a missing state
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Parameter -> step, exp_avg, exp_avg_sq."""
        return self._adam.state

    def update(self, rate: float, scale: Tensor, skipped: Tensor) -> None:
        """One update with gradient / scale, none where `skipped` is 1 (scalars on the device)."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.grad_scale, self._adam.found_inf = scale, skipped  # type: ignore[attr-defined]
        self._adam.step()


class DraftOptimizer:
    """AdamW over named fp32 tensors (whole parameters, or the shards of this rank).

    parameters: leaf tensors whose `.grad` holds the summed gradient when `step` is called, times the loss scale where
    there is a scaler.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: OptimizerSection,
        total_steps: int,
        scaler: LossScaler | None = None,
    ) -> None:
        self.parameters, self.scaler = parameters, scaler
        self._config, self._total_steps = config, total_steps
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if config.optim == "adamw_8bit":
            self._adam: FusedAdam | Adam8bit = Adam8bit(groups, config)
        else:
            self._adam = FusedAdam(groups, config)

    def step(self, step: int, count: Tensor, loss_sum: Tensor, square_sum: Tensor) -> UpdateResult:
        """Update with gradient / count, clipped; do nothing where the loss or the gradient is not finite.

        step: 0-based optimizer step. count, loss_sum, square_sum: scalars on the parameters' device, over all ranks:
        counted positions, loss, squared norm of the summed gradient.
        """
        divisor = count.clamp(min=1).float()
        if self.scaler is not None:
            divisor = divisor * self.scaler.scale
        grad_norm = square_sum.sqrt() / divisor
        skipped = self._verdict(torch.isfinite(grad_norm), torch.isfinite(loss_sum))
        scale = divisor
        if self._config.max_grad_value > 0:
            self._clip_elements(divisor * self._config.max_grad_value)
        if self._config.max_grad_norm > 0:
            scale = divisor * (grad_norm / self._config.max_grad_norm).clamp(min=1.0)
        self._adam.update(learning_rate_at(self._config, step, self._total_steps), scale, skipped.clamp(max=1))
        return UpdateResult(grad_norm, skipped)

    def scaled(self, loss: Tensor) -> Tensor:
        """What `backward` is to be called on."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def scaler_state(self) -> dict[str, float]:
        """The loss scale for a checkpoint; nothing without one."""
        return {} if self.scaler is None else self.scaler.state()

    def _verdict(self, finite_gradient: Tensor, finite_loss: Tensor) -> Tensor:
        """`UpdateResult.skipped` of a step; tells the scaler. A loss that is not finite is not the scale's fault."""
        skipped = torch.where(finite_gradient & finite_loss, 0.0, NOT_FINITE)
        if self.scaler is None:
            return skipped
        overflow = finite_loss & ~finite_gradient
        skipped = torch.where(overflow & self.scaler.can_fall(), OVERFLOW, skipped)
        self.scaler.update(overflow)
        return skipped

    def _clip_elements(self, limit: Tensor) -> None:
        """Clip the SUMMED gradients to +-limit (a scalar on their device), so that their means are clipped."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.clamp_(min=-limit, max=limit)

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> {"exp_avg", "exp_avg_sq" (shaped like it), "step" (scalar)}; the live tensors, which
        `copy_` writes to."""
        return {name: self._adam.state[parameter] for name, parameter in self.parameters.items()}

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The same as ordinary fp32 tensors, whatever the moments are kept in."""
        return {name: {k: plain(v) for k, v in state.items()} for name, state in self.state_tensors().items()}

    def load_steps(self, steps: dict[str, float]) -> None:
        """Set the per-parameter step counters of a checkpoint. Raises CheckpointError naming a missing one."""
        for name, state in self.state_tensors().items():
            if name not in steps:
                raise CheckpointError(f"optimizer state has no step counter of {name}")
            state["step"].fill_(steps[name])
