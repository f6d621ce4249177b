"""The order of samples: every one once per epoch, on any number of ranks, from any point on; and packing."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.data.packing import balance, pack
from specforge_lite.data.sampler import BatchPlan, PlannedStep, plan_steps


def ranks(world_size: int, lengths: Any, **options: Any) -> list[BatchPlan]:
    return [plan_steps(lengths, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def global_steps(plans: list[BatchPlan], count: int) -> list[list[PlannedStep]]:
    """The next `count` steps; each a list over ranks."""
    return list(zip(*(list(itertools.islice(plan.steps(), count)) for plan in plans)))  # type: ignore[arg-type]


def samples_of(steps: Any) -> list[int]:
    return [i for by_rank in steps for step in by_rank for batch in step.micro_batches for i in batch]


def epoch_steps(plans: list[BatchPlan], epoch: int = 0) -> list[list[PlannedStep]]:
    return global_steps(plans, plans[0].num_steps(epoch))


# ------------------------------------------------------------------------------------------------------------- packing


def test_pack_by_hand() -> None:
    # best fit, longest first: 7 | 5 | 4 with 5? no, 4+5 = 9 | 3 with 7 = 10 | 1 with the 4+5
    assert pack([5, 3, 7, 1, 4], 10) == [[1, 2], [0, 3, 4]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_balance_by_hand() -> None:
    assert balance([9, 1, 5, 5], 2) == [[0, 1], [2, 3]]
    assert balance([3, 2, 1], 2) == [[0], [1, 2]]
    assert balance([1], 3) == [[0], [], []]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_pack_any(lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in items) for items in bins]
    assert all(0 < total <= budget for total in sums)
    assert sum(a + b <= budget for a, b in itertools.combinations(sums, 2)) == 0  # no two bins could have been one


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=24), st.integers(1, 6))
def test_balance_any(weights: list[int], num_ranks: int) -> None:
    shares = balance(weights, num_ranks)
    assert sorted(item for share in shares for item in share) == list(range(len(weights)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share in shares:
        assert [weights[i] for i in share] == sorted((weights[i] for i in share), reverse=True)
    if len(weights) == 2 * num_ranks > 2:  # never worse than dealing out in order by more than the largest item
        sums = [sum(weights[i] for i in share) for share in shares]
        assert max(sums) - min(sums) <= max(weights)


def test_an_item_over_the_budget() -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_batch 4 < 5 tokens of the longest sample"):
        pack([1, 5], 4)


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("packed", [None, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_sample_once_per_epoch(packed: int | None, world_size: int, accumulation: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 20, 53)
    plans = ranks(
        world_size, lengths, batch_size=2, accumulation_steps=accumulation, max_tokens_per_batch=packed, seed=5
    )
    orders = []
    for epoch in range(3):
        steps = epoch_steps(plans, epoch)
        assert Counter(samples_of(steps)) == Counter(range(53))
        assert steps[-1][0].state_after["epoch"] == epoch + 1
        assert steps[-1][0].state_after["consumed"] == 0
        orders.append(samples_of(steps))
    assert orders[0] != orders[1] != orders[2]
    again = ranks(
        world_size, lengths, batch_size=2, accumulation_steps=accumulation, max_tokens_per_batch=packed, seed=5
    )
    assert samples_of(epoch_steps(again)) == orders[0]


@pytest.mark.parametrize("packed", [None, 30])
def test_ranks_agree_on_the_step(packed: int | None) -> None:
    """As many micro batches everywhere, the same state after, sizes that differ by one at most."""
    lengths = np.random.default_rng(1).integers(3, 20, 41)
    plans = ranks(3, lengths, batch_size=4, accumulation_steps=2, max_tokens_per_batch=packed)
    for by_rank in epoch_steps(plans):
        assert len({len(step.micro_batches) for step in by_rank}) == 1
        assert by_rank[0].state_after == by_rank[1].state_after == by_rank[2].state_after
        if packed is None:
            sizes = [len(batch) for step in by_rank for batch in step.micro_batches]
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= 4


def test_plain_order_without_shuffling() -> None:
    plans = ranks(2, [1] * 7, batch_size=1, accumulation_steps=2, shuffle=False)
    steps = epoch_steps(plans)
    assert [[step.micro_batches for step in by_rank] for by_rank in steps] == [
        [[[0], [2]], [[1], [3]]],
        [[[4], [6]], [[5], []]],
    ]
    assert [by_rank[0].num_tokens for by_rank in steps] == [2, 2]


# -------------------------------------------------------------------------------------------------------------- resume


@settings(max_examples=40, deadline=None)
@given(
    packed=st.sampled_from([None, 40]),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    stop=st.integers(1, 9),
)
def test_resume_on_another_world_size(
    packed: int | None, before: int, after: int, accumulation: int, stop: int
) -> None:
    """Whatever was done is not done again, and what was not is: once per epoch each."""
    lengths = np.random.default_rng(2).integers(3, 20, 60)
    first = ranks(before, lengths, accumulation_steps=accumulation, max_tokens_per_batch=packed)
    done = global_steps(first, stop)
    state = done[-1][0].state_after
    second = ranks(after, lengths, accumulation_steps=2, max_tokens_per_batch=packed)
    for plan in second:
        plan.load_state_dict(state)
        assert plan.state_dict() == state
    epoch = state["epoch"]
    rest: list[Any] = []
    while not rest or rest[-1][0].state_after["epoch"] == epoch:
        rest = global_steps(second, len(rest) + 1)
        for plan in second:
            plan.load_state_dict(state)
    first_epoch = [by_rank for by_rank in done if by_rank[0].state_after["epoch"] <= epoch]
    seen = Counter(samples_of(first_epoch)) + Counter(samples_of(rest))
    assert seen == Counter(dict.fromkeys(range(60), epoch + 1))


def test_resumed_steps_are_the_same_on_the_same_world_size() -> None:
    lengths = np.random.default_rng(3).integers(3, 20, 50)
    for packed in (None, 32):
        whole = list(itertools.islice(plan_steps(lengths, max_tokens_per_batch=packed).steps(), 120))
        for at in (0, 7, 49, 80):
            plan = plan_steps(lengths, max_tokens_per_batch=packed)
            plan.load_state_dict(whole[at].state_after)
            assert list(itertools.islice(plan.steps(), 20)) == whole[at + 1 : at + 21]


def test_a_state_of_another_order_is_refused() -> None:
    state = plan_steps([5] * 10, seed=1).state_dict()
    for other, name in (
        (plan_steps([5] * 11, seed=1), "num_samples 10, this run has 11"),
        (plan_steps([5] * 10, seed=2), "seed 1, this run has 2"),
        (plan_steps([5] * 10, seed=1, max_tokens_per_batch=10), "max_tokens_per_batch None, this run has 10"),
    ):
        with pytest.raises(CheckpointError, match=name):
            other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="10 samples consumed of 10: impossible"):
        plan_steps([5] * 10, seed=1).load_state_dict({**state, "consumed": 10})
    packed = plan_steps([5] * 10, max_tokens_per_batch=10)
    with pytest.raises(CheckpointError, match="1 samples consumed is inside a packed batch"):
        packed.load_state_dict({**packed.state_dict(), "consumed": 1})


def test_impossible_sizes() -> None:
    with pytest.raises(ConfigError, match="no samples to train on"):
        plan_steps([])
    with pytest.raises(ConfigError, match="2 supervised counts for 1 samples"):
        plan_steps([1], [1, 2])
    with pytest.raises(ConfigError, match="max_tokens_per_batch 4 < 9 tokens"):
        plan_steps([3, 9], max_tokens_per_batch=4)


# ------------------------------------------------------------------------------------------------------ packed batches


def test_packed_batches_are_full_and_balanced() -> None:
    generator = np.random.default_rng(4)
    lengths = generator.integers(20, 500, 3000)
    supervised = (lengths * generator.uniform(0.1, 0.9, 3000)).astype(np.int64)
    plans = [
        plan_steps(lengths, supervised, accumulation_steps=4, rank=r, world_size=4, max_tokens_per_batch=1000)
        for r in range(4)
    ]
    assert lengths.sum() / (1000 * len(plans[0].bins(0))) > 0.97
    spread = []
    for by_rank in epoch_steps(plans)[:-1]:
        for step in by_rank:
            assert len(step.micro_batches) == 4
            assert all(lengths[batch].sum() <= 1000 for batch in step.micro_batches)
            assert step.num_slots == 4000
            assert step.num_tokens == sum(lengths[batch].sum() for batch in step.micro_batches)
        sums = [sum(int(supervised[batch].sum()) for batch in step.micro_batches) for step in by_rank]
        spread.append(max(sums) / min(sums))
    assert np.mean(spread) < 1.1
    in_order = [max(s) / min(s) for s in supervised[: 3000 // 16 * 16].reshape(-1, 4, 4).sum(2).astype(float)]
    assert np.mean(spread) < np.mean(in_order)


def test_packing_mixes_the_data() -> None:
    """Long samples do not all come at the start of a window."""
    lengths = np.random.default_rng(5).integers(20, 500, 2000)
    steps = epoch_steps(ranks(1, lengths, max_tokens_per_batch=1000))
    longest = [max(lengths[batch]) for by_rank in steps for batch in by_rank[0].micro_batches]
    half = len(longest) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 40


def test_total_steps() -> None:
    lengths = np.random.default_rng(6).integers(3, 20, 100)
    plain = plan_steps(lengths, batch_size=3, accumulation_steps=2, world_size=2)
    assert (plain.steps_per_epoch, plain.total_steps(3)) == (9, 27)
    packed = plan_steps(lengths, max_tokens_per_batch=32)
    assert packed.total_steps(3) == sum(packed.num_steps(epoch) for epoch in range(3))
    steps = list(itertools.islice(packed.steps(), packed.total_steps(3)))
    assert steps[-1].state_after["epoch"] == 3
    assert steps[-2].state_after["epoch"] == 2
