"""The ranks of a run under torchrun: start-up, what they agree on before each step, and how one failure ends all.

    rank 0   ... step 41 | agree | step 42 | agree |              a stop, or the end of the data, seen by one rank
    rank 1   ... step 41 | agree | step 42 | agree |              is known to all before any of them starts a step

`agree` sums a few integers over gloo on the host: it never waits for a GPU. Large tensors go over nccl on CUDA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from specforge_lite.core.errors import CheckpointError, ConfigError, SpecforgeError
from specforge_lite.core.log import USER_ERROR_EXIT_CODE
from specforge_lite.training.distributed import World, report_failure
from specforge_lite.training.failures import PEER_FAILED_EXIT_CODE, FailureBoard
from specforge_lite.training.settings import DistributedSection


@dataclass
class RankedWorld(World):
    """This process among several, with a process group over all of them."""

    board: FailureBoard | None = None

    def place(self, where: str, step: int) -> None:
        if self.board is not None:
            self.board.place(where, step)

    def report(self, error: BaseException) -> None:
        if self.board is not None:
            self.board.report(error)

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: Tensor | None, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        kind = torch.uint8 if dtype == torch.bool else dtype  # gloo has no bool
        own = value is not None and self.is_main
        sent = value.detach().to("cpu", kind).contiguous() if own else torch.empty(shape, dtype=kind)  # type: ignore[union-attr]
        dist.broadcast(sent, src=0)
        return sent

    def on_main(self, function: Callable[[], Any]) -> Any:
        answer: dict[str, Any] = {}
        if self.is_main:
            try:
                answer["value"] = function()
            except SpecforgeError as error:
                answer["problem"] = str(error)
        payload = torch.frombuffer(bytearray(json.dumps(answer).encode()), dtype=torch.uint8)  # nothing is pickled
        length = int(self.from_main(torch.tensor(len(payload)), torch.Size(), torch.int64))
        answer = json.loads(bytes(self.from_main(payload, torch.Size((length,)), torch.uint8).numpy()))
        if "problem" in answer:
            raise CheckpointError(answer["problem"])
        return answer["value"]

    def gather_bytes(self, data: bytes) -> list[Tensor]:
        (own,) = super().gather_bytes(data)
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(own)
        self.sum_(lengths)
        longest = int(lengths.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return [part[: int(n)] for part, n in zip(parts, lengths)]


@contextmanager
def open_ranks(config: DistributedSection, rank: int, world_size: int, device: torch.device) -> Iterator[World]:
    """See `open_world`. A single rank has a group too, of itself, for FSDP2."""
    world = RankedWorld(rank, world_size, device, timeout_s=60 * config.dist_timeout)
    if world_size % config.sp_size:
        if not world.is_main:  # one rank reports it
            sys.exit(USER_ERROR_EXIT_CODE)
        raise ConfigError(
            f"sp_size {config.sp_size}: does not divide the {world_size} torchrun rank(s); start a multiple of it, as"
            f" with torchrun --nproc_per_node {config.sp_size}"
        )
    world.board = _init_process_group(world)
    if config.sp_size > 1:
        from specforge_lite.training.sequence import open_sequence_group

        world.sequence = open_sequence_group(world, config.sp_size)
    try:
        with report_failure(world):
            yield world
    except Exception as error:
        if world.board is None:
            raise
        sys.exit(USER_ERROR_EXIT_CODE if isinstance(error, SpecforgeError) else PEER_FAILED_EXIT_CODE)
    finally:
        if world.board is not None:
            world.board.close()
    dist.destroy_process_group()  # not after an error: nccl would wait for dead ranks


def _init_process_group(world: World) -> FailureBoard | None:
    timeout = timedelta(seconds=world.timeout_s)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if not world.distributed:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return None
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    board = FailureBoard(store, world.rank, world.world_size)
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=world.rank, world_size=world.world_size, timeout=timeout)
    return board
