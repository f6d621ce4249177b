"""`--max-length` against the positions a target has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from specforge_lite.capture.base import num_positions
from tests.script_runner import end_of_script


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        # these two give the stretched number themselves
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 163840,
                "rope_parameters": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}},
          "max_position_embeddings": 1000}, 8000),
        ({}, None),
    ],
)  # fmt: skip
def test_positions_of_a_target(values: dict, expected: int | None) -> None:
    assert num_positions(SimpleNamespace(**values)) == expected


def flags(tmp_path: Path, target: Path) -> list[str]:
    (tmp_path / "train.jsonl").touch()
    return ["--target-model-path", str(target), "--target-backend", "hf", "--output-dir", str(tmp_path / "out"),
            "--train-data-path", str(tmp_path / "train.jsonl"), "--cache-dir", str(tmp_path / "cache")]  # fmt: skip


@pytest.mark.parametrize("script", ["train_eagle3_online", "train_eagle1"])
def test_a_length_beyond_the_target_is_refused_before_anything_starts(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    limit = json.loads((tiny_target / "config.json").read_text())["max_position_embeddings"]
    words = [*flags(tmp_path, tiny_target), "--max-length", str(limit + 1)]
    code, error = end_of_script(script, words, capsys)
    assert code == 2
    assert error == (
        f"error: max_length {limit + 1}: target {tiny_target} has positions for {limit} tokens; use --max-length"
        f" {limit} or less, or give its config.json rope scaling"
    )
    assert not (tmp_path / "cache").exists()


def test_rope_scaling_makes_room(tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_target, target)
    config = json.loads((target / "config.json").read_text())
    limit = config["max_position_embeddings"]
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
    (target / "config.json").write_text(json.dumps(config))
    code, error = end_of_script(
        "train_eagle3_online", [*flags(tmp_path, target), "--max-length", str(2 * limit)], capsys
    )
    assert code == 2
    assert "max_length" not in error  # what is wrong now is the empty data
    code, error = end_of_script(
        "train_eagle3_online", [*flags(tmp_path, target), "--max-length", str(2 * limit + 1)], capsys
    )
    assert f"has positions for {2 * limit} tokens" in error
