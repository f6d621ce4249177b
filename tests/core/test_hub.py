"""The one loader: what is wrong with a model's files is one line, and no code that comes with it runs unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config, load_tokenizer, local_directory, model_class


def test_what_is_loaded(tiny_target: Path) -> None:
    assert load_config(tiny_target).vocab_size == 4096
    assert load_tokenizer(tiny_target)("a")["input_ids"]
    assert local_directory(tiny_target) == tiny_target


def test_a_multimodal_family_has_another_class() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config, Gemma3TextConfig

    assert model_class(Gemma3TextConfig()) is AutoModelForCausalLM
    assert model_class(Gemma3Config()) in (AutoModelForCausalLM, AutoModelForImageTextToText)


CASES = {
    "nothing": {},
    "no json": {"config.json": "{", "tokenizer_config.json": "{"},
    "a list": {"config.json": "[]", "tokenizer_config.json": "[]"},
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
