"""Shared by all tests: one thread, no network, and the repository root on the path (for `benchmarks.reference`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_target() -> Path:
    """The trained 2.5M-parameter target that ships with the package."""
    return ROOT / "specforge_lite" / "assets" / "tiny_target"
