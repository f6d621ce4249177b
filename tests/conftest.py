"""Shared by all tests: one thread, no network, and the repository root on the path (for `benchmarks`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory):
    """Tiny models by family, loaded once a file."""
    from specforge_lite.capture.hf import load_target_model
    from tests.target_families import REMOTE_FAMILIES, save_family

    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            folder = save_family(family, tmp_path_factory.mktemp(family))
            loaded[family] = load_target_model(str(folder), "float32", torch.device("cpu"), family in REMOTE_FAMILIES)
        return loaded[family]

    return get
