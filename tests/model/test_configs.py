"""Draft configs: the shipped files, the shape derived from a target, and every mistake named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge_lite.core.errors import ConfigError
from specforge_lite.model.config_json import config_from_file, config_from_values
from specforge_lite.model.draft import DraftConfig

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*-eagle3.json"))
GOOD = json.loads(next(p for p in CONFIGS if p.name.startswith("tiny")).read_text())


def test_there_is_a_config_for_every_documented_target() -> None:
    names = {p.name.removesuffix("-eagle3.json") for p in CONFIGS}
    assert names >= {
        "tiny-target", "llama-3.1-8b", "llama-3.3-70b", "qwen3-8b", "qwen3-30b-a3b", "minicpm4-8b", "mistral-7b",
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_their_rope_can_be_built(path: Path) -> None:
    from specforge_lite.model.rope import RotaryEmbedding

    config = config_from_file(path)
    assert config.algorithm == "eagle3"
    assert config.num_attention_heads * config.head_dim >= config.hidden_size
    RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)


def test_derived_from_the_target_equals_the_shipped_shape(tiny_target: Path) -> None:
    from transformers import AutoConfig

    derived = DraftConfig.from_target(AutoConfig.from_pretrained(tiny_target), draft_vocab_size=2048)
    shipped = config_from_values(GOOD)
    assert derived.replace(eos_token_id=None, pad_token_id=None) == shipped.replace(
        eos_token_id=None, pad_token_id=None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"draft_vocab_size": 5000}, r"draft_vocab_size 5000 is not in 1..vocab_size 4096"),
        ({"hidden_size": None}, r"hidden_size: required, not found"),
        ({"hidden_size": "128"}, r"hidden_size: expected int, found '128'"),
        ({"hidden_size": -1}, r"hidden_size: expected a positive number, found -1"),
        ({"head_dim": 31}, r"head_dim 31: RoPE needs an even number"),
        ({"algorithm": "eagle4"}, r"algorithm: unknown value 'eagle4'; did you mean 'eagle\d'"),
    ],
)
def test_impossible_shapes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_values({**GOOD, **change}, source="config.json")


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_theta": None, "rope_scaling": {**SCALING, "rope_theta": 3e5}}, 3e5, SCALING),
        ({"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": SCALING}, 5e5, SCALING),
        ({"rope_theta": 5e5, "rope_parameters": {**SCALING, "rope_theta": 5e5}, "rope_scaling": None}, 5e5, SCALING),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            1e4,
            {"type": "linear", "factor": 2.0, "rope_type": "linear"},
        ),
        ({"rope_theta": None, "rope_scaling": None}, 1e4, None),
    ],
)
def test_rope_is_found_where_it_is_given(keys: dict, theta: float, scaling: dict | None) -> None:
    values = {key: value for key, value in GOOD.items() if not key.startswith("rope")}
    config = config_from_values({**values, **keys})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_null_is_as_good_as_absent() -> None:
    given = config_from_values({**GOOD, "num_key_value_heads": None, "head_dim": None, "hidden_act": None})
    assert given.num_key_value_heads == GOOD["num_attention_heads"]


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        config_from_file(file)
    with pytest.raises(ConfigError, match="No such file"):
        config_from_file(tmp_path / "absent.json")
    file.write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, found list"):
        config_from_file(file)


@pytest.mark.parametrize("path", sorted(CONFIGS[0].parent.glob("*-dspark.json")), ids=lambda p: p.stem)
def test_shipped_block_configs_are_what_engines_read_and_build(path: Path) -> None:
    """Layers: z-lab's rule for the target's depth. Both engines look at dflash_config as well as at the top."""
    from specforge_lite.training.block import spread_aux_layers

    values = json.loads(path.read_text())
    config = config_from_file(path)
    assert config.algorithm == "dspark"
    assert config.aux_layer_ids == spread_aux_layers(values["num_target_layers"])
    assert values["dflash_config"] == {name: values[name] for name in ("mask_token_id", "target_layer_ids")}
    assert values["layer_types"] == ["full_attention"] * values["num_hidden_layers"]
    assert config.draft_vocab_size == config.vocab_size > (config.mask_token_id or 0)
    assert (config.block_size, config.markov_rank > 0, config.confidence_head) == (7, True, True)
