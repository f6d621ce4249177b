"""--compile: one graph per function whatever the batches hold, and the losses of the plain step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from specforge_lite.model import fused as fused_module
from specforge_lite.model.draft import TTTSettings
from tests.model import test_block
from tests.model.test_eagle3 import gradients, make_batch, make_draft, make_target_head

COMPILE = torch.compile


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the graphs that torch.compile makes, and runs them as they are: no C++ compiler takes part."""
    made: list[str] = []

    def backend(graph: Any, _inputs: Any) -> Callable[..., Any]:
        made.append(graph.code)
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(fused_module, "_COMPILED", {})
    monkeypatch.setattr(fused_module.torch, "compile", partial(COMPILE, backend=backend))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize("loss", ["ce", "lk"])
def test_twenty_batches_of_other_sizes_share_their_graphs(graphs: list[str], loss: str) -> None:
    draft, head = make_draft(), make_target_head()
    settings = TTTSettings(num_steps=3, attention_backend="sdpa", compile=True, loss=loss)
    generator = torch.Generator().manual_seed(0)
    counts, after = [], []
    for number in range(22):
        length = int(torch.randint(20, 200, (1,), generator=generator))
        supervised = 2 + int(torch.randint(length - 6, (1,), generator=generator))
        batch = make_batch(["0" * (length - supervised) + "1" * supervised, "0001"], seed=number)
        output = draft(batch, head, settings)
        found = gradients(draft, output.loss)
        counts.append(int(output.supervised_K[0]))
        after.append(len(graphs))
        if number % 7 == 0:
            plain = draft(batch, head, replace(settings, compile=False))
            torch.testing.assert_close(output.loss, plain.loss, rtol=1e-10, atol=1e-12)
            for name, value in gradients(draft, plain.loss).items():
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert len(set(counts)) > 15
    functions = len(fused_module._COMPILED)
    assert functions == 3  # SwiGLU forward and backward, the loss
    assert after == [functions] * len(after), f"graphs after each batch: {after}"


def test_batches_with_no_row_or_a_single_one_need_no_graph_of_their_own(graphs: list[str]) -> None:
    draft, head = make_draft(draft_vocab=50), make_target_head()
    settings = TTTSettings(num_steps=2, attention_backend="sdpa", compile=True)
    for mask in ("001", "0" * 20 + "1" * 20, "0" * 5 + "1" * 30, "0" * 30 + "1", "0" * 9, "01111"):
        draft(make_batch([mask]), head, settings).loss.backward()
    assert len(graphs) == len(fused_module._COMPILED) == 3


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_a_block_draft_compiles_three_functions_and_computes_the_same(graphs: list[str], kind: str) -> None:
    draft, head = test_block.make_draft(kind), test_block.make_head()
    settings = TTTSettings(attention_backend="sdpa", compile=True)
    for number, length in enumerate((40, 25, 61, 33)):
        batch = test_block.make_batch([length], ["..." + "x" * (length - 3)], seed=number)
        output, plain = (draft(batch, head, s) for s in (settings, replace(settings, compile=False)))
        torch.testing.assert_close(output.loss, plain.loss, rtol=1e-6, atol=1e-6)
        theirs = gradients(draft, plain.loss)
        for name, value in gradients(draft, output.loss).items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    assert len(graphs) == len(fused_module._COMPILED) == 3  # SwiGLU forward and backward, the loss
