"""What only a GPU can show: CUDA flash and flex_attention against the oracle, in values and gradients.

Not selected by `make test`; run with `python -m pytest -m gpu tests`."""

from __future__ import annotations

import pytest
import torch

from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch

pytestmark = pytest.mark.gpu
WIDTH, VOCAB, STEPS = 256, 1000, 5


def make_case(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    config = DraftConfig(
        hidden_size=WIDTH, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
        draft_vocab_size=VOCAB,
    )  # fmt: skip
    draft = build_draft(config, torch.zeros(VOCAB, dtype=torch.int64), torch.ones(VOCAB, dtype=torch.bool))
    init_random(draft, seed=1)
    head = TargetHead(rand(VOCAB, WIDTH), rand(VOCAB, WIDTH) / 16, torch.ones(WIDTH), 1e-5)
    total = 700
    mask = torch.zeros(total, dtype=torch.bool)
    mask[100:280] = mask[330:400] = mask[450:700] = True
    batch = DraftBatch(
        torch.randint(VOCAB, (total,), generator=generator), mask, [0, 400, 700], rand(total, 3 * WIDTH),
        rand(total, WIDTH),
    )  # fmt: skip
    return draft.cuda(), head.to("cuda", dtype), batch.to("cuda", dtype)


def loss_and_gradients(backend: str, dtype: torch.dtype, compiled: bool = False):
    draft, head, batch = make_case(dtype)
    settings = TTTSettings(num_steps=STEPS, attention_backend=backend, compute_dtype=dtype, compile=compiled)
    output = draft(batch, head, settings)
    (output.loss / output.counted_K[0]).backward()
    return output.loss.item(), {name: p.grad.float() for name, p in draft.named_parameters()}


@pytest.mark.parametrize(
    ("backend", "dtype", "compiled", "tolerance"),
    [
        ("flex_attention", torch.float32, False, 2e-3),
        ("flex_attention", torch.bfloat16, False, 3e-2),
        ("sdpa", torch.bfloat16, False, 3e-2),  # aten's flash kernels take no fp32
        ("sdpa", torch.bfloat16, True, 3e-2),
    ],
)
def test_backend_equals_the_eager_oracle(backend: str, dtype: torch.dtype, compiled: bool, tolerance: float) -> None:
    """Relative error in norm against eager attention in fp32; tf32 is off unless somebody turned it on."""
    expected_loss, expected = loss_and_gradients("eager", torch.float32)
    loss, gradients = loss_and_gradients(backend, dtype, compiled)
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-6, name


def test_a_step_does_not_wait_for_the_device() -> None:
    """Planning runs on the host's copy of the mask; torch reports any synchronising call."""
    draft, head, batch = make_case(torch.bfloat16)
    settings = TTTSettings(num_steps=STEPS, attention_backend="sdpa", compute_dtype=torch.bfloat16)
    draft(batch, head, settings).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draft(batch, head, settings).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
