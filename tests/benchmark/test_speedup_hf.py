"""The benchmark on `SpeculativeModel`: counts equal the decoder's own, and the script from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_lite.benchmark.configs import BASELINE, Speculation
from specforge_lite.benchmark.engines import exported_draft
from specforge_lite.benchmark.hf import HfSession
from specforge_lite.benchmark.measure import Ask
from specforge_lite.benchmark.statistics import Counters, Record, acceptance_length, share_per_position
from specforge_lite.capture.hf import load_target_model
from specforge_lite.checkpoints.export import export_draft
from specforge_lite.checkpoints.loading import find_draft
from specforge_lite.cli import bench
from specforge_lite.core.errors import ConfigError
from specforge_lite.inference import GenerationSettings, SpeculativeModel, TreeShape
from specforge_lite.serving.session import ServingOptions
from tests.checkpoints.test_load_draft import write_checkpoint
from tests.inference_drafts import random_draft
from tests.speedup_drafts import ranked_draft

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 17, 9, 33, 21, 8], [7, 8, 9], [90, 100, *range(3, 26)]]
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> SpeculativeModel:
    target = load_target_model(str(tiny_target), "float32", torch.device("cpu"), False)
    answers = SpeculativeModel(target, None).generate(PROMPTS, NUM_TOKENS + 16, eos_token_id=[]).answers
    draft = ranked_draft(target.get_input_embeddings().weight, [answer.all_tokens for answer in answers])
    return SpeculativeModel(target, draft)


@pytest.mark.parametrize("speculation", [Speculation(1, 1, 2), Speculation(4, 1, 5), Speculation(3, 4, 12)], ids=str)
def test_counts_are_the_decoder_s(model: SpeculativeModel, speculation: Speculation) -> None:
    session = HfSession(model, speculation, eos_token_ids=[])
    session.begin()
    replies = session.generate([Ask(tuple(prompt), NUM_TOKENS) for prompt in PROMPTS])
    shape = TreeShape.from_steps(speculation.steps, speculation.topk, speculation.num_draft_tokens)
    own = model.run(PROMPTS, GenerationSettings(NUM_TOKENS, eos_token_id=[], shape=shape))
    assert [list(reply.token_ids) for reply in replies] == own.new_tokens
    assert sum(reply.passes or 0 for reply in replies) == own.stats.verification_passes
    shares = share_per_position([reply.accepted_at for reply in replies], own.stats.verification_passes)
    expected = own.stats.acceptance_per_position
    assert shares == expected[: len(shares)]
    assert not any(expected[len(shares) :])
    records = [Record(**vars(reply), prompt=i) for i, reply in enumerate(replies)]
    assert acceptance_length(records) == own.stats.acceptance_length
    assert max(len(reply.accepted_at) for reply in replies) == speculation.steps
    assert all(0 < reply.first_token_seconds < reply.seconds for reply in replies)
    assert 0 < (session.counters().draft_share or 0) < 1


def test_without_a_draft(model: SpeculativeModel) -> None:
    session = HfSession(model, BASELINE, eos_token_ids=[])
    replies = session.generate([Ask(tuple(prompt), NUM_TOKENS) for prompt in PROMPTS])
    assert [list(reply.token_ids) for reply in replies] == model.generate(
        PROMPTS, NUM_TOKENS, eos_token_id=[]
    ).new_tokens
    assert all(reply.passes is None for reply in replies)
    assert session.counters() == Counters()


def test_sampling_is_repeatable_and_every_call_is_different(model: SpeculativeModel) -> None:
    def answers() -> list[tuple[int, ...]]:
        session = HfSession(model, Speculation(2, 1, 3), seed=5, eos_token_ids=[])
        session.begin()
        return [session.generate([Ask(tuple(PROMPTS[0]), 20, 1.0)])[0].token_ids for _ in range(2)]

    first = answers()
    assert first == answers()
    assert first[0] != first[1]


# --------------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The script's `main` with these words on the command line."""

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_model_speedup.py", *words])
        bench.main()

    return run


