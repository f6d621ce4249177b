"""A target engine without a model (`--target-backend fake`): for trying a config, and for load and kill runs.

Hidden states are a pure function of token ids and layer, and depend on the whole prefix:
token embedding e_t from two seeded tables; m_t = e_t + (e_0 + .. + e_t) / sqrt(t + 1); layer i = tanh(m_t + bias_i).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from specforge_lite.capture.base import TargetInfo, check_sample
from specforge_lite.core.errors import EngineError
from specforge_lite.types import CapturedStates, TokenizedSample

TABLE_ROWS = 1021  # prime; two tables tell 1021 * 1021 token ids apart whatever the vocabulary


class FakeEngine:
    """Deterministic states from token ids, on the CPU; implements `TargetEngine`."""

    max_concurrency = 4

    def __init__(
        self, info: TargetInfo, seed: int = 0, dtype: torch.dtype = torch.float32, last_is_normed: bool = True
    ) -> None:
        self.info = info
        self.dtype = dtype
        self.last_is_normed = last_is_normed
        self._closed = threading.Event()
        generator = torch.Generator().manual_seed(seed)
        self._tables_2RH = torch.randn(2, TABLE_ROWS, info.hidden_size, generator=generator)
        self._bias_NH = torch.randn(info.num_layers, info.hidden_size, generator=generator)

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """Return the states of `samples`, in their order."""
        if self._closed.is_set():
            raise EngineError("fake: the engine is closed")
        return [self._states(sample) for sample in samples]

    def close(self) -> None:
        """Later captures raise EngineError."""
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
