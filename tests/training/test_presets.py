"""Training presets: every key is one that scripts/train_eagle3_online.py reads, and means what the file says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import leaf_fields, parse_config
from specforge_lite.training.settings import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = sorted(CONFIGS.glob("train-*.yaml"))


def parse(preset: Path, tmp_path: Path, *flags: str) -> TrainConfig:
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    required = ["--target-model-path", "MODEL", "--train-data-path", str(data), "--output-dir", str(tmp_path / "run")]
    return parse_config(TrainConfig, ["--config", str(preset), *required, *flags])


def test_there_is_one_for_every_size() -> None:
    assert [preset.stem for preset in PRESETS] == ["train-14b", "train-70b", "train-8b"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_key_reaches_the_config(preset: Path, tmp_path: Path) -> None:
    config = parse(preset, tmp_path)
    leaves = leaf_fields(TrainConfig)
    values = yaml.safe_load(preset.read_text())
    for section, keys in values.items():
        for key, value in keys.items():
            assert leaves[key][0] == (section,), f"{key} is in another section"
            assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_samples_per_step_are_what_the_comment_says(preset: Path, tmp_path: Path) -> None:
    text, config = preset.read_text(), parse(preset, tmp_path)
    found = re.search(r"(\d+) ranks x (\d+) x (\d+) = (\d+) samples per step", text)
    assert found
    ranks, batch, accumulation, samples = map(int, found.groups())
    assert f"--nproc_per_node {ranks} " in text
    assert (batch, accumulation) == (config.training.batch_size, config.training.accumulation_steps)
    assert ranks * batch * accumulation == samples
    if config.target.engine_devices is not None:  # split: the trainer's devices are others than the target's
        visible = re.search(r"CUDA_VISIBLE_DEVICES=([\d,]+)", text)
        assert visible
        assert not set(visible[1].split(",")) & set(config.target.engine_devices.split(","))
        assert len(config.target.engine_devices.split(",")) == config.target.tp_size


def test_a_flag_wins_and_a_misspelt_key_is_named(tmp_path: Path) -> None:
    preset = CONFIGS / "train-8b.yaml"
    assert parse(preset, tmp_path, "--learning-rate", "3e-4").optimizer.learning_rate == 3e-4
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(preset.read_text().replace("ttt_length", "ttt_lenght"))
    with pytest.raises(ConfigError, match="ttt_lenght: unknown key; did you mean 'ttt_length'"):
        parse(wrong, tmp_path)
