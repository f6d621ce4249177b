"""check_draft.py and export_draft.py as a user calls them: table, clear lines, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge_lite.checkpoints.export import export_draft
from specforge_lite.core.errors import ConfigError
from tests.inference_drafts import random_draft
from tests.script_runner import run_in_process


def test_a_good_draft(tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = random_draft(128, 4096, 500, max_position_embeddings=1024)
    folder = export_draft(draft, tmp_path / "draft")
    assert run_in_process("check_draft", [str(folder), "--target-model-path", str(tiny_target)]) == 0
    printed = capsys.readouterr().out
    assert "BROKEN" not in printed
    assert "nothing found that an engine would refuse or serve wrong" in printed


def test_a_broken_draft(tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export_draft(random_draft(128, 4096, 500), tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert run_in_process("check_draft", ["--draft-model-path", str(folder)]) == 2
    printed = capsys.readouterr().out
    assert "BROKEN" in printed
    assert "broken: tied embeddings: tie_word_embeddings is true; expected false: SGLang would use" in printed
    with pytest.raises(ConfigError, match="target_model_path"):
        run_in_process("check_draft", [str(folder), "--target-model-path", str(tmp_path / "nowhere")])


def test_a_missing_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("check_draft", [str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().out
