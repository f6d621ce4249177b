"""The ranks of a run: start-up under torchrun, what they agree on before each step, and how one failure ends all.

    rank 0   ... step 41 | agree | step 42 | agree |              a stop, or the end of the data, seen by one rank
    rank 1   ... step 41 | agree | step 42 | agree |              is known to all before any of them starts a step

`agree` sums a few integers over gloo on the host: it never waits for a GPU. Large tensors go over nccl on CUDA.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from specforge_lite.core.devices import num_gpus
from specforge_lite.core.errors import CheckpointError, ConfigError, SpecforgeError
from specforge_lite.core.log import USER_ERROR_EXIT_CODE
from specforge_lite.model.sequence import SequenceGroup
from specforge_lite.training.settings import DistributedSection

if TYPE_CHECKING:
    from specforge_lite.training.failures import FailureBoard


@dataclass(frozen=True)
class Verdict:
    """What all ranks know before a step. Sums over ranks."""

    num_stopping: int
    num_out_of_data: int
    num_skipped_samples: int


@dataclass
class World:
    """This process among the ranks. `device` is where the draft trains; `timeout_s` bounds every collective.

    sp_size: neighbouring ranks share a batch (`model/sequence.py`), so there are dp_size = world_size / sp_size
    batches at a time, of which this rank works on number dp_rank.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float
    board: FailureBoard | None = None
    sequence: SequenceGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def sp_size(self) -> int:
        return 1 if self.sequence is None else self.sequence.size

    @property
    def sp_rank(self) -> int:
        return 0 if self.sequence is None else self.sequence.rank

    @property
    def dp_size(self) -> int:
        return self.world_size // self.sp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp_size

    def agree(self, step: int, stopping: bool, out_of_data: bool, num_skipped: int) -> Verdict:
        """Meet before `step`. Host only. Raises RuntimeError when another rank is dead or does not come in time."""
        self.place(f"waiting for the other ranks before step {step}", step)
        counts = self.sum_(torch.tensor([int(stopping), int(out_of_data), num_skipped]))
        self.place(f"in step {step}", step)
        return Verdict(*counts.tolist())

    def place(self, where: str, step: int) -> None:
        """Publish where this rank is, for the message of the others should it hang."""
        if self.board is not None:
            self.board.place(where, step)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all ranks, in place; nccl for CUDA tensors, gloo for others."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor of rank 0 to all ranks, in place."""
        if self.distributed:
            dist.broadcast(tensor, src=0)
        return tensor

    def share_in_group_(self, tensor: Tensor) -> Tensor:
        """Copy a tensor of the sequence group's first rank to the others, in place; nccl for CUDA tensors."""
        if self.sequence is not None:
            dist.broadcast(tensor, src=self.rank - self.sp_rank, group=self.sequence.group)
        return tensor

    def from_main(self, value: Tensor | None, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rank 0's `value`, as `dtype`, on the CPU of every rank; the others' are ignored."""
        kind = torch.uint8 if dtype == torch.bool else dtype  # gloo has no bool
        if value is None or not self.is_main:
            return self.broadcast_(torch.empty(shape, dtype=kind))
        return self.broadcast_(value.detach().to("cpu", kind).contiguous())

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on rank 0 (JSON-ready), on every rank; its user error is a CheckpointError on every
        rank."""
        answer: dict[str, Any] = {}
        if self.is_main:
            try:
                answer["value"] = function()
            except SpecforgeError as error:
                answer["problem"] = str(error)
        if self.distributed:
            answer = json.loads(self.broadcast_text(json.dumps(answer)))
        if "problem" in answer:
            raise CheckpointError(answer["problem"])
        return answer["value"]

    def broadcast_text(self, text: str) -> str:
        """The text of rank 0, on every rank (bytes over gloo, nothing is pickled)."""
        if not self.distributed:
            return text
        payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0).byte()
        length = self.broadcast_(torch.tensor([len(payload)]))
        if not self.is_main:
            payload = torch.zeros(int(length), dtype=torch.uint8)
        self.broadcast_(payload)
        return bytes(payload.numpy()).decode()

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks, in rank order, on every rank."""
        return [bytes(part.numpy()).decode() for part in self.gather_bytes(text.encode())]

    def gather_bytes(self, data: bytes) -> list[Tensor]:
        """uint8 tensors of all ranks, in rank order; lengths may differ."""
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
        if not self.distributed:
            return [own]
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
def open_world(config: DistributedSection) -> Iterator[World]:
    """Join the torchrun world, or be alone without torchrun. Every error inside is shared with the other ranks.

    With several ranks an error ends the process here: the rank that failed first has shown its own error, the others
    one line that names it. Exit code 2 for a user's error, 1 otherwise.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _own_device(int(os.environ.get("LOCAL_RANK", "0")))
    world = World(rank, world_size, device, timeout_s=60 * config.dist_timeout)
    if world_size % config.sp_size:
        if not world.is_main:  # one rank reports it
            sys.exit(USER_ERROR_EXIT_CODE)
        raise ConfigError(
            f"sp_size {config.sp_size}: does not divide the {world_size} torchrun rank(s); start a multiple of it, as"
            f" with torchrun --nproc_per_node {config.sp_size}"
        )
    needs_group = world.distributed or config.sharding == "fsdp2"
    if needs_group:
        world.board = _init_process_group(world)
    if config.sp_size > 1:
        world.sequence = _open_sequence_group(world, config.sp_size)
    try:
        with report_failure(world):
            yield world
    except Exception as error:
        if world.board is None:
            raise
        from specforge_lite.training.failures import PEER_FAILED_EXIT_CODE

        sys.exit(USER_ERROR_EXIT_CODE if isinstance(error, SpecforgeError) else PEER_FAILED_EXIT_CODE)
    finally:
        if world.board is not None:
            world.board.close()
    if needs_group:  # not after an error: nccl would wait for dead ranks
        dist.destroy_process_group()


@contextmanager
def report_failure(world: World) -> Iterator[None]:
    """Report an error to the user and the other ranks at once: before engines are stopped and files are closed."""
    try:
        yield
    except Exception as error:
        if world.board is not None:
            world.board.report(error)
        raise


def _own_device(local_rank: int) -> torch.device:
    count = num_gpus()
    if not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(f"local rank {local_rank}: this host has {count} visible GPU(s); start one rank per GPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _open_sequence_group(world: World, size: int) -> SequenceGroup:
    """This rank's group among those of `size` neighbouring ranks. Every rank makes all of them, in the same order."""
    timeout = timedelta(seconds=world.timeout_s)
    starts = range(0, world.world_size, size)
    groups = [dist.new_group(list(range(start, start + size)), timeout=timeout) for start in starts]
    return SequenceGroup(world.rank % size, size, groups[world.rank // size])


def _init_process_group(world: World) -> FailureBoard | None:
    timeout = timedelta(seconds=world.timeout_s)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if not world.distributed:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return None
    from specforge_lite.training.failures import FailureBoard

    store, _, _ = next(rendezvous("env://", timeout=timeout))
    board = FailureBoard(store, world.rank, world.world_size)
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=world.rank, world_size=world.world_size, timeout=timeout)
    return board
