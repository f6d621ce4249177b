"""From dataset indices to batches on the device: plan -> samples -> captured states (ahead of time) -> DraftBatch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import record_function

from specforge_lite.capture.base import TargetEngine
from specforge_lite.capture.prefetch import CLOSE_SECONDS, Prefetcher, SkipBudget
from specforge_lite.data.sampler import PlannedStep
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import CapturedStates, DraftBatch, TokenizedSample, collate

if TYPE_CHECKING:
    from specforge_lite.data.follow import FollowPlan
    from specforge_lite.training.cuda_batches import CopyStream


@dataclass
class StepBatches:
    """The micro batches of one planned step, made when asked for. One may be idle (`BatchMaker.idle_batch`)."""

    batches: Iterator[DraftBatch]
    planned: PlannedStep


class Dataloader:
    """Iterate over the steps of this rank. Captures run ahead; what an engine raises is raised here, in order.

    num_skipped: samples of this rank left out of the steps handed out so far. wait_seconds: time spent waiting.
    """

    def __init__(
        self,
        steps: Iterator[PlannedStep | None],
        dataset: Sequence[TokenizedSample] | FollowPlan,
        engine: TargetEngine,
        to_batch: Callable[[Sequence[TokenizedSample], Sequence[CapturedStates]], DraftBatch],
        skips: SkipBudget,
        samples_per_batch: float = 1,
    ) -> None:
        """steps: None where the rows of the next one have not come. samples_per_batch: of a micro batch on average, to
        keep the engine's request slots full."""
        self._steps, self._dataset, self._to_batch = steps, dataset, to_batch
        self._planned: deque[PlannedStep] = deque()
        self.num_skipped = 0
        depth = max(2, -(-engine.max_concurrency // max(1, int(samples_per_batch))))
        if torch.cuda.is_available():
            from specforge_lite.training.cuda_batches import PinningEngine

            engine = PinningEngine(engine)
        self._prefetcher = Prefetcher(engine, self._micro_batches(), depth, skips)

    @property
    def wait_seconds(self) -> float:
        return self._prefetcher.wait_seconds

    def __iter__(self) -> Dataloader:
        return self

    def __next__(self) -> StepBatches:
        first = next(self._prefetcher)  # plans its step on the way, if the prefetcher was not ahead already
        step = self._planned.popleft()
        return StepBatches(self._batches(first, step), step)

    def close(self, timeout_s: float = CLOSE_SECONDS) -> None:
        """Stop the captures that run ahead; wait so long for those that an engine is at."""
        self._prefetcher.close(timeout_s)

    def _micro_batches(self) -> Iterator[list[TokenizedSample] | None]:
        for step in self._steps:
            if step is None:
                yield None
                continue
            self._planned.append(step)
            for indices in step.micro_batches:
                yield [self._dataset[i] for i in indices]

    def _batches(
        self, first: tuple[list[TokenizedSample], list[CapturedStates]], step: PlannedStep
    ) -> Iterator[DraftBatch]:
        for number, indices in enumerate(step.micro_batches):
            samples, states = first if number == 0 else next(self._prefetcher)
            self.num_skipped += len(indices) - len(samples)
            batch = self._to_batch(samples, states)
            batch.epoch = step.epoch
            yield batch


class BatchMaker:
    """Captured states of a micro batch -> DraftBatch on the device, last state normed, in the compute dtype."""

    def __init__(self, target_head: TargetHead, num_aux_layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self._head, self._num_aux_layers = target_head, num_aux_layers
        self._device, self._dtype = device, dtype
        self._copies: CopyStream | None = None
        if device.type == "cuda":
            from specforge_lite.training.cuda_batches import CopyStream

            self._copies = CopyStream(device)

    def __call__(self, samples: Sequence[TokenizedSample], states: Sequence[CapturedStates]) -> DraftBatch:
        if not samples:
            return self.idle_batch()
        with record_function("copy to device"):
            if self._copies is None or any(s.aux_LAH.is_cuda or s.last_LH.is_cuda for s in states):
                return self._make(samples, states)
            return self._copies.run(lambda: self._make(samples, states))

    def _make(self, samples: Sequence[TokenizedSample], states: Sequence[CapturedStates]) -> DraftBatch:
        last = [state.last_LH.to(self._device, non_blocking=True) for state in states]
        aux = [state.aux_LAH.to(self._device, non_blocking=True) for state in states]
        normed = [x if state.last_is_normed else self._head.norm(x) for x, state in zip(last, states)]
        return collate(list(samples), normed, aux).to(self._device, self._dtype)

    def idle_batch(self) -> DraftBatch:
        """Two tokens with nothing to learn: keeps a rank without samples in step; its gradient is exactly zero."""
        hidden = self._head.embed_VH.shape[1]
        ids = torch.zeros(2, dtype=torch.int64)
        zeros = torch.zeros(2, (self._num_aux_layers + 1) * hidden)
        batch = DraftBatch(ids, ids.bool(), [0, 2], zeros[:, hidden:], zeros[:, :hidden], [])
        return batch.to(self._device, self._dtype)


def bad_documents(batch: DraftBatch) -> Tensor:
    """bool [S] on the device: documents with a NaN or an infinity in their hidden states. Does not wait for it."""
    finite_N = torch.isfinite(batch.aux_NG.sum(1, dtype=torch.float32))
    finite_N &= torch.isfinite(batch.last_NH.sum(1, dtype=torch.float32))
    lengths = torch.tensor(batch.doc_offsets).diff()
    doc_of_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(finite_N.device, non_blocking=True)
    bad_S = torch.zeros(len(lengths), device=finite_N.device)
    return bad_S.index_add_(0, doc_of_N, (~finite_N).float()) > 0
