"""`check_draft.py --live` with both engines; and a draft that an engine is given wrong, whose mistake is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import TARGET, TrainingRuns, run_script

from specforge_lite.checkpoints.export import export_checkpoint
from specforge_lite.core.hub import load_config
from specforge_lite.evaluation.misreadings import likely_causes, misread_acceptance
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.serving.session import ServingOptions, ServingSession
from tests.target_families import random_model


@pytest.fixture(scope="module", params=["qwen3-moe", "llama3-tied"])
def other_target(
    request: pytest.FixtureRequest, training: TrainingRuns, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with `target`, a random one of experts or with tied embeddings, its `answers.jsonl`, and `draft`,
    which knows them by heart."""
    root = tmp_path_factory.mktemp(request.param)
    model = random_model(request.param, wide=True)
    model.resize_token_embeddings(load_config(TARGET).vocab_size)
    model.config.max_position_embeddings = 512  # less than a live check would serve
    model.save_pretrained(root / "target")
    for file in (*TARGET.glob("tokenizer*"), *TARGET.glob("chat_template*")):
        shutil.copy(file, root / "target")
    training.data()
    target = ("--target-model-path", str(root / "target"), "--target-backend", "hf", "--target-dtype", "float32")
    run_script(
        "scripts/generate_data_by_target.py", *target, "--raw-data-file", str(training.directory / "raw.jsonl"),
        "--output-dir", str(root / "shards"), "--output-file", str(root / "answers.jsonl"), "--max-tokens", "48",
        "--temperature", "0",
    )  # fmt: skip
    run_script(
        "scripts/train_eagle3_online.py", *target, "--train-data-path", str(root / "answers.jsonl"), "--cache-dir",
        str(root / "cache"), "--output-dir", str(root / "run"), "--max-length", "256", "--batch-size", "4",
        "--ttt-length", "3", "--total-steps", "100", "--learning-rate", "3e-3", "--save-interval", "0",
        "--draft-vocab-size", "1024",
    )  # fmt: skip
    words = ("--checkpoint", str(root / "run"), "--output-dir", str(root / "draft"), "--dtype", "float32")
    run_script("scripts/export_draft.py", *words)
    return root


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_experts_and_tied_embeddings_are_checked_live(other_target: Path, tmp_path: Path, engine: str) -> None:
    done = run_script(
        "scripts/check_draft.py", str(other_target / "draft"), "--target-model-path", str(other_target / "target"),
        "--live", engine, "--target-dtype", "float32", "--prompts", str(other_target / "answers.jsonl"),
        "--num-prompts", "16", "--max-new-tokens", "48", "--log-dir", str(tmp_path),
    )  # fmt: skip
    (line,) = (line for line in done.splitlines() if f"served by {engine}" in line)
    assert "OK" in line, done


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
