"""Warm start from targets that are stored in unusual ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from specforge_lite.core.errors import CheckpointError
from specforge_lite.core.weight_files import INDEX_FILE
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.initialize import init_from_target, init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import load_target_head

CONFIG = LlamaConfig(
    hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    vocab_size=80,
)  # fmt: skip
LAYER = "model.layers.1."


def target_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256)}
    tensors = {f"{LAYER}self_attn.{part}_proj.weight": torch.randn(shape) * 0.02 for part, shape in shapes.items()}
    for part, shape in {"gate": (384, 256), "up": (384, 256), "down": (256, 384)}.items():
        tensors[f"{LAYER}mlp.{part}_proj.weight"] = torch.randn(shape) * 0.02
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{LAYER}{name}.weight"] = torch.rand(256) + 0.5
    tensors |= {"model.embed_tokens.weight": torch.randn(80, 256), "lm_head.weight": torch.randn(80, 256) * 0.02}
    return {**tensors, "model.norm.weight": torch.ones(256)}


def to_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As DeepSeek stores them: blocks of 128 x 128, each with its own scale."""
    stored = dict(tensors)
    for name, weight in tensors.items():
        if "_proj." in name:
            blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            scale = blocks.abs().amax((1, 3)) / 448
            whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            stored[name] = (weight / whole).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
    return stored


def start(directory: Path) -> tuple[Draft, list[str]]:
    shape = DraftConfig.from_target(CONFIG, 80).replace(aux_layer_ids=(0,))
    draft = build_draft(shape, torch.zeros(80, dtype=torch.int64), torch.ones(80, dtype=torch.bool))
    init_random(draft, seed=0)
    return draft, init_from_target(draft, directory, CONFIG, load_target_head(directory, CONFIG))


def test_fp8_is_dequantised(tmp_path: Path) -> None:
    """The raw float8 numbers would have a standard deviation of about 150."""
    tensors = target_tensors()
    save_file(to_fp8(tensors), tmp_path / "model.safetensors")
    draft, left_random = start(tmp_path)
    assert left_random == []
    for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"):
        copied = draft.get_parameter(f"midlayer.{part}.weight")
        torch.testing.assert_close(copied, tensors[f"{LAYER}{part}.weight"], rtol=0.07, atol=2e-4)
    query = draft.get_parameter("midlayer.self_attn.q_proj.weight")
    torch.testing.assert_close(query[:, 256:], tensors[f"{LAYER}self_attn.q_proj.weight"], rtol=0.07, atol=2e-4)


def test_fp8_without_a_scale_stays_random(tmp_path: Path) -> None:
    stored = {name: tensor for name, tensor in to_fp8(target_tensors()).items() if "scale" not in name}
    save_file(stored, tmp_path / "model.safetensors")
    draft, left_random = start(tmp_path)
    parts = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert left_random == [f"midlayer.{p}" for p in (*parts, *(f"self_attn.{letter}_proj" for letter in "qkv"))]
    assert all(float(p.detach().std()) < 0.03 for n, p in draft.named_parameters() if "midlayer" in n and "proj" in n)


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    tensors = target_tensors()
    save_file({**tensors, "lm_head.weight": torch.ones(80, 128, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is quantised"):
        load_target_head(tmp_path, CONFIG)


def test_only_what_is_copied_is_read(tmp_path: Path) -> None:
    """A layer of experts: their shard is no safetensors file at all, so opening it would raise."""
    tensors = {name: tensor for name, tensor in target_tensors().items() if ".mlp." not in name}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").write_text("not opened")
    names = [f"{LAYER}mlp.experts.{i}.{part}_proj.weight" for i in range(4) for part in ("gate", "up", "down")]
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys([*names, f"{LAYER}mlp.gate.weight"], "model-00002-of-00002.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    draft, left_random = start(tmp_path)
    assert left_random == [f"midlayer.mlp.{part}_proj" for part in ("gate", "up", "down")]
    output = draft.get_parameter("midlayer.self_attn.o_proj.weight")
    assert torch.equal(output, tensors[f"{LAYER}self_attn.o_proj.weight"])
