"""AdamW on fp32 master weights with a schedule, a global divisor, clipping, and a device-side guard against NaN.

The gradients that arrive are SUMS over counted positions of all ranks and micro batches. The fused kernel divides them
on the fly (`grad_scale`) and does nothing where `found_inf` is set, the two hooks that torch made for GradScaler: so
dividing, clipping and skipping a bad step need neither a pass over memory nor a value on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specforge_lite.training.settings import OptimizerSection

if TYPE_CHECKING:
    from specforge_lite.training.adam8bit import Adam8bit
    from specforge_lite.training.fp16 import LossScaler

NOT_FINITE, OVERFLOW = 1.0, 2.0


def learning_rate_at(config: OptimizerSection, step: int, total_steps: float) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then cosine, linear or constant.

    total_steps: length of the schedule where the config gives none.
    """
    total_steps = config.schedule_steps or total_steps
    ratio = 0.015 if config.warmup_ratio is None else config.warmup_ratio
    warmup: float = math.ceil(ratio * total_steps) if config.warmup_steps is None else config.warmup_steps
    warmup = min(warmup, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = (1 + math.cos(math.pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * left


@dataclass
class UpdateResult:
    """Scalars on the device: norm of the mean gradient before clipping, and whether the update was skipped:

    0 it was not, NOT_FINITE, or OVERFLOW: a gradient too large for fp16, at a loss scale that can still fall.
    """

    grad_norm: Tensor
    skipped: Tensor


class DraftOptimizer:
    """AdamW over named fp32 tensors (whole parameters, or the shards of this rank).

    parameters: leaf tensors whose `.grad` holds the summed gradient when `step` is called, times the loss scale where
    there is a scaler. total_steps: length of the learning-rate schedule where the config gives none.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: OptimizerSection,
        total_steps: float,
        scaler: LossScaler | None = None,
    ) -> None:
        self.parameters, self.scaler = parameters, scaler
        self._config, self.total_steps = config, total_steps
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        decayed = ((matrices, config.weight_decay), (vectors, 0.0))
        groups = [{"params": params, "weight_decay": decay} for params, decay in decayed if params]
        self._adam: _FusedAdam | Adam8bit
        if config.optim == "adamw_8bit":
            from specforge_lite.training.adam8bit import Adam8bit

            self._adam = Adam8bit(groups, config)
        else:
            self._adam = _FusedAdam(groups, config)

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (0-based)."""
        return learning_rate_at(self._config, step, self.total_steps)

    def step(self, step: int, count: Tensor, loss_sum: Tensor, square_sum: Tensor) -> UpdateResult:
        """Update with gradient / count, clipped; do nothing where the loss or the gradient is not finite.

        step: 0-based optimizer step. count, loss_sum, square_sum: scalars on the parameters' device, over all ranks:
        counted positions, loss, squared norm of the summed gradient.
        """
        divisor = count.clamp(min=1).float()
        if self.scaler is not None:
            divisor = divisor * self.scaler.scale
        grad_norm = square_sum.sqrt() / divisor
        finite_gradient, finite_loss = torch.isfinite(grad_norm), torch.isfinite(loss_sum)
        skipped = torch.where(finite_gradient & finite_loss, 0.0, NOT_FINITE)
        if self.scaler is not None:  # a loss that is not finite is not the scale's fault
            overflow = finite_loss & ~finite_gradient
            skipped = torch.where(overflow & self.scaler.can_fall(), OVERFLOW, skipped)
            self.scaler.update(overflow)
        scale = divisor
        if self._config.max_grad_value > 0:  # the sums are clipped so that their means are
            limit = divisor * self._config.max_grad_value
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.clamp_(min=-limit, max=limit)
        if self._config.max_grad_norm > 0:
            scale = divisor * (grad_norm / self._config.max_grad_norm).clamp(min=1.0)
        self._adam.update(self.learning_rate(step), scale, skipped.clamp(max=1))
        return UpdateResult(grad_norm, skipped)

    def scaled(self, loss: Tensor) -> Tensor:
        """What `backward` is to be called on."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> {"exp_avg", "exp_avg_sq" (shaped like it), "step" (scalar)}; the live tensors, which
        `copy_` writes to."""
        return {name: self._adam.state[parameter] for name, parameter in self.parameters.items()}

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The same as ordinary fp32 tensors, whatever the moments are kept in."""
        saved = self.state_tensors().items()
        plain = lambda value: value.dequantize() if type(value).__module__.startswith("torchao.") else value  # noqa: E731
        return {name: {kind: plain(value) for kind, value in state.items()} for name, state in saved}

    def load_steps(self, steps: dict[str, float]) -> None:
        """Set the per-parameter step counters of a checkpoint."""
        for name, state in self.state_tensors().items():
            state["step"].fill_(steps[name])


class _FusedAdam:
    """torch's fused AdamW with fp32 moments."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerSection) -> None:
        betas = (config.adam_beta1, config.adam_beta2)
        self._adam = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)
        self.state: dict[Tensor, dict[str, Tensor]] = self._adam.state
        for parameter in (p for group in groups for p in group["params"]):
            self.state[parameter] = {  # now, so that saving and loading never meet a missing state
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def update(self, rate: float, scale: Tensor, skipped: Tensor) -> None:
        """One update with gradient / scale, none where `skipped` is 1 (scalars on the device)."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.grad_scale, self._adam.found_inf = scale, skipped  # type: ignore[attr-defined]
        self._adam.step()
