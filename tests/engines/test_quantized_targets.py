"""A quantised target that vLLM serves on a CPU: the teacher is what is served, and the draft fits it. FP8 needs AMX
there, NVFP4 a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import TARGET, TrainingRuns, run_script

from specforge_lite.capture.remote import RemoteEngine
from specforge_lite.core.hub import load_config
from specforge_lite.core.sections import TargetSection
from specforge_lite.model.target_head import load_target_head
from specforge_lite.serving.registry import open_engine
from specforge_lite.serving.session import ServingOptions, ServingSession
from specforge_lite.types import TokenizedSample
from tests.quantized_targets import quantize


@pytest.mark.parametrize("scheme", ["int8", "awq", "gptq", "packed-int4"])
def test_the_teacher_is_what_is_served(training: TrainingRuns, tmp_path: Path, scheme: str) -> None:
    target, prompts = tmp_path / scheme, training.prompts()
    quantize(TARGET, target, scheme)
    answers = tmp_path / "answers.jsonl"
    with ServingSession(ServingOptions("vllm", str(target), max_length=512, log_dir=tmp_path)) as session:
        served = session.generate(prompts, 48).outputs
        run_script(
            "scripts/generate_data_by_target.py", "--model-name", str(target), "--raw-data-file",
            str(training.directory / "raw.jsonl"), "--output-dir", str(tmp_path / "answers"), "--output-file",
            str(answers), "--max-tokens", "96", "--temperature", "0", "--server-address-port", session.url,
        )  # fmt: skip
    section = TargetSection(target_model_path=str(target), target_backend="vllm", transport_dir=tmp_path)
    engine = open_engine(section, 400, log_dir=tmp_path, wait_minutes=5)
    assert isinstance(engine, RemoteEngine)
    try:
        head = load_target_head(target, load_config(str(target), False))
        equal = total = 0
        for prompt, answer in zip(prompts, served, strict=True):
            ids = torch.tensor([*prompt, *answer])
            (state,) = engine.capture([TokenizedSample("s", ids, ids >= 0)])
            chosen = head.logits(head.norm(state.last_LH).float()).argmax(-1)[len(prompt) - 1 : -1]
            equal, total = equal + int((chosen == ids[len(prompt) :]).sum()), total + len(answer)
        assert equal / total > 0.98  # what is left are near ties, in bf16 and in another batch
        run_script(
            "scripts/train_eagle3_online.py", "--target-model-path", str(target), "--target-backend", "vllm",
            "--target-url", engine._urls[0], "--train-data-path", str(answers), "--cache-dir", str(tmp_path / "cache"),
            "--output-dir", str(tmp_path / "run"), "--max-length", "256", "--batch-size", "4", "--ttt-length", "3",
            "--total-steps", "100", "--learning-rate", "3e-3", "--save-interval", "0", "--draft-vocab-size", "1024",
            "--eval-interval", "0",
        )  # fmt: skip
    finally:
        engine.close()
    run_script(
        "scripts/export_draft.py", "--checkpoint", str(tmp_path / "run"), "--output-dir", str(tmp_path / "draft")
    )
    run_script(  # exit code 0: accepted as by our decoder, which runs the dequantised weights
        "scripts/check_draft.py", str(tmp_path / "draft"), "--target-model-path", str(target), "--live", "vllm",
        "--prompts", str(answers), "--num-prompts", "16", "--max-new-tokens", "48", "--log-dir", str(tmp_path),
    )  # fmt: skip
