"""--optim adamw_8bit where its package is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import parse_config
from specforge_lite.training.settings import TrainConfig


def test_without_torchao_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = lambda name: None if name == "torchao" else find(name)  # noqa: E731
    monkeypatch.setattr("specforge_lite.training.settings.find_spec", absent)
    message = "optim: adamw_8bit needs torchao, which is not installed: pip install torchao==0.18.0"
    (tmp_path / "train.jsonl").touch()
    words = ["--target-model-path", "m", "--train-data-path", str(tmp_path / "train.jsonl"), "--output-dir", "o"]
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(TrainConfig, [*words, "--optim", "adamw_8bit"])
    assert "\n" not in str(caught.value)
    assert parse_config(TrainConfig, words).optimizer.optim == "adamw"
