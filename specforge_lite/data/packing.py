"""`--max-tokens-per-batch`: samples put into bins of at most so many tokens, and bins shared out over ranks.

Bins are made of windows of the epoch's order, and shuffled, so that they mix samples as it does; those of a global step
are shared out by supervised tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np

from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.data.sampler import BatchPlan

PACKING_WINDOW = 4096


@dataclass(eq=False)
class PackedPlan(BatchPlan):
    """Steps of packed bins: a micro batch is one bin, whatever `batch_size` says."""

    _: KW_ONLY
    max_tokens_per_batch: int
    _bins: tuple[int, list[list[int]]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batch_size, longest = 1, int(self.lengths.max())
        if self.max_tokens_per_batch < longest:
            raise ConfigError(
                f"max_tokens_per_batch {self.max_tokens_per_batch} < {longest} tokens of the longest sample"
            )

    def bins(self, epoch: int) -> list[list[int]]:
        """The bins of an epoch in training order, as lists of sample indices."""
        if self._bins is None or self._bins[0] != epoch:
            shuffler = np.random.Generator(np.random.PCG64([self.seed, epoch, 1])) if self.shuffle else None
            order, bins = self.order(epoch), []
            for start in range(0, len(order), PACKING_WINDOW):
                window = order[start : start + PACKING_WINDOW]
                packed = pack(self.lengths[window].tolist(), self.max_tokens_per_batch)
                turns = range(len(packed)) if shuffler is None else shuffler.permutation(len(packed))
                bins += [window[packed[turn]].tolist() for turn in turns]
            self._bins = (epoch, bins)
        return self._bins[1]

    def _groups_after(self, epoch: int, consumed: int) -> list[list[int]]:
        groups = self.bins(epoch)
        ends = np.cumsum([0, *map(len, groups)])
        at = int(np.searchsorted(ends, consumed))
        if ends[at] != consumed:
            raise CheckpointError(f"{consumed} samples consumed is inside a packed batch; the order has changed")
        return groups[at:]

    def _num_groups(self, epoch: int) -> int:
        return len(self.bins(epoch))

    def _share(self, chunk: list[list[int]]) -> list[list[int]]:
        weights = [int(self.supervised_counts[group].sum()) for group in chunk]
        own = balance(weights, self.world_size)[self.rank]
        return [chunk[item] for item in own] + [[]] * (-(-len(chunk) // self.world_size) - len(own))


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put every item into one of few bins of at most `budget` in all; returns the item numbers of each bin.

    Best fit, longest first: at most 11/9 of the optimum plus a bin (Johnson 1974), O(n log n) comparisons. Items of a
    bin ascend. Raises ConfigError for an item longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin number), ascending
    for item in order:
        length = int(lengths[item])
        if length > budget:
            raise ConfigError(f"max_tokens_per_batch {budget} < {length} tokens of the longest sample")
        at = bisect_left(room, (length, -1))
        if at < len(room):
            free, number = room.pop(at)
        else:
            free, number = budget, len(bins)
            bins.append([])
        bins[number].append(item)
        if free > length:
            insort(room, (free - length, number))
    return [sorted(items) for items in bins]


def balance(weights: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Share items out so that ranks get equally many (give or take one) and nearly equal sums of weight.

    Heaviest first, each to the rank with the smallest sum that still has room. Returns the item numbers of each rank,
    heaviest first, so that the i-th items of all ranks are of a kind.
    """
    most, extra = divmod(len(weights), num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [0] * num_ranks
    for item in sorted(range(len(weights)), key=lambda item: (-weights[item], item)):
        # `extra` ranks get one item more than the others
        room = most + (sum(len(share) > most for share in shares) < extra)
        rank = min((rank for rank in range(num_ranks) if len(shares[rank]) < room), key=sums.__getitem__)
        shares[rank].append(item)
        sums[rank] += weights[item]
    return shares
