"""The data and benchmark commands of SpecForge's documents, as they are spelled there, on the shipped target."""

from __future__ import annotations

import json
from pathlib import Path

from specforge_lite.checkpoints.export import export_draft
from tests.inference_drafts import random_draft
from tests.script_runner import run_in_process
from tests.training_runs import run_script


def test_prepare_then_the_command_that_reads_it(tmp_path: Path, tiny_target: Path) -> None:
    """`prepare_data.py --dataset sharegpt --output_path D`, then build_eagle3_dataset_cache.py on D/sharegpt.jsonl."""
    rows = [
        {"id": str(i), "conversations": [{"from": "human", "value": f"Tom has {i} apples and buys 4. How many?"},
                                         {"from": "gpt", "value": f"He has {i + 4} apples."}]}
        for i in range(6)
    ]  # fmt: skip
    source, data = tmp_path / "source.json", tmp_path / "data"
    source.write_text(json.dumps(rows))
    words = ["--dataset", "sharegpt", "--output_path", str(data), "--data-path", str(source)]
    assert run_in_process("prepare_data", words) == 0
    assert len((data / "sharegpt.jsonl").read_text().splitlines()) == len(rows)
    assert (data / "sharegpt_rejected.jsonl").read_text() == ""
    words = [
        "--target-model-path", str(tiny_target), "--draft-model-config", "configs/tiny-target-eagle3.json",
        "--train-data-path", str(data / "sharegpt.jsonl"), "--cache-dir", str(tmp_path / "cache"),
        "--chat-template", "chatml", "--max-length", "128", "--view-train-data", "1", "2",
    ]  # fmt: skip
    assert run_in_process("build_eagle3_dataset_cache", words) == 0


def test_the_benchmark_card(tmp_path: Path, tiny_target: Path) -> None:
    """Found from the repository root; fewer prompts, and the engine that every machine has."""
    draft = export_draft(
        random_draft(128, 4096, 500, max_position_embeddings=1024), tmp_path / "draft", dtype="float32"
    )
    words = [
        "--model-path", str(tiny_target), "--speculative_draft_model_path", str(draft),
        "--trust-remote-code", "--tp-size", "1",
        "--config-list", "1,0,0,0", "1,3,1,4", "--benchmark-list", "mtbench:1", "gsm8k:1", "humaneval:1", "math500:1",
        "--output", str(tmp_path / "output.jsonl"), "--backend", "hf", "--max-new-tokens", "6",
    ]  # fmt: skip
    done = run_script("bench_model_speedup.py", words, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()]
    assert {(row["benchmark"], row["steps"]) for row in found} == {
        (name, steps) for name in ("mtbench", "gsm8k", "humaneval", "math500") for steps in (0, 3)
    }
    names = {"batch_size", "steps", "topk", "num_draft_tokens", "acc_length", "throughput", "speedup",
             "completion_tokens", "duration", "benchmark"}  # fmt: skip
    assert names <= set(found[0])
