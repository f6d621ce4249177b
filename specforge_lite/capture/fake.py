"""A target engine without a model: for tests, for load and fault runs of the trainer, and for trying a config.

Hidden states are a pure function of token ids and layer, and depend on the whole prefix:
token embedding e_t from two seeded tables; m_t = e_t + (e_0 + .. + e_t) / sqrt(t + 1); layer i = tanh(m_t + bias_i).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from specforge_lite.capture.base import TargetInfo
from specforge_lite.capture.hf import check_sample
from specforge_lite.core.errors import CaptureError, EngineError
from specforge_lite.types import CapturedStates, TokenizedSample

TABLE_ROWS = 1021  # prime; two tables tell 1021 * 1021 token ids apart whatever the vocabulary

FaultKind = Literal["wrong_width", "wrong_ids", "too_short", "nan", "refused", "gone", "bug", "hang"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a sample, and how many times (None: always).

    wrong_width, wrong_ids, too_short, nan: states that are not the sample's. refused: CaptureError. gone: EngineError.
    bug: RuntimeError. hang: never returns until `close`.
    """

    kind: FaultKind
    times: int | None = None


class FakeEngine:
    """Deterministic states from token ids; implements `TargetEngine`.

    latency_s: each `capture` sleeps that long. faults: sample id -> what goes wrong with it.
    num_calls, num_samples: how often it was asked, failed calls included.
    """

    def __init__(
        self,
        info: TargetInfo,
        latency_s: float = 0.0,
        faults: Mapping[str, Fault] | None = None,
        max_concurrency: int = 4,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        last_is_normed: bool = True,
    ) -> None:
        self.info = info
        self.latency_s = latency_s
        self.max_concurrency = max_concurrency
        self.dtype = dtype
        self.last_is_normed = last_is_normed
        self.num_calls = 0
        self.num_samples = 0
        self._faults = dict(faults or {})
        self._lock = threading.Lock()
        self._closed = threading.Event()
        generator = torch.Generator().manual_seed(seed)
        self._tables_2RH = torch.randn(2, TABLE_ROWS, info.hidden_size, generator=generator)
        self._bias_NH = torch.randn(info.num_layers, info.hidden_size, generator=generator)

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """Return the states of `samples`, in their order, on the CPU, or do what `faults` says."""
        with self._lock:
            self.num_calls += 1
            self.num_samples += len(samples)
        if self._closed.is_set():
            raise EngineError("fake: the engine is closed")
        if self.latency_s:
            self._closed.wait(self.latency_s)
        return [self._spoil(sample, self._states(sample)) for sample in samples]

    def close(self) -> None:
        """Wake whatever hangs; later captures raise EngineError."""
        self._closed.set()

    def _states(self, sample: TokenizedSample) -> CapturedStates:
        check_sample(sample, self.info)
        ids_L = sample.input_ids_L.cpu()
        layers = [*self.info.aux_layer_ids, self.info.num_layers - 1]
        hidden_LNH = torch.tanh(self._mix(ids_L)[:, None] + self._bias_NH[layers])
        last_LH = hidden_LNH[:, -1]
        if self.last_is_normed:
            last_LH = last_LH * last_LH.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return CapturedStates(
            sample_id=sample.sample_id,
            input_ids_L=sample.input_ids_L,
            aux_LAH=hidden_LNH[:, :-1].contiguous().to(self.dtype),
            last_LH=last_LH.contiguous().to(self.dtype),
            aux_layer_ids=self.info.aux_layer_ids,
            last_is_normed=self.last_is_normed,
        )

    def _mix(self, ids_L: Tensor) -> Tensor:
        """[L] int64 -> [L, H]: the token itself plus a scaled running sum, so that each state knows its prefix."""
        low_L, high_L = ids_L % TABLE_ROWS, ids_L // TABLE_ROWS % TABLE_ROWS
        embed_LH = self._tables_2RH[0, low_L] + self._tables_2RH[1, high_L]
        steps_L1 = torch.arange(1, len(ids_L) + 1)[:, None]
        return embed_LH + embed_LH.cumsum(0) / steps_L1.sqrt()

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
