"""`--max-tokens-per-batch`: samples put into bins of at most so many tokens, and bins shared out over ranks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from specforge_lite.core.errors import ConfigError

PACKING_WINDOW = 4096


def packed_bins(
    order: np.ndarray, lengths: np.ndarray, budget: int, shuffler: np.random.Generator | None
) -> list[list[int]]:
    """The bins of an epoch in training order, as lists of sample indices. order: of the epoch, cut into windows."""
    bins: list[list[int]] = []
    for start in range(0, len(order), PACKING_WINDOW):
        window = order[start : start + PACKING_WINDOW]
        packed = pack(lengths[window].tolist(), budget)
        turns = range(len(packed)) if shuffler is None else shuffler.permutation(len(packed))
        bins += [window[packed[turn]].tolist() for turn in turns]
    return bins


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
