"""Ranks follow the devices, and a GPU that torch cannot use is never replaced by the CPU silently."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from scripts import quickstart
from specforge_lite.core import devices
from specforge_lite.core.devices import without_cudnn
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.local_ranks import num_local_ranks
from specforge_lite.training.distributed import _own_device

DRIVER_TEXT = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.07  Sat Feb 17 22:55:48 UTC 2024\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A host with `gpus` usable GPUs, `cores` cores, and with or without an NVIDIA driver."""

    def make(gpus: int, cores: int = 2, driver: bool = False, built_for: str | None = "13.0") -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        control, facts = tmp_path / "nvidiactl", tmp_path / "nvidia"
        if driver:
            control.touch()
            facts.mkdir(exist_ok=True)
            (facts / "version").write_text(DRIVER_TEXT)
        monkeypatch.setattr(devices, "DRIVER_DEVICE", control)
        monkeypatch.setattr(devices, "DRIVER_FACTS", facts)

    return make


@pytest.mark.parametrize(
    ("gpus", "cores", "ranks"), [(1, 16, 1), (2, 1, 2), (8, 96, 8), (0, 16, 2), (0, 2, 2), (0, 1, 1)]
)
def test_ranks_follow_the_devices(machine, gpus: int, cores: int, ranks: int) -> None:  # type: ignore[no-untyped-def]
    machine(gpus, cores, driver=gpus > 0)
    assert num_local_ranks() == ranks


@pytest.mark.parametrize(("gpus", "ranks"), [(1, "1"), (3, "3"), (0, "2")])
def test_quickstart_starts_one_rank_per_gpu(  # type: ignore[no-untyped-def]
    machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, ranks: str
) -> None:
    machine(gpus, cores=16)
    commands: dict[str, list[str]] = {}
    monkeypatch.setattr(
        quickstart.Stages, "run", lambda self, name, done, command, threads=0: commands.update({name: command})
    )
    monkeypatch.setattr(quickstart, "finish", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output-dir", str(tmp_path)])
    (tmp_path / "cache").mkdir()
    quickstart.main()
    train = commands["train EAGLE-3 online"]
    assert train[train.index("--nproc_per_node") + 1] == ranks


def test_more_ranks_than_gpus_are_refused(machine) -> None:  # type: ignore[no-untyped-def]
    machine(1, 16)
    with pytest.raises(ConfigError, match=r"2 processes: this host has 1 visible GPU\(s\); start one process per GPU"):
        num_local_ranks(2)
    assert num_local_ranks(1) == 1
    machine(0, 1)
    assert num_local_ranks(4) == 4  # ranks may share a CPU


def test_a_driver_too_old_is_an_error_that_names_it(machine) -> None:  # type: ignore[no-untyped-def]
    machine(0, driver=True)
    pattern = (
        r"torch .* \(CUDA 13.0\) cannot use it: driver 535.161.07 is too old for CUDA 13.0.*CUDA_VISIBLE_DEVICES=-1"
    )
    for ask in (devices.num_gpus, devices.pick_device, num_local_ranks, lambda: _own_device(0)):
        with pytest.raises(ConfigError, match=pattern) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert devices.pick_device("cpu") == torch.device("cpu")  # asked for by name


def test_a_cpu_build_beside_a_gpu_and_a_container_without_it(machine) -> None:  # type: ignore[no-untyped-def]
    machine(0, driver=True, built_for=None)
    with pytest.raises(ConfigError, match="is a build without CUDA"):
        devices.pick_device()
    machine(0, driver=True)
    devices.DRIVER_DEVICE.unlink()
    with pytest.raises(ConfigError, match="this container has no GPU; start it with --gpus all"):
        devices.pick_device()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_hidden_on_purpose_mean_the_cpu(machine, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:  # type: ignore[no-untyped-def]
    machine(0, cores=1, driver=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert devices.pick_device() == torch.device("cpu")
    assert num_local_ranks() == 1


def test_a_device_by_name(machine, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    machine(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.pick_device() == torch.device("cuda", 1)
    assert devices.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"device cuda:2: 2 visible GPU\(s\) on this host; expected cuda:0"):
        devices.pick_device("cuda:2")
    with pytest.raises(ConfigError, match="device 'gpu0': expected cpu, cuda or cuda:N"):
        devices.pick_device("gpu0")
    machine(0)
    with pytest.raises(ConfigError, match="device cuda: torch sees no GPU on this host; expected cpu"):
        devices.pick_device("cuda")


def test_a_gpus_attention_keeps_away_from_cudnn() -> None:
    """Every new length would be a plan of its own there."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    with without_cudnn(torch.device("cuda")):
        assert not enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert enabled() == before
