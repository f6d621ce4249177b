"""The directory of a DSpark or DFlash draft: exported, read back, and every fault that an engine loads silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config

from specforge_lite.checkpoints.contract import check_draft
from specforge_lite.checkpoints.export import export_draft
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.model.draft import TTTSettings
from tests.model.test_block import VOCAB, WIDTH, make_batch, make_draft, make_head

TARGET = Qwen3Config(
    hidden_size=WIDTH, vocab_size=VOCAB, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=2048
)


def broken(directory: Path, target: Any = TARGET) -> list[str]:
    return [finding.message for finding in check_draft(directory, target) if finding.is_broken]


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_an_exported_draft_is_read_back_as_it_was(tmp_path: Path, kind: str) -> None:
    draft, head = make_draft(kind), make_head()
    folder = export_draft(draft, tmp_path / "draft", dtype="float32")
    assert broken(folder) == []
    assert [f.message for f in check_draft(folder, TARGET) if f.level == "warning"] == []
    loaded = load_draft(folder)
    assert loaded.config.replace(bos_token_id=None) == draft.config
    batch = make_batch([30], ["......" + "x" * 24])
    ours, theirs = (d(batch, head, TTTSettings()) for d in (draft, loaded))
    assert float(ours.loss.detach()) == float(theirs.loss)


def test_the_keys_and_names_are_those_that_both_engines_read(tmp_path: Path) -> None:
    """Typed from SGLang's dspark_config.py and dflash_utils.py and vLLM's qwen3_dspark.py."""
    folder = export_draft(make_draft("dspark"), tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["model_type"] == "qwen3"
    assert config["target_layer_ids"] == [0, 2]  # layer outputs; both engines add 1
    assert config["dflash_config"] == {"mask_token_id": 49, "target_layer_ids": [0, 2]}
    expected = {
        "block_size": 4, "mask_token_id": 49, "markov_rank": 6, "markov_head_type": "vanilla",
        "enable_confidence_head": True, "confidence_head_with_markov": True, "sample_from_anchor": True,
        "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": False,
        "attention_bias": False, "rope_theta": 10000.0,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert "draft_vocab_size" not in config
    assert "eagle_aux_hidden_state_layer_ids" not in config
    layer = {
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip
    names = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in layer}
    names |= {"fc.weight", "hidden_norm.weight", "norm.weight", "markov_head.markov_w1.weight"}
    names |= {"markov_head.markov_w2.weight", "confidence_head.proj.weight", "confidence_head.proj.bias"}
    assert set(load_file(folder / "model.safetensors")) == names


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop("fc.weight"), "fc.weight is missing: both engines load the rest without an error"),
        (lambda c, t: t.pop("hidden_norm.weight"), "hidden_norm.weight is missing"),
        (lambda c, t: t.pop("layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
        (lambda c, t: t.pop("markov_head.markov_w2.weight"), "markov_head.markov_w2.weight is missing"),
        (lambda c, t: t.pop("confidence_head.proj.bias"), "SGLang refuses in ragged verification mode"),
        (
            lambda c, t: t.update({"markov_w1.weight": t.pop("markov_head.markov_w1.weight")}),
            "unknown tensors markov_w1.weight: vLLM refuses, SGLang drops them silently",
        ),
        (lambda c, t: t.update({f"model.{n}": t.pop(n) for n in list(t)}), "'model.' before"),
        (lambda c, t: t.update(d2t=torch.zeros(VOCAB, dtype=torch.int64)), "SGLang knows the whole vocabulary only"),
        (lambda c, t: t.update({"norm.weight": torch.ones(WIDTH + 1)}), "norm.weight has shape [17]"),
        (lambda c, t: c.update(sample_from_anchor=False), "the slots of dspark predict in the other layout"),
        (lambda c, t: c.update(is_causal=True), "true makes the block causal"),
        (lambda c, t: c["dflash_config"].update(causal=True), "vLLM makes the block causal"),
        (lambda c, t: c["dflash_config"].update(use_swa=True), "vLLM gives every layer a sliding window"),
        (lambda c, t: c["dflash_config"].update(attention_value_scale=0.5), "both engines scale the values"),
        (lambda c, t: c.update(partial_rotary_factor=0.5), "engines would rotate other parts"),
        (
            lambda c, t: c.update(
                target_layer_ids=[2, 0], dflash_config={"mask_token_id": 49, "target_layer_ids": [2, 0]}
            ),
            "engines hand the states over by ascending layer",
        ),
        (
            lambda c, t: c.update(layer_types=["sliding_attention", "full_attention"]),
            "engines make sliding layers causal",
        ),
        (lambda c, t: c.pop("markov_rank") and c["dflash_config"].update(markov_rank=6), "markov_rank is missing at"),
        (lambda c, t: c.pop("dflash_config"), "dflash_config.mask_token_id is missing: vLLM looks there first"),
        (lambda c, t: c.update(mask_token_id=3), "mask_token_id 3 != dflash_config.mask_token_id 49"),
        (lambda c, t: c.update(eagle_aux_hidden_state_layer_ids=[1, 3]), "does not add 1"),
        (lambda c, t: c.update(quantization_config={"quant_method": "fp8"}), "is the target's, not the draft's"),
        (lambda c, t: c.update(num_nextn_predict_layers=1), "is the target's, not the draft's"),
        (lambda c, t: c.update(architectures=["DFlashDraftModel"]), "predict in the other layout"),
        (lambda c, t: c.update(markov_head_type="gated"), "only vanilla is read"),
        (lambda c, t: c.update(max_position_embeddings=1024), "max_position_embeddings 1024 != the target's 2048"),
        (lambda c, t: c.update(draft_vocab_size=20), "SGLang knows the whole vocabulary only"),
    ],
)
def test_every_fault_is_named(tmp_path: Path, change: Change, message: str) -> None:
    folder = export_draft(make_draft("dspark"), tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    assert any(message in found for found in broken(folder)), broken(folder)


def test_another_target_is_refused(tmp_path: Path) -> None:
    folder = export_draft(make_draft("dflash"), tmp_path / "draft")
    other = Qwen3Config(hidden_size=32, vocab_size=VOCAB, num_hidden_layers=3, max_position_embeddings=2048)
    found = broken(folder, other)
    assert any("hidden_size 16 != the target's 32" in message for message in found)
    assert any("target_layer_ids [0, 2]; the target has outputs 0..1" in message for message in found)


@pytest.mark.parametrize(("kind", "trained"), [("dspark", 4), ("dflash", 3)])
def test_a_served_length_other_than_the_trained_one_is_named(tmp_path: Path, kind: str, trained: int) -> None:
    folder = export_draft(make_draft(kind), tmp_path / "draft")
    assert not any(f.is_broken for f in check_draft(folder, TARGET, num_draft_tokens=trained))
    (found,) = [f.message for f in check_draft(folder, TARGET, num_draft_tokens=2) if f.is_broken]
    assert found.startswith(f"2 draft tokens, the block was trained with {trained}")


def test_what_lies_outside_the_directory_is_checked_where_it_is_known(tmp_path: Path) -> None:
    """The served length, the layers of the training, and a target whose logits the engines scale for itself only."""
    folder = export_draft(make_draft("dspark"), tmp_path / "draft")
    assert {f.level for f in check_draft(folder, TARGET, (0, 2), 4)} == {"ok"}
    found = [f.message for f in check_draft(folder, TARGET, (0, 1), 3) if f.is_broken]
    assert found[0] == "target_layer_ids [0, 2]: it was trained on [0, 1]"
    assert found[1].startswith("3 draft tokens, the block was trained with 4: fewer MASK slots")
    (folder / "mask_embedding.pt").touch()
    assert [message[:18] for message in broken(folder)] == ["mask_embedding.pt:"]
    capped = Qwen3Config(**{**TARGET.to_dict(), "final_logit_softcapping": 30.0})
    assert any("logits are capped at 30" in f.message for f in check_draft(folder, capped) if f.level == "warning")
