"""The one loader: what is wrong with a model's files is one line, and no code that comes with it runs unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import (
    load_config,
    load_generation_config,
    load_tokenizer,
    local_directory,
    meta_model,
    model_class,
)


def test_what_is_loaded(tiny_target: Path, tmp_path: Path) -> None:
    config = load_config(tiny_target)
    assert config.vocab_size == 4096
    assert load_tokenizer(tiny_target)("a")["input_ids"]
    model = meta_model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.get_input_embeddings().weight.shape == (4096, config.hidden_size)
    assert local_directory(tiny_target) == tiny_target
    target = Path(shutil.copytree(tiny_target, tmp_path / "target"))
    (target / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5, "eos_token_id": [1, 2]}))
    generation = load_generation_config(target)
    assert generation is not None
    assert (generation.repetition_penalty, generation.eos_token_id) == (1.5, [1, 2])
    (target / "generation_config.json").unlink()
    assert load_generation_config(target) is None


def test_a_multimodal_family_has_another_class() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config, Gemma3TextConfig

    assert model_class(Gemma3TextConfig()) is AutoModelForCausalLM
    assert model_class(Gemma3Config()) in (AutoModelForCausalLM, AutoModelForImageTextToText)


CASES = {
    "nothing": {},
    "no json": {"config.json": "{", "tokenizer_config.json": "{", "generation_config.json": "{"},
    "a list": {"config.json": "[]", "tokenizer_config.json": "[]", "generation_config.json": "[]"},
    "no such type": {"config.json": '{"model_type": "nonesuch"}'},
    "own code": {
        "config.json": '{"model_type": "m", "auto_map": {"AutoConfig": "mine.C", "AutoTokenizer": ["mine.T", null]}}',
        "mine.py": "raise SystemExit('ran')",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_line(case: str, tmp_path: Path) -> None:
    for name, text in CASES[case].items():
        (tmp_path / name).write_text(text)
    for load in (load_config, load_tokenizer):
        with pytest.raises(ConfigError, match=f"model_path {tmp_path}: cannot load its ") as caught:
            load(tmp_path, flag="model_path")
        assert str(caught.value).isprintable()
    if case == "own code":
        with pytest.raises(ConfigError, match="its own code runs only with --trust-remote-code"):
            load_config(tmp_path)


def test_neither_a_directory_nor_a_hub_name() -> None:
    with pytest.raises(ConfigError, match="model_path no/such/thing/at all: no such directory, and not from the hub: "):
        local_directory("no/such/thing/at all", "model_path")