def test_the_script_from_end_to_end(
    tiny_target: Path, tmp_path: Path, script: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A random draft: nothing is gained, everything is counted; a second start measures nothing again."""
    draft = tmp_path / "draft"
    export_draft(random_draft(128, 4096, 500, max_position_embeddings=1024), draft, dtype="float32")
    prompts = tmp_path / "mine.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": "One?"}, {"turns": ["Two?", "Three?"], "category": "chat"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "results.jsonl"
    words = [
        "--backend", "hf", "--model-path", str(tiny_target), "--speculative-draft-model-path", str(draft),
        "--target_dtype", "float32", "--config-list", "2,2,1,3", "2,2,2,4", "--max-new-tokens", "12",
        "--benchmark-list", str(prompts), "gsm8k:2", "--output", str(output), "--system-prompt", "Be brief.",
        "--chat-template-kwargs", '{"x": 1}',
    ]  # fmt: skip
    script(*words)
    table = capsys.readouterr().out
    assert "tokens per pass = completion tokens / verification passes" in table
    assert "in float32 that is all of them: so it is here" in " ".join(table.split())
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["benchmark"], r["steps"], r["topk"]) for r in found] == [
        (name, steps, topk) for steps, topk in ((0, 0), (2, 1), (2, 2)) for name in ("mine", "gsm8k")
    ]
    assert all(r["identical_share"] == 1.0 for r in found if r["steps"])
    assert all(r["num_requests"] == {"mine": 3, "gsm8k": 2}[r["benchmark"]] for r in found)
    assert all(0.9 < r["acc_length"] < 2 for r in found)
    page = output.with_suffix(".html").read_text()
    assert "Speed-up on gsm8k" in page
    assert "2,2,2,4" in page
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    script(*words, "--benchmark-list", "mtbench:1")
    assert capsys.readouterr().out.count("rows are in") == 3
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[:6] == found
    assert [r["benchmark"] for r in lines[6:]] == ["mtbench"] * 3
    with pytest.raises(ConfigError, match=r"this run has 5; choose another --output"):
        script(*words, "--seed", "5")


def test_a_training_checkpoint_is_exported_for_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output directory of a run means its newest complete checkpoint; hf reads that as it is."""
    for step in (12, 9):
        write_checkpoint(tmp_path / "run" / f"step_{step}", random_draft(aux_layer_ids=(1, 3, 4)), step)
    path = str(find_draft(tmp_path / "run"))
    assert path == str(tmp_path / "run" / "step_12")
    with exported_draft(ServingOptions("hf", "m", path)) as options:
        assert options.draft_path == path
    with exported_draft(ServingOptions("vllm", "m", path, dtype="float32")) as options:
        exported = Path(str(options.draft_path))
        config = json.loads((exported / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert (exported / "model.safetensors").exists()
    assert not exported.exists()
    output = capsys.readouterr().out
    assert "the output of a training run; taking step_12" in output
    assert "a training checkpoint, exported for this run" in output
    assert config["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-list", "4,3,1,4"], "drafting needs --speculative-draft-model-path"),
        (["--config-list", "1,0,0,0", "--tp-size", "2"], "--tp-size: --backend hf runs on one device"),
        (["--config-list", "1,0,0,0", "--port", "3"], "--port: only for --backend sglang or vllm"),
        (["--config-list", "1,0,0,0", "--chat-template-kwargs", "{"], "chat_template_kwargs: not JSON"),
        (["--config-list", "1,0,0,0", "--benchmark-list", "mt-bench"], "did you mean 'mtbench'"),
        (["--config-lst", "1,0,0,0"], "did you mean '--config-list'"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    tiny_target: Path, script: Callable[..., None], words: list[str], message: str
) -> None:
    backend = [] if "--backend" in words else ["--backend", "hf"]
    with pytest.raises(ConfigError) as raised:
        script("--model-path", str(tiny_target), *backend, *words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    command = [sys.executable, "bench_model_speedup.py", "--model-path", "x", "--config-list", "1,3,1,9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: config_list: '1,3,1,9': 3,1,9: a chain (TOPK 1) verifies STEPS + 1 = 4 tokens, VERIFY is 9\n"
    )
