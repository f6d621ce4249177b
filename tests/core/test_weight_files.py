"""Which weight files count, and what a quantised tensor is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specforge_lite.checkpoints.contract import unused_weight_files
from specforge_lite.checkpoints.draft_files import pickled_files
from specforge_lite.core.errors import CheckpointError
from specforge_lite.core.quantized import dequantize
from specforge_lite.core.weight_files import (
    INDEX_FILE,
    read_weight,
    weight_files,
)

Make = Callable[[Path], None]


def tensors(name: str, **values: float) -> Make:
    return lambda directory: save_file({key: torch.tensor([value]) for key, value in values.items()}, directory / name)


def index(**weight_map: str) -> Make:
    return lambda directory: (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map})) and None


def make(directory: Path, *parts: Make) -> Path:
    for part in parts:
        part(directory)
    return directory


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([tensors("model.safetensors", a=1), tensors("old.safetensors", a=2, b=2)], {"a": 1.0}),
        ([tensors("zz.safetensors", a=1), tensors("aa.safetensors", b=2)], {"a": 1.0, "b": 2.0}),
        (
            [
                tensors("model-00001-of-00002.safetensors", a=1),
                tensors("model-00002-of-00002.safetensors", b=2),
                tensors("consolidated.safetensors", a=9, b=9),
                index(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"),
            ],
            {"a": 1.0, "b": 2.0},
        ),
        ([tensors("model.safetensors", a=1, extra=3), index(a="model.safetensors")], {"a": 1.0}),
        ([tensors("model.safetensors", a=1), lambda d: torch.save({"a": 2}, d / "pytorch_model.bin")], {"a": 1.0}),
        ([tensors("model.safetensors", a=1), tensors("adapter_model.safetensors", a=5)], {"a": 1.0}),
    ],
)
def test_which_files_count(tmp_path: Path, parts: list[Make], expected: dict[str, float]) -> None:
    files = weight_files(make(tmp_path, *parts))
    found = {name: read_weight(files, name) for name in files}
    assert {name: float(tensor) for name, tensor in found.items() if tensor is not None} == expected


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([tensors("a.safetensors", x=1), tensors("b.safetensors", x=2)], "x is in a.safetensors and in b.safetensors"),
        (
            [tensors("model.safetensors", x=1), tensors("s-1.safetensors", x=2), index(x="s-1.safetensors")],
            "model.safetensors, and an model.safetensors.index.json that does not name it",
        ),
        ([tensors("model-00001-of-00003.safetensors", x=1)], "model-00002-of-00003.safetensors: missing"),
        ([tensors("model.safetensors", x=1), lambda d: (d / "adapter_config.json").write_text("{}")], "merge it"),
        ([lambda d: torch.save({"a": 2}, d / "pytorch_model.bin")], "no *.safetensors here"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path: Path, parts: list[Make], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        weight_files(make(tmp_path, *parts))
    assert message in str(error.value)


def test_pickled_shards_follow_the_same_rules(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin"):
        (tmp_path / name).touch()
    assert [file.name for file in pickled_files(tmp_path)] == ["pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin: missing"):
        pickled_files(tmp_path)


def test_files_that_engines_would_read_as_well_are_named(tmp_path: Path) -> None:
    make(tmp_path, tensors("model.safetensors", a=1), tensors("old.safetensors", a=2))
    assert [file.name for file in unused_weight_files(tmp_path)] == ["old.safetensors"]


@pytest.mark.parametrize("shape", [(1,), (), (300, 1), (300,), (3, 2), (3, 1)])
def test_fp8_times_its_scale(shape: tuple[int, ...]) -> None:
    """By hand: number, row and block scales (blocks of 128 on a 300 x 200 matrix, the last ones cut)."""
    torch.manual_seed(0)
    weight = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    result = dequantize(weight, scale)
    assert result is not None
    places = [(0, 0), (127, 128), (128, 127), (299, 199)]
    factors = {
        (1,): [scale.reshape(-1)[0]] * 4,
        (): [scale.reshape(-1)[0]] * 4,
        (300, 1): [scale.reshape(-1)[row % scale.numel()] for row, _ in places],
        (300,): [scale.reshape(-1)[row % scale.numel()] for row, _ in places],
        (3, 2): [scale.reshape(-1)[i % scale.numel()] for i in (0, 1, 2, 5)],
        (3, 1): [scale.reshape(-1)[i % scale.numel()] for i in (0, 0, 1, 2)],
    }[shape]
    for (row, column), factor in zip(places, factors):
        torch.testing.assert_close(result[row, column].float(), weight[row, column].float() * factor, rtol=8e-3, atol=0)


def test_one_byte_tensors_are_never_read_as_weights(tmp_path: Path) -> None:
    stored = {
        "fp8.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "fp8.weight_scale_inv": torch.full((1, 1), 0.25),
        "alone.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "packed.weight": torch.ones(4, 2, dtype=torch.uint8),
        "packed.weight_scale": torch.ones(4, 1),
    }
    save_file(stored, tmp_path / "model.safetensors")
    files = weight_files(tmp_path)
    assert torch.equal(read_weight(files, "fp8.weight"), torch.full((4, 4), 0.25, dtype=torch.bfloat16))
    assert read_weight(files, "alone.weight") is None
    assert read_weight(files, "packed.weight") is None
    assert read_weight(files, "absent.weight") is None
