"""How many ranks to start on this host."""

from __future__ import annotations

import os

from specforge_lite.core.devices import num_gpus
from specforge_lite.core.errors import ConfigError

CPU_RANKS = 2


def num_local_ranks(requested: int | None = None) -> int:
    """Trainer processes to start on this host: one per visible GPU, else at most `CPU_RANKS` of its cores.

    Raises ConfigError for a `requested` number above the visible GPUs: a GPU holds one rank.
    """
    count = num_gpus()
    if requested is None:
        return count or min(CPU_RANKS, len(os.sched_getaffinity(0)))
    if count and requested > count:
        raise ConfigError(f"{requested} processes: this host has {count} visible GPU(s); start one process per GPU")
    return requested
