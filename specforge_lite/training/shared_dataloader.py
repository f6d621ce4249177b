"""Batches of a sequence group (`--sp-size`): its first rank captures them, the others receive them.

    rank 0   plan -> samples -> captured states -> batch --.        the target runs once per batch,
    rank 1   plan ---------------------------------------- batch    whatever the size of the group

All ranks of a group follow the same plan, so only the content travels, when the loop asks for a micro batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specforge_lite.data.sampler import PlannedStep
from specforge_lite.training.dataloader import BatchMaker, Feed, StepBatches
from specforge_lite.training.distributed import World
from specforge_lite.types import CapturedStates, DraftBatch, TokenizedSample


class SharingBatchMaker:
    """The first rank's: what it makes, the others of its group get too."""

    def __init__(self, to_batch: BatchMaker, world: World) -> None:
        self._to_batch, self._world = to_batch, world

    def __call__(self, samples: Sequence[TokenizedSample], states: Sequence[CapturedStates]) -> DraftBatch:
        return share_batch(self._to_batch(samples, states), self._world)


class FollowerFeed(Feed):
    """The feed of the other ranks: no captures of their own, nothing skipped, nothing waited for."""

    def __init__(self, steps: Iterator[PlannedStep], world: World, dtype: torch.dtype) -> None:
        self._steps, self._world, self._dtype = steps, world, dtype

    @property
    def num_skipped(self) -> int:
        return 0

    @property
    def wait_seconds(self) -> float:
        return 0.0

    def __next__(self) -> StepBatches:
        step = next(self._steps)
        return StepBatches((receive_batch(self._world, self._dtype) for _ in step.micro_batches), step)

    def close(self, timeout_s: float = 0.0) -> None:
        """Nothing runs ahead."""


def share_batch(batch: DraftBatch, world: World) -> DraftBatch:
    """Send a batch to the other ranks of the group; they call `receive_batch`."""
    ids = "\n".join(batch.sample_ids).encode()
    offsets = torch.tensor(batch.doc_offsets)
    sizes = [len(ids), len(offsets), batch.aux_NG.shape[1], batch.last_NH.shape[1]]
    world.share_in_group_(torch.tensor(sizes))
    world.share_in_group_(torch.frombuffer(bytearray(ids or b"-"), dtype=torch.uint8))
    world.share_in_group_(offsets)
    world.share_in_group_(batch.input_ids_N)
    world.share_in_group_(_host_mask(batch).byte())
    world.share_in_group_(batch.aux_NG)
    world.share_in_group_(batch.last_NH)
    return batch


def receive_batch(world: World, dtype: torch.dtype) -> DraftBatch:
    """The batch that the group's first rank shares, on this rank's device. dtype: of its hidden states."""
    num_bytes, num_offsets, aux_width, width = world.share_in_group_(torch.zeros(4, dtype=torch.int64)).tolist()
    ids = world.share_in_group_(torch.zeros(max(1, num_bytes), dtype=torch.uint8))
    offsets = world.share_in_group_(torch.zeros(num_offsets, dtype=torch.int64)).tolist()
    num_tokens, device = offsets[-1], world.device
    input_ids_N = world.share_in_group_(torch.zeros(num_tokens, dtype=torch.int64, device=device))
    mask_N = world.share_in_group_(torch.zeros(num_tokens, dtype=torch.uint8)).bool()
    aux_NG = world.share_in_group_(torch.empty(num_tokens, aux_width, dtype=dtype, device=device))
    last_NH = world.share_in_group_(torch.empty(num_tokens, width, dtype=dtype, device=device))
    names = bytes(ids.numpy())[:num_bytes].decode()
    return DraftBatch(
        input_ids_N=input_ids_N,
        loss_mask_N=mask_N.to(device, non_blocking=True),
        doc_offsets=offsets,
        aux_NG=aux_NG,
        last_NH=last_NH,
        sample_ids=names.split("\n") if names else [],
        host_mask_N=mask_N,
    )


def _host_mask(batch: DraftBatch) -> Tensor:
    return batch.loss_mask_N.cpu() if batch.host_mask_N is None else batch.host_mask_N
