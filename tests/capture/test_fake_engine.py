"""The fake engine: deterministic, prefix-dependent, and wrong only where asked."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from specforge_lite.capture.base import TargetInfo, check_capture
from specforge_lite.core.errors import CaptureError, EngineError
from specforge_lite.types import TokenizedSample
from tests.fake_engine import FakeEngine, Fault

INFO = TargetInfo("fake", num_layers=6, hidden_size=16, vocab_size=5000, max_length=40, aux_layer_ids=(1, 2, 4))


def sample(ids: list[int], name: str = "s") -> TokenizedSample:
    return TokenizedSample(name, torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool))


def test_pure_function_of_the_prefix() -> None:
    (first,) = FakeEngine(INFO).capture([sample([5, 6, 7, 8])])
    check_capture(sample([5, 6, 7, 8]), first, INFO)
    again = FakeEngine(INFO).capture([sample([1, 2]), sample([5, 6, 7, 8])])[1]
    assert torch.equal(first.aux_LAH, again.aux_LAH)
    assert torch.equal(first.last_LH, again.last_LH)
    (longer,) = FakeEngine(INFO).capture([sample([5, 6, 7, 8, 9])])
    assert torch.equal(first.aux_LAH, longer.aux_LAH[:4])  # causal
    (other,) = FakeEngine(INFO).capture([sample([4, 6, 7, 8])])
    assert (first.last_LH != other.last_LH).any(dim=1).all()  # every later state knows token 0
    assert not torch.equal(first.aux_LAH[:, 0], first.aux_LAH[:, 1])
    (far,) = FakeEngine(INFO).capture([sample([5 + 1021, 6, 7, 8])])
    assert not torch.equal(far.last_LH, first.last_LH)
    assert not torch.equal(FakeEngine(INFO, seed=1).capture([sample([5])])[0].last_LH, first.last_LH[:1])


@pytest.mark.parametrize("kind", ["wrong_width", "wrong_ids", "too_short"])
def test_spoilt_states_are_caught_at_the_boundary(kind: str) -> None:
    engine = FakeEngine(INFO, faults={"bad": Fault(kind, times=1)})  # type: ignore[arg-type]
    good, bad = engine.capture([sample([1, 2, 3], "good"), sample([1, 2, 3], "bad")])
    check_capture(sample([1, 2, 3], "good"), good, INFO)
    with pytest.raises(CaptureError, match="bad"):
        check_capture(sample([1, 2, 3], "bad"), bad, INFO)
    (healed,) = engine.capture([sample([1, 2, 3], "bad")])
    check_capture(sample([1, 2, 3], "bad"), healed, INFO)


def test_other_faults() -> None:
    faults = {"nan": Fault("nan"), "no": Fault("refused"), "gone": Fault("gone"), "bug": Fault("bug")}
    engine = FakeEngine(INFO, faults=faults)
    assert engine.capture([sample([1, 2], "nan")])[0].last_LH.isnan().any()
    for name, error in (("no", CaptureError), ("gone", EngineError), ("bug", RuntimeError)):
        with pytest.raises(error, match="as asked"):
            engine.capture([sample([1, 2], name)])
    with pytest.raises(CaptureError, match="sample long has 41 tokens, the target accepts 1 to 40"):
        engine.capture([sample([1] * 41, "long")])
    assert engine.num_calls == engine.num_samples == 5


def test_latency_and_close() -> None:
    engine = FakeEngine(INFO, latency_s=0.05, faults={"h": Fault("hang")})
    start = time.monotonic()
    engine.capture([sample([1])])
    assert time.monotonic() - start >= 0.05
    threading.Timer(0.1, engine.close).start()
    with pytest.raises(EngineError, match="hanging"):
        engine.capture([sample([1], "h")])
    with pytest.raises(EngineError, match="closed"):
        engine.capture([sample([1])])
