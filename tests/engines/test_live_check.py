"""`check_draft.py --live` with both engines; and a draft that an engine is given wrong, whose mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import TARGET, TrainingRuns, run_script

from specforge_lite.checkpoints.export import export_checkpoint
from specforge_lite.evaluation.misreadings import likely_causes, misread_acceptance
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.serving.session import ServingOptions, ServingSession


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_draft_is_checked_live_and_a_mistake_is_named(training: TrainingRuns, tmp_path: Path, engine: str) -> None:
    draft = training.exported_draft()
    run_script(
        "scripts/check_draft.py", str(draft), "--target-model-path", str(TARGET), "--live", engine, "--target-dtype",
        "float32", "--prompts", str(training.data()), "--num-prompts", "16", "--max-new-tokens", "48", "--log-dir",
        str(tmp_path),
    )  # fmt: skip
    damaged = export_checkpoint(training.directory / "hf", tmp_path / "draft", dtype="float32")
    stored = load_file(damaged / "model.safetensors")
    stored["fc.weight"] = torch.cat(stored["fc.weight"].chunk(3, dim=1)[::-1], dim=1).contiguous()
    save_file(stored, damaged / "model.safetensors")
    prompts, settings = training.prompts(), training.decode_settings()
    whole = SpeculativeModel.from_pretrained(str(TARGET), draft, num_draft_tokens=3, dtype="float32", device="cpu")
    options = ServingOptions(engine, str(TARGET), str(damaged), dtype="float32", max_length=512, log_dir=tmp_path)
    with ServingSession(options) as session:
        session.generate(prompts, training.max_new_tokens)
        found = session.acceptance()
    served = [count / found.num_passes for count in found.accepted_at]
    causes = likely_causes(misread_acceptance(whole, prompts, settings), served)
    assert any(text.startswith("layer order: fc gets layers 6, 3, 0") for text in causes), (served, causes)
