"""An 8B-shaped step (4 documents of 2,048 tokens and 8 answers, K 7) launches few kernels and waits for no copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from specforge_lite.model import flex as flex_module
from specforge_lite.model.eager_attention import Eager
from specforge_lite.model.flash import flash_rows
from specforge_lite.model.row_plan import plan_rows, predictable_tokens
from tests.gpu_codegen.launches import Launches, count_pass

FORWARD_LIMIT, BACKWARD_LIMIT = 600, 900


def assert_few(forward: Launches, backward: Launches, forward_limit: int, backward_limit: int) -> None:
    assert forward.total <= forward_limit, forward.launches.most_common(20)
    assert backward.total <= backward_limit, backward.launches.most_common(20)
    assert not forward.blocking, forward.blocking
    assert not backward.blocking, backward.blocking
    assert forward.uploads == 1  # the plan
    assert backward.uploads == 0


def test_eagle3_pass() -> None:
    forward, backward = count_pass(turns=8)
    assert_few(forward, backward, FORWARD_LIMIT, BACKWARD_LIMIT)
    assert forward.launches["_flash_attention_forward"] == 7  # one a step
    assert backward.launches["_flash_attention_backward"] == 7


def test_eagle1_pass() -> None:
    forward, backward = count_pass(turns=8, algorithm="eagle1", num_steps=1)
    assert_few(forward, backward, 200, 120)


@pytest.mark.parametrize("loss", ["lk", "lk_alpha"])
def test_the_lk_losses_wait_for_nothing(loss: str) -> None:
    forward, backward = count_pass(turns=8, loss=loss)
    assert_few(forward, backward, 800, BACKWARD_LIMIT)


def random_batch(generator: torch.Generator) -> tuple[torch.Tensor, list[int]]:
    """Predictable tokens and offsets of one to four documents."""
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    offsets, masks = [0], []
    for _ in range(number(1, 5)):
        length = number(20, 400)
        mask = torch.zeros(length, dtype=torch.bool)
        for _turn in range(number(1, 4)):
            start = number(0, length - 4)
            mask[start : start + number(3, 120)] = True
        masks.append(mask)
        offsets.append(offsets[-1] + length)
    return predictable_tokens(torch.cat(masks), offsets), offsets


@pytest.fixture
def flex_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Graphs that torch.compile makes of flex_attention; they run as they are."""
    made: list[str] = []

    def backend(graph: Any, _inputs: Any) -> Callable[..., Any]:
        made.append(graph.code)
        return graph.forward  # type: ignore[no-any-return]

    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=True, backend=backend)
    monkeypatch.setattr(flex_module, "_COMPILED", {"flex": compiled})
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def test_flex_attention_makes_few_graphs_and_equals_eager(flex_graphs: list[str]) -> None:
    """20 random batches, three steps each: rows, keys and later keys differ, the graphs are the same."""
    generator = torch.Generator().manual_seed(0)
    flex, eager = flex_module.Flex("cuda"), Eager()
    for _ in range(20):
        mask, offsets = random_batch(generator)
        plan = plan_rows(mask, offsets, 3).to("cpu", flex.plan)
        make = partial(torch.randn, generator=generator, dtype=torch.float64)
        keys, values = ([make(plan.num_keys, 2, 16)] for _ in range(2))
        for rows in plan.steps:
            count = len(rows.row_tokens)
            if rows is not plan.steps[0]:
                keys = [keys[0], *(make(count, 2, 16) for _ in range(len(keys)))]
                values = [values[0], *(make(count, 2, 16) for _ in range(len(values)))]
            query = make(count, 4, 16)
            found = flex.attend(query, keys, values, rows)
            torch.testing.assert_close(found, eager.attend(query, keys, values, rows), rtol=1e-10, atol=1e-12)
    assert 0 < len(flex_graphs) <= 4, f"{len(flex_graphs)} graphs"


def test_the_variable_length_call_sees_what_the_mask_shows() -> None:
    """Each query of a segment sees the keys up to its own place from their end: that is the mask."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        mask, offsets = random_batch(generator)
        plan = plan_rows(mask, offsets, 3)
        for rows in plan.steps:
            count = len(rows.row_tokens)
            call = flash_rows(rows, plan.num_keys)
            queries = torch.arange(count) if call.query_places is None else call.query_places
            keys = torch.arange(plan.num_keys) if call.key_places is None else call.key_places
            seen = torch.zeros(count, plan.num_keys, dtype=torch.int64)
            bounds = zip(call.query_offsets.tolist(), call.query_offsets[1:].tolist(), call.key_offsets.tolist(),
                         call.key_offsets[1:].tolist())  # fmt: skip
            for q_start, q_stop, k_start, k_stop in bounds:
                assert q_stop - q_start <= call.max_queries
                assert k_stop - k_start <= call.max_keys
                for place in range(q_start, q_stop):
                    if call.holes is None or not call.holes[place]:
                        seen[queries[place], keys[k_start : k_stop - (q_stop - 1 - place)]] += 1
            all_keys = torch.arange(plan.num_keys)
            expected = (all_keys <= rows.key_rows[:, None]) & (all_keys >= rows.first_keys[:, None])
            assert torch.equal(seen, expected.long())
            if call.row_places is not None:
                assert queries[call.row_places].tolist() == list(range(count))
