"""Which GPU is shared with the target's server."""

from __future__ import annotations

import pytest
import torch

from specforge_lite.training.machine import _physical


def test_devices_are_named_as_on_the_whole_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _physical(torch.device("cuda", 1)) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5, 6")
    assert [_physical(torch.device("cuda", i)) for i in (0, 2)] == ["4", "6"]
