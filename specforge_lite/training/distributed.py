"""The ranks of a run as its parts see them. Here is a run without torchrun; `training/ranks.py` has one of several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specforge_lite.core.devices import num_gpus
from specforge_lite.core.errors import CheckpointError, ConfigError, SpecforgeError
from specforge_lite.training.settings import DistributedSection

if TYPE_CHECKING:
    from specforge_lite.model.sequence import SequenceGroup


@dataclass(frozen=True)
class Verdict:
    """What all ranks know before a step. Sums over ranks."""

    num_stopping: int
    num_out_of_data: int
    num_skipped_samples: int


@dataclass
class World:
    """This process among the ranks, the only one. `device` is where the draft trains; `timeout_s` bounds a collective.

    sp_size: neighbouring ranks share a batch (`model/sequence.py`), so there are dp_size = world_size / sp_size
    batches at a time, of which this rank works on number dp_rank.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float
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

    def report(self, error: BaseException) -> None:
        """Show an error of this rank to the user, and tell the other ranks."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all ranks, in place; nccl for CUDA tensors, gloo for others."""
        return tensor

    def from_main(self, value: Tensor | None, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rank 0's `value`, as `dtype`, on the CPU of every rank; the others' are ignored."""
        assert value is not None
        return value.detach().to("cpu", dtype)

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on rank 0 (JSON-ready), on every rank; its user error is a CheckpointError on every
        rank."""
        try:
            return function()
        except SpecforgeError as error:
            raise CheckpointError(str(error)) from None

    def gather_bytes(self, data: bytes) -> list[Tensor]:
        """uint8 tensors of all ranks, in rank order, on every rank; lengths may differ."""
        return [torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)]

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks, in rank order, on every rank."""
        return [bytes(part.numpy()).decode() for part in self.gather_bytes(text.encode())]


@contextmanager
def open_world(config: DistributedSection) -> Iterator[World]:
    """Join the torchrun world, or be alone without torchrun. Every error inside is shared with the other ranks.

    With several ranks an error ends the process here: the rank that failed first has shown its own error, the others
    one line that names it. Exit code 2 for a user's error, 1 otherwise.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _own_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1 and config.sp_size == 1 and config.sharding == "ddp":
        yield World(rank, 1, device, timeout_s=60 * config.dist_timeout)
        return
    from specforge_lite.training.ranks import open_ranks

    with open_ranks(config, rank, world_size, device) as world:
        yield world


@contextmanager
def report_failure(world: World) -> Iterator[None]:
    """Report an error to the user and the other ranks at once: before engines are stopped and files are closed."""
    try:
        yield
    except Exception as error:
        world.report(error)
        raise


def _own_device(local_rank: int) -> torch.device:
    count = num_gpus()
    if not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(f"local rank {local_rank}: this host has {count} visible GPU(s); start one rank per GPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
