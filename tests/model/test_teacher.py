"""The teacher of an EAGLE-3 draft is the target's own head, with its bias, scale and soft cap."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from specforge_lite.core.errors import CheckpointError
from specforge_lite.model.losses import ask_teacher
from specforge_lite.model.target_head import TargetHead, load_target_head


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_the_teacher_has_the_heads_bias(scale: float, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, last = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (30, 11))
    bias = torch.zeros(30, dtype=torch.float64)
    bias[[4, 17]] = 40.0  # outweighs every product, so that the choice is 4 or 17
    head = TargetHead(weight, weight, torch.ones(8), 1e-5, 1.0, scale, softcap, head_bias_V=bias)
    draft_ids = torch.tensor([1, 4, 9, 20])
    teacher = ask_teacher(head, last, draft_ids, want_lse=True)
    raw = (last @ weight.T + bias) * scale
    wanted = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    torch.testing.assert_close(teacher.draft_logits_MVd, wanted[:, draft_ids], rtol=1e-12, atol=0)
    torch.testing.assert_close(teacher.lse_M, wanted.logsumexp(-1), rtol=1e-12, atol=0)
    assert teacher.argmax_M.tolist() == wanted.argmax(-1).tolist()
    assert set(teacher.argmax_M.tolist()) <= {4, 17}
    logits, slope = head.finish(last @ weight.T)
    torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=0)
    products = (last @ weight.T).requires_grad_()
    (expected_slope,) = torch.autograd.grad(head.finish(products)[0].sum(), products)
    torch.testing.assert_close(torch.ones_like(wanted) * (1.0 if slope is None else slope), expected_slope)


def target(directory: Path, tensors: dict[str, torch.Tensor], tied: bool) -> TargetHead:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = SimpleNamespace(tie_word_embeddings=tied, model_type="llama", hidden_size=4, rms_norm_eps=1e-5)
    return load_target_head(directory, config)


def test_a_tied_target_that_stores_only_its_head_loads(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    head = target(tmp_path, {"lm_head.weight": weight, "model.norm.weight": torch.ones(4)}, tied=True)
    assert head.embed_VH is head.lm_head_VH
    assert torch.equal(head.embed_VH, weight)


def test_a_target_that_is_not_tied_needs_both(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="token embedding not found"):
        target(tmp_path, {"lm_head.weight": torch.ones(6, 4), "model.norm.weight": torch.ones(4)}, tied=False)
