"""Which GPU is shared with the target's server, and how it is divided."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import parse_config
from specforge_lite.training.gpu_share import _physical, share_of_gpu
from specforge_lite.training.settings import TrainConfig


def test_devices_are_named_as_on_the_whole_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _physical(torch.device("cuda", 1)) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5, 6")
    assert [_physical(torch.device("cuda", i)) for i in (0, 2)] == ["4", "6"]


def test_a_server_on_the_trainers_gpu_gets_what_the_plan_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: memory)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    words = ["--target-model-path", str(tiny_target), "--train-data-path", str(data), "--output-dir", str(tmp_path)]
    words += ["--target-backend", "sglang", "--max-length", "512"]

    def fraction(*more: str) -> float | None:
        return share_of_gpu(parse_config(TrainConfig, [*words, *more]), torch.device("cuda", 0)).target.mem_frac

    small, large = fraction(), fraction("--batch-size", "512")
    assert small is not None
    assert large is not None
    assert 0.3 < large < small < 1
    assert f"mem_frac {small}: the target's server shares this GPU" in capsys.readouterr().out
    assert fraction("--mem-frac", "0.4") == 0.4
    assert fraction("--engine-devices", "1") is None
    assert fraction("--engine-devices", "1,0") == small
    assert fraction("--target-url", "http://127.0.0.1:1") is None
    memory.total_memory = 2 << 30
    with pytest.raises(ConfigError, match=r"mem_frac: the trainer needs .* GiB of this GPU's 2.0 GiB"):
        fraction()
