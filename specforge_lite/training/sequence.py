"""`--sp-size`: neighbouring ranks share each batch; the first of such a group captures, the others receive.

rank 0   plan -> samples -> captured states -> batch --.        the target runs once per batch,
rank 1   plan ---------------------------------------- batch    whatever the size of the group
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from specforge_lite.data.sampler import PlannedStep
from specforge_lite.model.sequence import SequenceGroup
from specforge_lite.training.dataloader import Dataloader, StepBatches
from specforge_lite.training.distributed import World
from specforge_lite.types import DraftBatch


def open_sequence_group(world: World, size: int) -> SequenceGroup:
    """This rank's group among those of `size` neighbouring ranks. Every rank makes all of them, in the same order."""
    timeout = timedelta(seconds=world.timeout_s)
    starts = range(0, world.world_size, size)
    groups = [dist.new_group(list(range(start, start + size)), timeout=timeout) for start in starts]
    return SequenceGroup(world.rank % size, size, groups[world.rank // size])


def _share(world: World, tensor: Tensor) -> Tensor:
    """Copy a tensor of the sequence group's first rank to the others, in place; nccl for CUDA tensors."""
    assert world.sequence is not None
    dist.broadcast(tensor, src=world.rank - world.sp_rank, group=world.sequence.group)
    return tensor


class FollowerDataloader(Dataloader):
    """That of a group's other ranks: the same plan, no captures of their own, nothing skipped, nothing waited for."""

    wait_seconds = 0.0

    def __init__(self, steps: Iterator[PlannedStep | None], world: World, dtype: torch.dtype) -> None:
        self._steps, self._world, self._dtype = steps, world, dtype
        self.num_skipped = 0

    def __next__(self) -> StepBatches:
        step = next(self._steps)
        assert step is not None  # the loop waits for rows before it asks
        return StepBatches((share_batch(None, self._world, self._dtype) for _ in step.micro_batches), step)

    def close(self, timeout_s: float = 0.0) -> None:
        """Nothing runs ahead."""


def share_batch(batch: DraftBatch | None, world: World, dtype: torch.dtype) -> DraftBatch:
    """The batch of the group's first rank on every rank of it; the others pass None. dtype: of its hidden states."""
    if batch is not None:
        names = torch.frombuffer(bytearray("\n".join(["-", *batch.sample_ids]).encode()), dtype=torch.uint8)
        mask_N = batch.loss_mask_N.cpu() if batch.host_mask_N is None else batch.host_mask_N
        offsets = torch.tensor(batch.doc_offsets)
        parts = [names, offsets, batch.input_ids_N, mask_N.byte(), batch.aux_NG, batch.last_NH]
        sizes = [len(names), len(offsets), len(batch), batch.aux_NG.shape[1], batch.last_NH.shape[1]]
        for part in (torch.tensor(sizes), *parts):
            _share(world, part)
        return batch
    num_bytes, num_offsets, num_tokens, aux_width, width = _share(world, torch.zeros(5).long()).tolist()
    names = _share(world, torch.zeros(num_bytes, dtype=torch.uint8))
    offsets = _share(world, torch.zeros(num_offsets, dtype=torch.int64))
    input_ids_N = _share(world, torch.zeros(num_tokens, dtype=torch.int64, device=world.device))
    mask_N = _share(world, torch.zeros(num_tokens, dtype=torch.uint8)).bool()
    aux_NG, last_NH = (
        _share(world, torch.empty(num_tokens, columns, dtype=dtype, device=world.device))
        for columns in (aux_width, width)
    )
    return DraftBatch(
        input_ids_N=input_ids_N,
        loss_mask_N=mask_N.to(world.device, non_blocking=True),
        doc_offsets=offsets.tolist(),
        aux_NG=aux_NG,
        last_NH=last_NH,
        sample_ids=bytes(names.numpy()).decode().split("\n")[1:],
        host_mask_N=mask_N,
    )
