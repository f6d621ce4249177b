"""Drafts served and ranked: what is checked first, both ways of drafting, the workload's arithmetic, the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.benchmark.choice import Point, rank
from specforge_lite.benchmark.configs import BASELINE, BenchConfig, Speculation
from specforge_lite.benchmark.engines import configs_of, read_drafts
from specforge_lite.benchmark.rows import SpeedupRow, read_rows
from specforge_lite.checkpoints.export import export_draft
from specforge_lite.core.errors import CheckpointError, ConfigError, DataError
from specforge_lite.report.speedup import sampling_table
from specforge_lite.serving import environment, launch
from specforge_lite.serving.environment import Interpreter
from specforge_lite.serving.launch import launch_script
from specforge_lite.serving.session import ServingOptions
from tests.checkpoints.test_load_draft import write_checkpoint
from tests.inference_drafts import random_draft
from tests.script_runner import run_in_process

CHAIN = Speculation(3, 1, 4)
SAMPLED = Speculation(3, 1, 4, "sampled")


def row(
    size: int, temperature: float, way: Speculation, throughput: float, draft: str = "a", **more: Any
) -> SpeedupRow:
    named = {} if way.is_baseline else {"draft": draft, "draft_fingerprint": draft, "verification_passes": 50}
    return SpeedupRow(
        "x", size, **vars(way), throughput=throughput, completion_tokens=100, duration=1.0, num_prompts=4,
        num_requests=4, temperature=temperature, **({"acc_length": 2.0} | named | more),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the choice


def test_the_best_is_the_fastest_for_the_stated_mix() -> None:
    """a: fast alone, b: fast in a batch. 3 tokens of 4 at batch 8: 4 / (1/T1 + 3/T8)."""
    rows = [
        row(1, 0.0, BASELINE, 100), row(8, 0.0, BASELINE, 400),
        row(1, 0.0, CHAIN, 300, "a"), row(8, 0.0, CHAIN, 200, "a"),
        row(1, 0.0, CHAIN, 150, "b"), row(8, 0.0, CHAIN, 600, "b"),
    ]  # fmt: skip
    assert rank(rows, [Point(1, 0.0)])[0].draft.name == "a"
    best = rank(rows, [Point.parse("1/0"), Point.parse("8/0:3")])
    assert [candidate.draft.name for candidate in best] == ["b", "", "a"]
    assert best[0].tokens_per_second == pytest.approx(4 / (1 / 150 + 3 / 600))
    assert best[0].speedup == pytest.approx(best[0].tokens_per_second / (4 / (1 / 100 + 3 / 400)))
    assert best[0].acc_length == 2.0
    assert best[1].acc_length is None


def test_one_server_serves_all_temperatures_of_a_mix() -> None:
    """Greedy requests of a server that samples drafts are drafted greedily, so their row counts for both ways."""
    rows = [
        *(row(1, t, BASELINE, 100) for t in (0.0, 0.7)),
        row(1, 0.0, CHAIN, 200), row(1, 0.7, CHAIN, 110), row(1, 0.7, SAMPLED, 150),
    ]  # fmt: skip
    mix = rank(rows, [Point(1, 0.0), Point(1, 0.7)])
    assert [c.speculation.draft_sampling for c in mix] == ["sampled", "greedy", "greedy"]
    assert mix[0].tokens_per_second == pytest.approx(2 / (1 / 200 + 1 / 150))
    assert [c.speculation for c in rank(rows, [Point(1, 0.0)])] == [CHAIN, BASELINE]
    with pytest.raises(DataError, match=r"workload 8/0: not all of it was measured without a draft"):
        rank(rows, [Point(8, 0.0)])


@pytest.mark.parametrize("text", ["8", "0/1", "8/-1", "8/nan", "8/1:0", "8/1:x", "a/1"])
def test_workloads_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected CONCURRENCY/TEMPERATURE"):
        Point.parse(text)


def test_both_ways_of_drafting_stand_side_by_side() -> None:
    rows = [row(1, 0.7, CHAIN, 100), row(1, 0.7, SAMPLED, 120, acc_length=2.5), row(1, 0.0, CHAIN, 200)]
    table = sampling_table([each.to_dict() for each in rows])
    assert table is not None
    assert table.rows == [["x", "a", "0.7", "1,3,1,4", "2.00", "2.50", "+25.0%", "100.0", "120.0", "+20.0%"]]
    assert sampling_table([rows[0].to_dict()]) is None


# ------------------------------------------------------------------------------------------------ what is checked first


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def there(is_there: bool) -> None:
        for module in (environment, launch, __import__("specforge_lite.benchmark.engines", fromlist=["x"])):
            monkeypatch.setattr(module, "has_gpu", lambda _: is_there)

    return there


def drafted(backend: str, target: Path, folder: Path, *modes: str) -> list[BenchConfig]:
    options = ServingOptions(backend, str(target))
    (draft,) = read_drafts([folder], options)
    return configs_of(draft, [BenchConfig(1, CHAIN)], [0.0, 0.7], modes or ("greedy", "sampled"), options)


def test_drafts_are_sampled_where_the_engine_can(
    tiny_target: Path, tmp_path: Path, gpu: Callable[[bool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, vocab in (("part", 500), ("whole", 4096)):
        export_draft(random_draft(128, 4096, vocab, max_position_embeddings=1024), tmp_path / name)
    ways = [BenchConfig(1, CHAIN), BenchConfig(1, CHAIN, 0.7), BenchConfig(1, SAMPLED, 0.7)]
    gpu(True)
    assert drafted("vllm", tiny_target, tmp_path / "part") == ways
    assert drafted("sglang", tiny_target, tmp_path / "whole") == ways
    assert drafted("sglang", tiny_target, tmp_path / "part") == ways[:2]
    assert "part: drafted tokens are not sampled: sglang draws only from the target's whole" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"draft_sampling: part: sglang draws only .* expected greedy"):
        drafted("sglang", tiny_target, tmp_path / "part", "sampled")


def test_drafts_that_would_not_be_served_are_refused_first(tiny_target: Path, tmp_path: Path) -> None:
    options = ServingOptions("vllm", str(tiny_target))
    good = export_draft(random_draft(128, 4096, 500, max_position_embeddings=1024), tmp_path / "x" / "draft")
    other = export_draft(random_draft(128, 1000, 500, max_position_embeddings=1024), tmp_path / "y" / "draft")
    with pytest.raises(CheckpointError, match=r"y/draft: .*1000"):
        read_drafts([good, other], options)
    write_checkpoint(tmp_path / "run" / "step_9", random_draft(aux_layer_ids=(1, 3, 4)), 9)
    with pytest.raises(CheckpointError, match=r"step_9: of a target of width .* has 128 and 4096"):
        read_drafts([tmp_path / "run"], options)
    (tmp_path / "run" / "step_9" / "draft.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all damaged"):
        read_drafts([tmp_path / "run"], options)
    with pytest.raises(ConfigError, match="the same draft twice"):
        read_drafts([good, good], options)
    shutil.copytree(good, tmp_path / "z" / "draft")
    assert [draft.facts.name for draft in read_drafts([good, tmp_path / "z" / "draft"], options)] == [
        "x/draft",
        "z/draft",
    ]


def test_a_cpu_that_answers_greedily_is_no_place_for_a_temperature(
    tiny_target: Path, tmp_path: Path, gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the benchmarks, a live check of a draft and an evaluation of checkpoints, before anything is decoded."""
    from specforge_lite.benchmark import engines

    gpu(False)
    monkeypatch.setattr(launch, "find_interpreter", lambda *_: None)
    options = ServingOptions("sglang", str(tiny_target))
    engines.check_options(options, [0.0], True)
    engines.check_options(options, [0.7], False)
    greedily = r"temperature 0\.7: sglang on a CPU answers greedily with a draft"
    with pytest.raises(ConfigError, match=greedily):
        engines.check_options(options, [0.0, 0.7], True)
    draft = export_draft(random_draft(128, 4096, 500, max_position_embeddings=1024), tmp_path / "draft")
    words = [str(draft), "--target-model-path", str(tiny_target), "--live", "sglang", "--temperature", "0.7"]
    with pytest.raises(ConfigError, match=greedily):
        run_in_process("check_draft", words)
    write_checkpoint(tmp_path / "run" / "step_4", random_draft(128, 4096, 500, aux_layer_ids=(1, 3, 4)), 4)
    words = [str(tmp_path / "run"), "--target-model-path", str(tiny_target), "--served", "sglang", "--served-point"]
    words += ["8/0.7", "--eval-data-path", str(tmp_path / "eval.jsonl")]
    with pytest.raises(ConfigError, match=r"eval_data_path: no such file: .*eval\.jsonl"):
        run_in_process("evaluate_checkpoints", words)
    (tmp_path / "eval.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=greedily):
        run_in_process("evaluate_checkpoints", words)


def test_the_command_of_the_best_has_its_flags(
    tiny_target: Path, tmp_path: Path, gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = export_draft(random_draft(128, 4096, 500, max_position_embeddings=1024), tmp_path / "draft")
    monkeypatch.setattr(launch, "find_interpreter", lambda *_: Interpreter("/env/python", "vllm", "0.32.0", None))
    gpu(True)
    options = ServingOptions(
        "vllm", str(tiny_target), str(draft), 3, 1, 4, temperature=1.0, port=30000, engine_args=("seed=5",),
        engine_devices="0,1",
    )  # fmt: skip
    lines = launch_script(options).splitlines()
    assert lines[0] == "#!/bin/sh"
    assert "export CUDA_VISIBLE_DEVICES=0,1" in lines
    assert "exec /env/python -m vllm.entrypoints.openai.api_server \\" in lines
    assert any('"draft_sample_method": "probabilistic"' in line for line in lines)
    assert lines[-1] == "  --seed 5"


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_script_from_end_to_end(tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two checkpoints of a run and an exported draft, in our own decoder; a second start measures nothing again."""
    for step in (4, 8):
        network = random_draft(128, 4096, 500, aux_layer_ids=(1, 3, 4), max_position_embeddings=1024)
        write_checkpoint(tmp_path / "run" / f"step_{step}", network, step)
    export_draft(network, tmp_path / "draft", dtype="float32")
    output = tmp_path / "out" / "results.jsonl"
    words = [
        str(tmp_path / "run"), str(tmp_path / "draft"), "--model-path", str(tiny_target), "--backend", "hf", "--dtype",
        "float32", "--concurrency", "2", "--temperature", "0", "0.7", "--steps", "2", "--benchmark-list", "gsm8k:2",
        "--max-new-tokens", "10", "--workload", "2/0.7", "--output", str(output),
    ]  # fmt: skip
    assert run_in_process("serve_acceptance", words) == 0
    printed = capsys.readouterr().out
    assert "way to serve" in printed
    assert "best for 2/0.7:1:" in printed
    rows = read_rows(output)
    plain = [(r.temperature, r.batch_size) for r in rows if not r.steps]
    assert plain == [(0.0, 2), (0.7, 2)]
    assert [(r.draft, r.temperature, r.draft_sampling) for r in rows if r.steps] == [
        (name, *way)
        for name in ("step_4", "step_8", "draft")
        for way in ((0.0, "greedy"), (0.7, "greedy"), (0.7, "sampled"))
    ]
    assert all(r.identical_share == 1.0 for r in rows if r.steps and not r.temperature)
    page = output.with_suffix(".html").read_text()
    assert "Acceptance length for the workload" in page
    assert "step_8, chain of 2, sampled" in page
    assert not (tmp_path / "out" / "launch.sh").exists()
    before = output.read_text()
    assert run_in_process("serve_acceptance", [*words, "--workload", "2/0"]) == 0
    assert output.read_text() == before
    assert "rows are in" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"workload: '8/0' is not measured; expected one of --concurrency 2"):
        run_in_process("serve_acceptance", [*words, "--workload", "8/0"])


def test_a_plan_is_made_of_one_temperature_and_way(tmp_path: Path) -> None:
    times = {"seconds_per_pass": 0.1, "acceptance_per_position": [0.5, 0.2, 0.1], "mean_first_token_seconds": 0.1}
    ways = ((0.0, BASELINE), (0.7, BASELINE), (0.0, CHAIN), (0.7, CHAIN), (0.7, SAMPLED))
    rows = [row(1, temperature, way, 9 + place, **times) for place, (temperature, way) in enumerate(ways)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(each.to_dict()) + "\n" for each in rows))
    with pytest.raises(ConfigError, match=r"temperature: .* has 0\.0, 0\.7; choose one"):
        run_in_process("plan_speculation", ["--results", str(path)])
    with pytest.raises(ConfigError, match=r"draft_sampling: .* has greedy, sampled; choose one"):
        run_in_process("plan_speculation", ["--results", str(path), "--temperature", "0.7"])
    words = ["--results", str(path), "--temperature", "0.7", "--draft-sampling", "sampled"]
    assert run_in_process("plan_speculation", words) == 0
