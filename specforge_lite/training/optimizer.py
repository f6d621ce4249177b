"""AdamW on fp32 master weights with a schedule, a global divisor, clipping, and a device-side guard against NaN.

The gradients that arrive are SUMS over counted positions of all ranks and micro batches. The fused kernel divides them
on the fly (`grad_scale`) and does nothing where `found_inf` is set, the two hooks that torch made for GradScaler: so
dividing, clipping and skipping a bad step need neither a pass over memory nor a value on the host.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.errors import CheckpointError
from specforge_lite.model.device import triton_problem
from specforge_lite.training.settings import OptimizerSection

NOT_FINITE, OVERFLOW = 1.0, 2.0
SCALER_COUNTERS = ("loss_scale", "loss_scale_steps", "loss_scale_hysteresis")


def learning_rate_at(config: OptimizerSection, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then cosine, linear or constant.

    total_steps: length of the schedule where the config gives none.
    """
    total_steps = config.schedule_steps or total_steps
    ratio = 0.015 if config.warmup_ratio is None else config.warmup_ratio
    warmup = math.ceil(ratio * total_steps) if config.warmup_steps is None else config.warmup_steps
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
        total_steps: int,
        scaler: LossScaler | None = None,
    ) -> None:
        self.parameters, self.scaler = parameters, scaler
        self._config, self.total_steps = config, total_steps
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        decayed = ((matrices, config.weight_decay), (vectors, 0.0))
        groups = [{"params": params, "weight_decay": decay} for params, decay in decayed if params]
        self._adam = (_Adam8bit if config.optim == "adamw_8bit" else _FusedAdam)(groups, config)

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
        return {name: {k: v.dequantize() if _is_8bit(v) else v for k, v in s.items()} for name, s in saved}

    def load_steps(self, steps: dict[str, float]) -> None:
        """Set the per-parameter step counters of a checkpoint. Raises CheckpointError naming a missing one."""
        for name, state in self.state_tensors().items():
            if name not in steps:
                raise CheckpointError(f"optimizer state has no step counter of {name}")
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


class _Adam8bit:
    """`--optim adamw_8bit`, from torchao: 2 bytes of state per parameter instead of 8.

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


def _is_8bit(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith("torchao.")


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
