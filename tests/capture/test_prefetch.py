"""The prefetcher against a deterministic engine: order, bound, overlap, errors at their place, budget, end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from specforge_lite.capture.base import TargetInfo
from specforge_lite.capture.prefetch import Prefetcher, SkipBudget
from specforge_lite.core.errors import CaptureError, ConfigError, EngineError
from specforge_lite.types import CapturedStates, TokenizedSample
from tests.fake_engine import FakeEngine, Fault

INFO = TargetInfo("fake", num_layers=5, hidden_size=8, vocab_size=97, max_length=32, aux_layer_ids=(0, 1, 3))


def sample(name: str, length: int = 4) -> TokenizedSample:
    ids = torch.arange(length) + sum(map(ord, name)) % 50
    return TokenizedSample(name, ids, torch.ones(length, dtype=torch.bool))


def batches(count: int, size: int = 2) -> list[list[TokenizedSample]]:
    return [[sample(f"{b}.{s}", 3 + (b + s) % 5) for s in range(size)] for b in range(count)]


class SlowEngine(FakeEngine):
    """Takes a different time for each batch and counts how many captures run at once."""

    running = 0
    most_running = 0
    lock = threading.Lock()

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        with self.lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(0.002 * (sum(map(ord, samples[0].sample_id)) % 7))
        try:
            return super().capture(samples)
        finally:
            with self.lock:
                self.running -= 1


def test_results_are_those_of_plain_capture_in_the_order_of_the_batches() -> None:
    given = batches(30)
    plain = FakeEngine(INFO)
    expected = [plain.capture(batch) for batch in given]
    engine = SlowEngine(INFO, max_concurrency=3)
    with Prefetcher(engine, iter(given), depth=5) as stream:
        got = list(stream)
    assert [[s.sample_id for s in samples] for samples, _ in got] == [[s.sample_id for s in b] for b in given]
    for (_, states), wanted in zip(got, expected, strict=True):
        for state, want in zip(states, wanted, strict=True):
            assert torch.equal(state.aux_LAH, want.aux_LAH)
            assert torch.equal(state.last_LH, want.last_LH)
    assert 2 <= engine.most_running <= 3


def test_never_pulls_further_ahead_than_depth() -> None:
    pulled: list[int] = []

    def source() -> Iterator[list[TokenizedSample]]:
        for index, batch in enumerate(batches(12)):
            pulled.append(index)
            yield batch

    with Prefetcher(FakeEngine(INFO), source(), depth=3) as stream:
        for taken in range(1, 13):
            next(stream)
            time.sleep(0.01)
            assert len(pulled) == min(12, taken + 3)


def test_capture_overlaps_with_the_consumer() -> None:
    engine = FakeEngine(INFO, latency_s=0.05, max_concurrency=2)
    with Prefetcher(engine, iter(batches(8)), depth=4) as stream:
        for _ in stream:
            time.sleep(0.05)
        waited = stream.wait_seconds
    assert waited < 0.05 * 4  # the first batch, and little after it; without overlap it is 8 * 0.05


def test_wait_seconds_counts_the_time_the_consumer_is_blocked() -> None:
    with Prefetcher(FakeEngine(INFO, latency_s=0.05, max_concurrency=1), iter(batches(4)), depth=1) as stream:
        list(stream)
        assert 0.15 < stream.wait_seconds < 0.6


def test_an_error_is_raised_at_its_batch_and_ends_the_stream() -> None:
    engine = FakeEngine(INFO, faults={"3.1": Fault("bug")})
    with Prefetcher(engine, iter(batches(8)), depth=6) as stream:
        for _ in range(3):
            next(stream)
        with pytest.raises(RuntimeError):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_an_engine_that_is_gone_ends_the_stream_whatever_the_budget() -> None:
    engine = FakeEngine(INFO, faults={"1.0": Fault("gone")})
    with Prefetcher(engine, iter(batches(4)), depth=2, skips=SkipBudget(1.0, num_samples=8)) as stream:
        next(stream)
        with pytest.raises(EngineError):
            next(stream)


@pytest.mark.parametrize("kind", ["wrong_width", "wrong_ids", "too_short", "refused"])
def test_a_reply_that_is_not_the_samples_is_never_handed_out(kind: str) -> None:
    engine = FakeEngine(INFO, faults={"2.1": Fault(kind)})
    with Prefetcher(engine, iter(batches(4)), depth=2, skips=SkipBudget(num_samples=8)) as stream:
        next(stream), next(stream)
        with pytest.raises(CaptureError, match=r"2\.1"):
            next(stream)


def test_too_long_samples_are_left_out_within_the_budget() -> None:
    given = batches(6)
    given[2][0] = sample("long", 33)
    given[4] = [sample("longer", 40)]
    skips = SkipBudget(fraction=0.2, num_samples=12)
    with Prefetcher(FakeEngine(INFO), iter(given), depth=2, skips=skips) as stream:
        kept = [[s.sample_id for s in samples] for samples, _ in stream]
    assert kept == [["0.0", "0.1"], ["1.0", "1.1"], ["2.1"], ["3.0", "3.1"], [], ["5.0", "5.1"]]
    assert skips.skipped == 2


def test_one_too_long_sample_too_many_says_what_to_do() -> None:
    given = [[sample("a"), sample("long", 33)], [sample("longer", 34)]]
    skips = SkipBudget(fraction=0.34, num_samples=3)
    with Prefetcher(FakeEngine(INFO), iter(given), depth=1, skips=skips) as stream:
        next(stream)
        with pytest.raises(CaptureError, match="longer: 34 tokens, the target accepts 32; 2 skipped, the budget is 1"):
            next(stream)


def test_a_sample_left_out_in_every_epoch_counts_once() -> None:
    epoch = [[sample("a"), sample("long", 33)], [sample("bad")]]
    engine = FakeEngine(INFO, faults={"bad": Fault("refused", times=3)})
    skips = SkipBudget(fraction=0.7, num_samples=3)
    with Prefetcher(engine, iter(epoch * 3), depth=2, skips=skips) as stream:
        assert [[s.sample_id for s in samples] for samples, _ in stream] == [["a"], []] * 3
    assert skips.skipped_ids == {"long", "bad"}


def test_lengths_are_checked_before_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    SkipBudget(num_samples=1000).check_lengths([32] * 1000, 32, "data")
    assert capsys.readouterr().err == ""
    SkipBudget(num_samples=1000).check_lengths([32] * 999 + [50], 32, "data")
    said = "data: 1 of 1000 samples are longer than the 32 tokens that the target accepts (longest 50)"
    assert f"{said}; they are left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"2 of 1000 .* \(longest 51\); at most 1 may be left out .*0\.10%"):
        SkipBudget(num_samples=1000).check_lengths([32] * 998 + [50, 51], 32, "data")


def test_default_budget_is_a_tenth_of_a_percent() -> None:
    assert SkipBudget(num_samples=999).allowed == 0
    assert SkipBudget(num_samples=5000).allowed == 5


def test_close_drops_what_is_queued_and_ends_the_threads() -> None:
    engine = FakeEngine(INFO, latency_s=0.02, max_concurrency=2)
    stream = Prefetcher(engine, iter(batches(50)), depth=20)
    next(stream)
    stream.close()
    calls = engine.num_calls
    time.sleep(0.1)
    assert engine.num_calls == calls < 10
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch-")]
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_close_does_not_wait_for_a_capture_that_hangs() -> None:
    engine = FakeEngine(INFO, faults={"0.0": Fault("hang")})
    stream = Prefetcher(engine, iter(batches(3)), depth=2)
    stream._top_up()
    start = time.monotonic()
    stream.close(timeout_s=0.2)
    assert time.monotonic() - start < 2
    engine.close()


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth 0"):
        Prefetcher(FakeEngine(INFO), iter([]), depth=0)
