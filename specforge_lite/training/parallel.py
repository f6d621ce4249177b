"""The draft spread over ranks: replicated (ddp) or sharded (fsdp2), behind one interface for the loop.

    begin_step -> (forward, backward) per micro batch -> reduce_gradients -> parameters[...].grad hold SUMS over ranks

Why no DistributedDataParallel: a draft is unrolled K times on the same weights, so every gradient is complete only at
the very end of backward and there is nothing to overlap with. One sum over one flat buffer is as fast, adds up in the
same order in every process life (DDP reorders its buckets after the first step, which would break exact resume), and
ranks need not run the same number of micro batches. Gradient compression (torch's PowerSGD hook) hangs on those
buckets; a draft's gradient is 1.6 GB once a step for an 8B target, which NVLink sums in 10 ms, so it is not offered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_lite.core.errors import CheckpointError
from specforge_lite.model.draft import Draft, TTTSettings
from specforge_lite.model.target_head import TargetHead
from specforge_lite.training.distributed import World
from specforge_lite.training.settings import DistributedSection
from specforge_lite.types import DraftBatch, StepOutput


class ReplicatedDraft:
    """A draft on its device, whole on every rank; gradients live in one flat buffer. `fsdp.ShardedDraft` overrides it.

    parameters: the trained fp32 tensors this rank updates, by name.
    """

    def __init__(self, draft: Draft, world: World) -> None:
        self.draft = draft.to(world.device)
        self._world = world
        self.parameters: dict[str, Tensor] = {name: p for name, p in draft.named_parameters() if p.requires_grad}
        self._flat = torch.zeros(sum(p.numel() for p in self.parameters.values()), device=world.device)
        start = 0
        for parameter in self.parameters.values():  # autograd adds into an existing .grad in place
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def forward(self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings) -> StepOutput:
        """Run the draft on this rank's micro batch."""
        return self.draft(batch, target_head, ttt)  # type: ignore[no-any-return]

    def begin_step(self) -> None:
        """Forget the gradients of the last step."""
        self._flat.zero_()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro batch; `last` marks the last one of the step."""
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce_gradients(self) -> Tensor:
        """Sum gradients over ranks; returns the squared norm of the summed gradient (scalar, same on every rank)."""
        self._world.sum_(self._flat)
        return self._flat.square().sum() if self._flat.device.type == "cuda" else torch.dot(self._flat, self._flat)

    def full(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor shaped like this rank's part of parameter `name` -> the whole one on the CPU. All ranks call it."""
        return tensor.detach().cpu()

    @torch.no_grad()
    def load(self, name: str, tensor: Tensor, full: Tensor) -> None:
        """Copy this rank's part of the whole tensor `full` into `tensor`. Raises CheckpointError on a wrong shape."""
        check_shape(name, tensor.shape, full)
        tensor.copy_(full)

    def frozen(self) -> dict[str, Tensor]:
        """Buffers that belong into a checkpoint (the vocabulary map), and parameters that are not trained."""
        return frozen_tensors(self.draft)

    def checksum(self) -> int | None:
        """A fingerprint of replicated weights, equal on all ranks as long as they agree; None where sharded."""
        return sum(int(p.detach().view(torch.int32).long().sum()) for p in self.parameters.values())


def spread_draft(draft: Draft, world: World, config: DistributedSection, compute_dtype: torch.dtype) -> ReplicatedDraft:
    """Place a draft (fp32, the same weights on every rank) as `--sharding` asks."""
    draft.float()
    if config.sharding == "ddp":
        return ReplicatedDraft(draft, world)
    from specforge_lite.training.fsdp import ShardedDraft

    return ShardedDraft(draft, world, config, compute_dtype)


def frozen_tensors(draft: Draft) -> dict[str, Tensor]:
    """Parameters that are not trained and persistent buffers, by name."""
    saved: dict[str, Tensor] = {name: p for name, p in draft.named_parameters() if not p.requires_grad}
    persistent = draft.state_dict().keys()
    saved.update({name: b for name, b in draft.named_buffers() if name in persistent})
    return saved


def check_shape(name: str, expected: torch.Size, full: Tensor) -> None:
    """Raise CheckpointError unless a tensor of a checkpoint has the shape that the draft expects."""
    if full.shape != expected:
        raise CheckpointError(f"{name}: shape {list(full.shape)} in the checkpoint, {list(expected)} in this draft")
