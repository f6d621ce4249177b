"""What is exported loads again, and every directory that an engine would serve wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_lite.checkpoints.contract import check_draft
from specforge_lite.checkpoints.export import export_draft
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.errors import CheckpointError, ConfigError
from tests.inference_drafts import random_draft

KEY = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export_draft(random_draft(), tmp_path / "draft", dtype="float32")


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def broken(folder: Path, **options) -> str:
    return " | ".join(finding.message for finding in check_draft(folder, **options) if finding.is_broken)


@pytest.mark.parametrize("options", [{}, {"norm_output": True, "fc_norm": True}, {"target_hidden_size": 48}])
def test_export_then_load_gives_the_same_draft(tmp_path: Path, options: dict) -> None:
    draft = random_draft(**options)
    loaded = load_draft(export_draft(draft, tmp_path / "out", dtype="float32"))
    assert loaded.config == draft.config
    state, again = draft.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert all(finding.level == "ok" for finding in check_draft(tmp_path / "out"))


def test_exported_names_and_config_are_those_engines_read(exported: Path) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in load_file(exported / "model.safetensors").items()}
    assert shapes == {
        "fc.weight": [32, 96],
        "midlayer.self_attn.q_proj.weight": [32, 64],
        "midlayer.self_attn.k_proj.weight": [16, 64],
        "midlayer.self_attn.v_proj.weight": [16, 64],
        "midlayer.self_attn.o_proj.weight": [32, 32],
        "midlayer.mlp.gate_proj.weight": [64, 32],
        "midlayer.mlp.up_proj.weight": [64, 32],
        "midlayer.mlp.down_proj.weight": [32, 64],
        "midlayer.hidden_norm.weight": [32],
        "midlayer.input_layernorm.weight": [32],
        "midlayer.post_attention_layernorm.weight": [32],
        "norm.weight": [32],
        "lm_head.weight": [40, 32],
        "d2t": [40],
        "t2d": [100],
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["draft_vocab_size"], config["vocab_size"], config["tie_word_embeddings"]) == (40, 100, False)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config[KEY] == [2, 4, 5]  # vLLM: layer inputs
    assert config["eagle_config"] == {KEY: [1, 3, 4], "use_aux_hidden_state": True}  # SGLang: layer outputs


def test_a_full_vocabulary_is_exported_without_a_map(tmp_path: Path) -> None:
    folder = export_draft(random_draft(draft_vocab_size=100), tmp_path / "out")
    assert not {"d2t", "t2d"} & load_file(folder / "model.safetensors").keys()
    assert load_draft(folder).d2t.eq(0).all()


def test_export_refuses_a_taken_directory_and_missing_aux_ids(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        export_draft(random_draft(), exported)
    export_draft(random_draft(seed=1), exported, overwrite=True)
    with pytest.raises(ConfigError, match="aux_layer_ids"):
        export_draft(random_draft(aux_layer_ids=None), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]  # nothing half-written


REQUIRED = {
    "fc.weight": "almost nothing is accepted",
    "norm.weight": "almost nothing is accepted",
    "midlayer.hidden_norm.weight": "almost nothing is accepted",
    "midlayer.input_layernorm.weight": "almost nothing is accepted",
    "midlayer.self_attn.q_proj.weight": "almost nothing is accepted",
    "lm_head.weight": "random head",
}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_tensor_is_named(exported: Path, name: str) -> None:
    edit_tensors(exported, lambda tensors: tensors.pop(name))
    assert f"{name} is missing: " in broken(exported)
    assert REQUIRED[name] in broken(exported)


def test_missing_d2t(exported: Path) -> None:
    edit_tensors(exported, lambda tensors: tensors.pop("d2t"))
    assert "d2t is missing, draft_vocab_size 40 != vocab_size 100" in broken(exported)


@pytest.mark.parametrize("with_t2d", [True, False])
def test_absolute_d2t(exported: Path, with_t2d: bool) -> None:
    def absolute(tensors: dict) -> None:
        tensors["d2t"] = tensors["d2t"] + torch.arange(40)
        if not with_t2d:
            del tensors["t2d"]

    edit_tensors(exported, absolute)
    assert "d2t holds absolute target ids" in broken(exported)


def test_d2t_beside_a_full_vocabulary(exported: Path) -> None:
    def widen(tensors: dict) -> None:
        tensors["lm_head.weight"] = torch.randn(100, 32)
        tensors["d2t"], tensors["t2d"] = torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.bool)

    edit_tensors(exported, widen)
    edit_config(exported, lambda config: config.update(draft_vocab_size=100))
    assert "d2t beside a full draft vocabulary" in broken(exported)


def test_t2d_of_another_map(exported: Path) -> None:
    edit_tensors(exported, lambda tensors: tensors.update(t2d=tensors["t2d"].flip(0)))
    assert "which are not those that d2t names" in broken(exported)


def test_d2t_that_leaves_the_vocabulary(exported: Path) -> None:
    edit_tensors(exported, lambda tensors: tensors["d2t"].__setitem__(39, 99))
    assert "d2t names target ids" in broken(exported)
    assert "vocab_size is 100" in broken(exported)


@pytest.mark.parametrize(
    ("change", "engine"),
    [
        (lambda config: config["eagle_config"].update({KEY: [2, 4, 5]}), "SGLang"),
        (lambda config: config.update({KEY: [1, 3, 4]}), "vLLM"),
        (lambda config: config.pop(KEY), "vLLM"),
    ],
    ids=["sglang key off by one", "vllm key off by one", "vllm falls back on sglang's key"],
)
def test_aux_ids_off_by_one(exported: Path, change: Callable[[dict], None], engine: str) -> None:
    edit_config(exported, change)
    assert f"{engine} would capture the outputs of layers" in broken(exported)
    assert "trained on [1, 3, 4]" in broken(exported)


def test_aux_ids_are_compared_with_the_training_run(exported: Path) -> None:
    assert not broken(exported, trained_aux_layer_ids=(1, 3, 4))
    assert "trained on [0, 2, 3]" in broken(exported, trained_aux_layer_ids=(0, 2, 3))


def test_aux_ids_left_to_the_engines_default(exported: Path) -> None:
    def forget(config: dict) -> None:
        del config[KEY], config["eagle_config"]

    edit_config(exported, forget)
    assert not broken(exported, target=tiny_config(8))  # the default of 8 layers is 1, 3, 4
    assert "would capture the outputs of layers [1, 5, 8]" in broken(exported, target=tiny_config(12))


def test_a_wrong_number_of_aux_layers(exported: Path) -> None:
    edit_config(exported, lambda config: config.update({KEY: [2, 4]}))
    assert "2 aux layers (vLLM), but fc reads 3" in broken(exported)
    edit_config(exported, lambda config: config.pop("aux_layer_ids"))
    assert "2 aux layer ids, but fc is 96 = 3 x 32 wide" in broken(exported)


def test_model_prefix(exported: Path) -> None:
    def prefix(tensors: dict) -> None:
        for name in list(tensors):
            tensors["model." + name] = tensors.pop(name)

    edit_tensors(exported, prefix)
    assert "'model.' before 15 names" in broken(exported)


def test_unknown_tensor(exported: Path) -> None:
    edit_tensors(exported, lambda tensors: tensors.update({"midlayer.hiden_norm.weight": torch.ones(32)}))
    assert "unknown tensors midlayer.hiden_norm.weight" in broken(exported)
    assert "did you mean 'midlayer.hidden_norm.weight'?" in broken(exported)


def test_missing_rope_theta(exported: Path) -> None:
    edit_config(exported, lambda config: config.pop("rope_theta"))
    assert "rope_theta is missing at the top level" in broken(exported)


def test_two_rope_thetas(exported: Path) -> None:
    edit_config(exported, lambda config: config.update(rope_theta=500000.0))
    assert "rope_theta 500000 != rope_parameters.rope_theta 10000" in broken(exported)


def test_tied_embeddings(exported: Path) -> None:
    edit_config(exported, lambda config: config.update(tie_word_embeddings=True))
    assert "tie_word_embeddings is true" in broken(exported)


def test_wrong_shape(exported: Path) -> None:
    edit_tensors(exported, lambda tensors: tensors.update({"norm.weight": torch.ones(33)}))
    assert "norm.weight has shape [33], config.json makes it [32]" in broken(exported)


def test_not_a_number(exported: Path) -> None:
    edit_tensors(exported, lambda tensors: tensors["norm.weight"].__setitem__(0, torch.nan))
    assert "norm.weight holds NaN or infinity" in broken(exported)


def test_fc_bias_of_eagle3(exported: Path) -> None:
    edit_tensors(exported, lambda tensors: tensors.update({"fc.bias": torch.ones(32)}))
    assert "an EAGLE-3 fc has none" in broken(exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("architectures"), "architectures is missing"),
        (lambda config: config.update(architectures=["LlamaForCausalLMEagle33"]), "did you mean 'LlamaForCausalLMEag"),
        (lambda config: config.pop("model_type"), "model_type is missing"),
        (lambda config: config.pop("draft_vocab_size"), "draft_vocab_size is missing"),
        (lambda config: config.update(target_hidden_size=None), "target_hidden_size is null"),
        (lambda config: config.pop("hidden_size"), "hidden_size: required"),
        (lambda config: config.update(num_hidden_layers=2), "num_hidden_layers 2: expected 1"),
    ],
)
def test_config_mistakes(exported: Path, change: Callable[[dict], None], message: str) -> None:
    edit_config(exported, change)
    assert message in broken(exported)


def test_unreadable_directories(exported: Path, tmp_path: Path) -> None:
    assert "no such directory" in broken(tmp_path / "nowhere")
    (exported / "model.safetensors").write_bytes(b"garbage")
    assert "not a readable safetensors file" in broken(exported)
    (exported / "model.safetensors").unlink()
    assert "no weights here" in broken(exported)
    (exported / "config.json").write_text("{")
    assert "not valid JSON" in broken(exported)


def tiny_config(num_layers: int, hidden_size: int = 32, vocab_size: int = 100):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=num_layers,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


def test_compare_with_the_target(exported: Path) -> None:
    assert not broken(exported, target=tiny_config(8))
    assert "target_hidden_size 32 != the target's 64" in broken(exported, target=tiny_config(8, hidden_size=64))
    assert "vocab_size 100 != the target's 128" in broken(exported, target=tiny_config(8, vocab_size=128))
    assert "would capture layers [1, 3, 4]; the target has outputs 0..3" in broken(exported, target=tiny_config(5))


# ------------------------------------------------------------------------------------------------------------ EAGLE-1


@pytest.fixture
def exported_eagle1(tmp_path: Path) -> Path:
    return export_draft(random_draft(algorithm="eagle1"), tmp_path / "eagle1", dtype="float32")


def test_eagle1_is_exported_with_a_zero_bias_and_without_a_map(exported_eagle1: Path) -> None:
    tensors = load_file(exported_eagle1 / "model.safetensors")
    assert sorted(tensors) == [
        "fc.bias",
        "fc.weight",
        "layers.0.mlp.down_proj.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "layers.0.post_attention_layernorm.weight",
        "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.o_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.v_proj.weight",
    ]
    assert not tensors["fc.bias"].any()
    config = json.loads((exported_eagle1 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle", "EagleLlamaForCausalLM"]
    assert all(finding.level == "ok" for finding in check_draft(exported_eagle1, target=tiny_config(8)))
    loaded, draft = load_draft(exported_eagle1), random_draft(algorithm="eagle1")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in draft.state_dict().items())


def test_eagle1_biases_that_one_engine_would_not_have(exported_eagle1: Path) -> None:
    edit_tensors(exported_eagle1, lambda tensors: tensors.pop("fc.bias"))
    assert "fc.bias is missing: SGLang's EAGLE-1 fc has a bias" in broken(exported_eagle1)
    edit_tensors(exported_eagle1, lambda tensors: tensors.update({"fc.bias": torch.ones(32)}))
    assert "fc.bias is not zero: vLLM's EAGLE-1 fc has no bias" in broken(exported_eagle1)


def test_a_trained_eagle1_bias_is_used_here(exported_eagle1: Path) -> None:
    """SafeAILab's EAGLE-1 checkpoints have one."""
    edit_tensors(exported_eagle1, lambda tensors: tensors.update({"fc.bias": torch.arange(32.0)}))
    assert torch.equal(load_draft(exported_eagle1).fc.bias, torch.arange(32.0))
