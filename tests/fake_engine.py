"""`FakeEngine` with latency and faults on request, and counts of what it was asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from specforge_lite.capture import fake
from specforge_lite.capture.base import TargetInfo
from specforge_lite.core.errors import CaptureError, EngineError
from specforge_lite.types import CapturedStates, TokenizedSample

FaultKind = Literal["wrong_width", "wrong_ids", "too_short", "nan", "refused", "gone", "bug", "hang"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a sample, and how many times (None: always).

    wrong_width, wrong_ids, too_short, nan: states that are not the sample's. refused: CaptureError. gone: EngineError.
    bug: RuntimeError. hang: never returns until `close`.
    """

    kind: FaultKind
    times: int | None = None


class FakeEngine(fake.FakeEngine):
    """latency_s: each `capture` sleeps that long. faults: sample id -> what goes wrong with it.
    num_calls, num_samples: how often it was asked, failed calls included.
    """

    def __init__(
        self,
        info: TargetInfo,
        latency_s: float = 0.0,
        faults: Mapping[str, Fault] | None = None,
        max_concurrency: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(info, **options)
        self.latency_s = latency_s
        self.max_concurrency = max_concurrency
        self.num_calls = 0
        self.num_samples = 0
        self._faults = dict(faults or {})
        self._lock = threading.Lock()

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """The states of `samples`, or what `faults` asks for."""
        with self._lock:
            self.num_calls += 1
            self.num_samples += len(samples)
        if self.latency_s and not self._closed.is_set():
            self._closed.wait(self.latency_s)
        states = super().capture(samples)
        return [self._spoil(*pair) for pair in zip(samples, states)]

    def _spoil(self, sample: TokenizedSample, states: CapturedStates) -> CapturedStates:
        kind = self._take_fault(sample.sample_id)
        if kind == "refused":
            raise CaptureError(f"fake: sample {sample.sample_id} was refused, as asked")
        if kind == "gone":
            raise EngineError("fake: the engine is gone, as asked")
        if kind == "bug":
            raise RuntimeError(f"fake: a bug at sample {sample.sample_id}, as asked")
        if kind == "hang":
            while not self._closed.is_set():
                time.sleep(0.01)
            raise EngineError("fake: closed while hanging")
        if kind == "wrong_width":
            return replace(states, aux_LAH=states.aux_LAH[..., :-1].contiguous())
        if kind == "wrong_ids":
            wrong_L = states.input_ids_L.clone()
            wrong_L[-1] = (wrong_L[-1] + 1) % self.info.vocab_size
            return replace(states, input_ids_L=wrong_L)
        if kind == "too_short":
            return replace(states, aux_LAH=states.aux_LAH[:-1], last_LH=states.last_LH[:-1])
        if kind == "nan":
            last_LH = states.last_LH.clone()
            last_LH[len(last_LH) // 2, 0] = float("nan")
            return replace(states, last_LH=last_LH)
        return states

    def _take_fault(self, sample_id: str) -> FaultKind | None:
        with self._lock:
            fault = self._faults.get(sample_id)
            if fault is None or fault.times == 0:
                return None
            if fault.times is not None:
                self._faults[sample_id] = replace(fault, times=fault.times - 1)
            return fault.kind
