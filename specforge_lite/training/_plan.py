"""Epoch order of samples until the sampler of `data` takes over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from specforge_lite.training.feed import PlannedStep


class BatchPlan:
    def __init__(self, n: int, batch_size: int, accumulation: int, seed: int, rank: int, world: int) -> None:
        self.n, self.bs, self.acc, self.seed, self.rank, self.world = n, batch_size, accumulation, seed, rank, world
        self.steps_per_epoch = -(-n // (batch_size * accumulation * world))
        self.epoch, self.consumed = 0, 0

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.consumed = state["epoch"], state["consumed"]

    def steps(self) -> Iterator[PlannedStep]:
        epoch, consumed = self.epoch, self.consumed
        per = self.bs * self.acc * self.world
        while True:
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            while consumed < self.n:
                chunk = order[consumed : consumed + per]
                own = [
                    chunk[(a * self.world + self.rank) * self.bs : (a * self.world + self.rank + 1) * self.bs]
                    for a in range(self.acc)
                ]
                consumed += per
                state = (
                    {"epoch": epoch, "consumed": consumed} if consumed < self.n else {"epoch": epoch + 1, "consumed": 0}
                )
                yield PlannedStep(own, state)
            epoch, consumed = epoch + 1, 0
