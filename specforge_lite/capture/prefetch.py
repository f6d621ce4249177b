"""Capture of the next batches while this one trains: in order, bounded, and the same whatever the timing.

batches  b0 b1 b2 b3 b4 ...          pulled in the consumer's thread, one for each batch handed out
workers     [b1][b2][b3]             at most `depth` in flight, at most `engine.max_concurrency` running
consumer  b0                         receives them in the order they were pulled
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain

from torch.profiler import record_function

from specforge_lite.capture.base import TargetEngine, check_capture
from specforge_lite.core.errors import CaptureError, ConfigError
from specforge_lite.core.log import warn
from specforge_lite.types import CapturedStates, TokenizedSample

DEFAULT_SKIP_FRACTION = 0.001
CLOSE_SECONDS = 30.0
LONGER_CONTEXT = "Lower --max-length or give the target a longer context"

Captured = tuple[list[TokenizedSample], list[CapturedStates]]
Refusal = tuple[str, CaptureError]  # sample id and why
Answer = tuple[list[TokenizedSample], list[CapturedStates], list[Refusal]]  # what was captured, what was refused


@dataclass
class SkipBudget:
    """How many samples may be left out, too long for the target or refused by it: `fraction` of `num_samples`. A sample
    that comes again in a later epoch counts once."""

    fraction: float = DEFAULT_SKIP_FRACTION
    num_samples: int = 0
    skipped_ids: set[str] = field(default_factory=set)

    @property
    def skipped(self) -> int:
        return len(self.skipped_ids)

    @property
    def allowed(self) -> int:
        return math.floor(self.fraction * self.num_samples)

    def admit(self, samples: list[TokenizedSample], max_length: int) -> list[TokenizedSample]:
        """Return the samples of at most `max_length` tokens; count and report the others.

        Raises CaptureError once more samples were refused than the budget allows.
        """
        for sample in samples:
            if len(sample) > max_length:
                place = f"sample {sample.sample_id}: {len(sample)} tokens, the target accepts {max_length}"
                self.skip(sample.sample_id, place, LONGER_CONTEXT)
        return [sample for sample in samples if len(sample) <= max_length]

    def skip(self, sample_id: str, place: str, advice: str) -> None:
        """Count and report one sample that is left out; raise CaptureError if it is one too many."""
        if sample_id in self.skipped_ids:
            return
        self.skipped_ids.add(sample_id)
        if self.skipped > self.allowed:
            count = f"{self.skipped} skipped, the budget is {self.allowed} ({self.fraction:.2%})"
            raise CaptureError(f"{place}; {count}. {advice}")
        warn(f"{place}; skipped ({self.skipped} of at most {self.allowed})")

    def check_lengths(self, lengths: Sequence[int], max_length: int, what: str) -> None:
        """Before a run: warn of samples that are too long for the target, all of which will be left out.

        Raises ConfigError when they are more than the budget, so that no run ends in its middle over what was known
        at its start.
        """
        too_long = [length for length in lengths if length > max_length]
        if not too_long:
            return
        share = f"{what}: {len(too_long)} of {len(lengths)} samples"
        found = f"{share} are longer than the {max_length} tokens that the target accepts (longest {max(too_long)})"
        if len(too_long) > self.allowed:
            raise ConfigError(
                f"{found}; at most {self.allowed} may be left out (skip_budget {self.fraction:.2%}). {LONGER_CONTEXT}"
            )
        warn(f"{found}; they are left out")


class Prefetcher(Iterator[Captured]):
    """Iterate over `(samples, states)` of `batches`, in order, with up to `depth` batches captured ahead.

    A sample longer than `engine.info.max_length`, or one whose capture raises CaptureError (also when it is asked for
    alone), is left out of its batch (which may become empty, so that ranks stay in step) as long as `skips` allows.
    Every reply is checked with `check_capture`. Anything else that a worker raises is raised here, at that batch's
    place. Use as a context manager, or call `close()`. wait_seconds: time the one consumer was blocked so far.
    """

    def __init__(
        self,
        engine: TargetEngine,
        batches: Iterator[list[TokenizedSample] | None],
        depth: int,
        skips: SkipBudget | None = None,
    ) -> None:
        """batches: None where the next one is not there yet; it is asked for again by the next call."""
        if depth < 1:
            raise ValueError(f"prefetch depth {depth}: expected at least 1")
        self.wait_seconds = 0.0
        self.skips = skips or SkipBudget()
        self._engine = engine
        self._batches = iter(batches)
        self._depth = depth
        self._in_order: deque[Future[Answer]] = deque()
        self._work: queue.SimpleQueue[tuple[list[TokenizedSample], Future[Answer]] | None] = queue.SimpleQueue()
        self._closed = False
        # Daemon threads: a capture that hangs on a dead server must not keep the process from ending.
        self._workers = [
            threading.Thread(target=self._run, name=f"prefetch-{i}", daemon=True)
            for i in range(max(1, min(depth, engine.max_concurrency)))
        ]
        for worker in self._workers:
            worker.start()

    def __next__(self) -> Captured:
        if self._closed:
            raise StopIteration
        try:
            self._top_up()
            if not self._in_order:
                raise StopIteration
            future = self._in_order.popleft()
            self._top_up()  # the place just freed is taken before the consumer goes off to train
            start = time.perf_counter()
            try:
                samples, states, refusals = future.result()
            finally:
                self.wait_seconds += time.perf_counter() - start
            for sample_id, refusal in refusals:  # counted here, in order, for the same reason as in `_top_up`
                self.skips.skip(sample_id, str(refusal), "Every such sample is named above; see the engine's log")
            return samples, states
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout_s: float = CLOSE_SECONDS) -> None:
        """Drop what is queued and wait up to `timeout_s` for captures that are running; may be called twice."""
        if self._closed:
            return
        self._closed = True
        for future in self._in_order:
            future.cancel()
        self._in_order.clear()
        for _ in self._workers:
            self._work.put(None)
        deadline = time.monotonic() + timeout_s
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join(max(0.0, deadline - time.monotonic()))

    def _top_up(self) -> None:
        while len(self._in_order) < self._depth:
            try:
                samples = next(self._batches)
            except StopIteration:
                return
            if samples is None:
                return
            future: Future[Answer] = Future()
            self._in_order.append(future)
            try:  # counted here, in order, so that the batch at which the budget ends does not depend on timing
                self._work.put((self.skips.admit(samples, self._engine.info.max_length), future))
            except CaptureError as error:
                future.set_exception(error)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            samples, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._answer(samples))
            except BaseException as error:  # handed to the consumer, which raises it at this batch's place
                future.set_exception(error)

    def _answer(self, samples: list[TokenizedSample]) -> Answer:
        """Capture a batch; where the engine refuses it, find out sample by sample which of it."""
        try:
            return samples, self._capture(samples), []
        except CaptureError as error:
            if len(samples) == 1:
                return [], [], [(samples[0].sample_id, error)]
        answers = zip(*(self._answer([sample]) for sample in samples))
        captured, states, refusals = (list(chain.from_iterable(part)) for part in answers)
        return captured, states, refusals

    def _capture(self, samples: list[TokenizedSample]) -> list[CapturedStates]:
        with record_function("capture"):  # a name in the trace of --profile-start-step
            states = self._engine.capture(samples) if samples else []
        if len(states) != len(samples):
            raise CaptureError(f"{self._engine.info.engine}: asked for {len(samples)} samples, got {len(states)}")
        for sample, state in zip(samples, states, strict=True):
            check_capture(sample, state, self._engine.info)
        return states
