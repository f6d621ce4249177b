"""Hidden states on their way from the host to a GPU that is computing: page-locked memory, and a stream for copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from specforge_lite.capture.base import TargetEngine
from specforge_lite.types import CapturedStates, DraftBatch, TokenizedSample


class PinningEngine:
    """An engine whose states are copied to pinned memory by the thread that captures, not by the one that trains: from
    there they travel to the GPU while it computes."""

    def __init__(self, engine: TargetEngine) -> None:
        self._engine = engine
        self.info, self.max_concurrency, self.close = engine.info, engine.max_concurrency, engine.close

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        pin = lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory()  # noqa: E731
        states = self._engine.capture(samples)
        return [replace(state, aux_LAH=pin(state.aux_LAH), last_LH=pin(state.last_LH)) for state in states]


class CopyStream:
    """Batches are made on a stream of their own: the loop asks for the next one while the device is still busy with
    this one, so the copy and the step run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)

    def run(self, make: Callable[[], DraftBatch]) -> DraftBatch:
        """The batch that `make` copies to the device."""
        main = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            batch = make()
        main.wait_stream(self._copies)
        for tensor in (batch.input_ids_N, batch.loss_mask_N, batch.aux_NG, batch.last_NH):
            tensor.record_stream(main)  # so that its memory is not given to the next copy too early
        return batch
