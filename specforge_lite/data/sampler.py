"""Which samples each rank trains on, step by step: one global order per epoch, cut into global steps.

The order depends on (seed, epoch) only; where a run stands is (epoch, samples consumed). So it goes on with another
number of ranks or accumulation steps, every sample of an epoch comes exactly once, and ranks need not talk. With
`max_tokens_per_batch` a micro batch is a bin of samples of at most that many tokens (`data/packing.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np

from specforge_lite.core.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step of one rank. micro_batches: dataset indices of each; as many on every rank, some maybe empty
    in an epoch's last step. state_after: the plan's state once the step is done. num_tokens: tokens of this rank;
    num_slots: what they could have been (`max_tokens_per_batch` per micro batch), 0 without packing. epoch: theirs."""

    micro_batches: list[list[int]]
    state_after: dict[str, Any]
    num_tokens: int = 0
    num_slots: int = 0
    epoch: int = 0


def plan_steps(
    lengths: Any, supervised_counts: Any = None, *, max_tokens_per_batch: int | None = None, **sizes: Any
) -> BatchPlan:
    """The steps of one rank, packed where a micro batch is counted in tokens; sizes: as those of `BatchPlan`."""
    if max_tokens_per_batch is None:
        return BatchPlan(lengths, supervised_counts, **sizes)
    from specforge_lite.data.packing import PackedPlan

    return PackedPlan(lengths, supervised_counts, max_tokens_per_batch=max_tokens_per_batch, **sizes)


@dataclass(eq=False)
class BatchPlan:
    """The endless sequence of steps of one rank. Raises ConfigError for impossible sizes.

    lengths, supervised_counts: int [S], tokens and supervised tokens of each sample (default: lengths). A global step
    is `batch_size` samples per micro batch, times accumulation steps, times ranks.
    """

    lengths: Any
    supervised_counts: Any = None
    _: KW_ONLY
    batch_size: int = 1
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    max_tokens_per_batch: int | None = field(default=None, init=False)
    epoch: int = field(default=0, init=False)
    consumed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        counts = self.lengths if self.supervised_counts is None else self.supervised_counts
        self.lengths = np.asarray(self.lengths, dtype=np.int64)
        self.supervised_counts = np.asarray(counts, dtype=np.int64)
        if len(self.lengths) == 0:
            raise ConfigError("no samples to train on")
        if len(self.supervised_counts) != len(self.lengths):
            raise ConfigError(f"{len(self.supervised_counts)} supervised counts for {len(self.lengths)} samples")

    def state_dict(self) -> dict[str, Any]:
        """Where the plan stands, and what its order depends on; JSON."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "num_samples": len(self.lengths),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "max_tokens_per_batch": self.max_tokens_per_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises CheckpointError if it belongs to another order."""
        for name, value in self.state_dict().items():
            if name not in ("epoch", "consumed") and state.get(name, value) != value:
                raise CheckpointError(f"the checkpoint was made with {name} {state[name]}, this run has {value}")
        epoch, consumed = int(state["epoch"]), int(state["consumed"])
        if not 0 <= consumed < len(self.lengths) or epoch < 0:
            raise CheckpointError(f"epoch {epoch}, {consumed} samples consumed of {len(self.lengths)}: impossible")
        self._groups_after(epoch, consumed)  # raises if bins do not end here
        self.epoch, self.consumed = epoch, consumed

    def order(self, epoch: int) -> np.ndarray:
        """The global order of an epoch: sample indices, int64 [S]."""
        if not self.shuffle:
            return np.arange(len(self.lengths))
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.lengths))

    def _groups_after(self, epoch: int, consumed: int) -> list[list[int]]:
        """What is never torn apart, bins or single samples: those of an epoch after its first `consumed` samples."""
        return [[index] for index in self.order(epoch)[consumed:].tolist()]

    def _num_groups(self, epoch: int) -> int:
        return len(self.lengths)

    def num_steps(self, epoch: int) -> int:
        """Global steps of one whole epoch; with packing it differs a little between epochs."""
        return -(-self._num_groups(epoch) // self._groups_per_step)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_steps(0)

    def total_steps(self, num_epochs: int) -> int:
        """Global steps of the first `num_epochs` epochs."""
        return sum(self.num_steps(epoch) for epoch in range(num_epochs))

    def remaining_steps(self, num_epochs: int) -> int:
        """Global steps from the current position to the end of the first `num_epochs` epochs."""
        if self.epoch >= num_epochs:
            return 0
        left = len(self._groups_after(self.epoch, self.consumed))
        later = sum(self.num_steps(epoch) for epoch in range(self.epoch + 1, num_epochs))
        return -(-left // self._groups_per_step) + later

    @property
    def _groups_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    def steps(self) -> Iterator[PlannedStep]:
        """Steps from the current position, epoch after epoch, without end. The position moves when the caller takes
        the next step, so `state_dict` after a step is that step's `state_after`."""
        while True:
            epoch, groups = self.epoch, self._groups_after(self.epoch, self.consumed)
            for at in range(0, len(groups), self._groups_per_step):
                chunk = groups[at : at + self._groups_per_step]
                self.consumed += sum(map(len, chunk))
                if at + len(chunk) == len(groups):
                    self.epoch, self.consumed = epoch + 1, 0
                yield self._planned(chunk, epoch)

    def _planned(self, chunk: list[list[int]], epoch: int) -> PlannedStep:
        micro_batches = self._share(chunk)
        num_tokens = sum(int(self.lengths[batch].sum()) for batch in micro_batches if batch)
        num_slots = len(micro_batches) * (self.max_tokens_per_batch or 0)
        return PlannedStep(micro_batches, self.state_dict(), num_tokens, num_slots, epoch)

    def _share(self, chunk: list[list[int]]) -> list[list[int]]:
        """This rank's micro batches of a global step, of sizes as equal as they can be."""
        num_micro = -(-len(chunk) // (self.batch_size * self.world_size))
        parts = np.array_split(np.array(chunk, dtype=np.int64).reshape(-1), num_micro * self.world_size)
        return [part.tolist() for part in parts[self.rank :: self.world_size]]
