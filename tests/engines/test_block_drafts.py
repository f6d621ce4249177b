"""A DFlash draft, trained here and served by vLLM; DSpark drafts are served on a GPU only."""

from __future__ import annotations

import json
from pathlib import Path

from training import TARGET, TrainingRuns, run_script

from specforge_lite.checkpoints.export import export_checkpoint
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.evaluation.compare_serving import compare_serving
from specforge_lite.serving.engine import ServingOptions

BLOCK_SIZE = 6
NUM_PROMPTS = 16


def test_vllm_accepts_of_a_dflash_draft_what_our_decoder_does(training: TrainingRuns, tmp_path: Path) -> None:
    """Trained on the prompts that are served, so that much is accepted: another layout or layer order would show."""
    data = training.data()
    run_script(
        "scripts/train_eagle3_online.py", "--draft-kind", "dflash", "--target-model-path", str(TARGET),
        "--train-data-path", str(data), "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "run"),
        "--target-backend", "hf", "--target-dtype", "float32", "--max-length", "512", "--batch-size", "4",
        "--num-epochs", "14", "--learning-rate", "3e-3", "--block-size", str(BLOCK_SIZE), "--num-draft-layers", "2",
        "--num-anchors", "48",
    )  # fmt: skip
    draft = export_checkpoint(tmp_path / "run", tmp_path / "draft", dtype="float32")
    tokenizer = load_tokenizer(str(TARGET))
    rows = [json.loads(line)["conversations"] for line in data.read_text().splitlines()[:NUM_PROMPTS]]
    prompts = [
        tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
        for row in rows
    ]
    steps = BLOCK_SIZE - 1
    options = ServingOptions(
        "vllm", str(TARGET), str(draft), num_steps=steps, num_draft_tokens=steps + 1, dtype="float32", max_length=512,
        concurrency=4, log_dir=tmp_path,
    )  # fmt: skip
    comparison = compare_serving(options, prompts, max_new_tokens=40)
    assert comparison.acceptance_length_ours > 1.15  # of a draft that learnt nothing all decoders accept the same: 1.0
    comparison.check()
