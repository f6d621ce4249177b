"""The memory planner: its terms against counts typed or made by other code, its peaks against measured ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bench_memory import Case
from benchmarks.bench_training import SHAPES, memory_of, needed_gemms
from benchmarks.block_step import block_draft, block_gemms
from specforge_lite.capture.offline import plan_capture
from specforge_lite.capture.settings import CaptureSection
from specforge_lite.cli.plan import hardware_tables
from specforge_lite.core.errors import ConfigError
from specforge_lite.model.config_json import config_from_file
from specforge_lite.model.draft import DraftConfig
from specforge_lite.model.registry import build_draft
from specforge_lite.training.estimate import (
    Workload,
    disk_bytes,
    memory_fraction,
    num_parameters,
    operations_per_step,
    plan_memory,
    step_time,
    tokens_per_second,
)
from tests.script_runner import run_in_process
from tests.training.test_training_processes import log_of
from tests.training_runs import INFO, run_ranks

ROOT = Path(__file__).resolve().parents[2]
LLAMA_8B = ROOT / "configs" / "llama-3.1-8b-eagle3.json"
SMALL = Case.parse("small:fp32-75")
BLOCK_SHAPE = replace(SHAPES["small"], length=256, vocab=8000)


def test_the_page_on_hardware_shows_what_the_plan_says_today() -> None:
    assert hardware_tables().strip() in (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")


def load_of(**changes: object) -> Workload:
    load = Workload(config_from_file(LLAMA_8B), tokens=8192, world_size=4)
    return replace(load, **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ measured


def measure(directory: Path, text: str) -> None:
    # The peak of the first two steps depends on what the heap happens to have free; from the third on it stays.
    (directory / "figures.json").write_text(json.dumps(Case.parse(text).measure(3)))


@pytest.mark.parametrize("text", ["small:fp32-75", "small@1024:bf16-75", "small@1024:fp32-75-checkpointing"])
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(tmp_path: Path, text: str) -> None:
    assert run_ranks(1, measure, (tmp_path, text), tmp_path / "log") == [0], log_of(tmp_path / "log")
    measured = json.loads((tmp_path / "figures.json").read_text())
    plan = Case.parse(text).predict()
    assert sum(plan.stays.values()) / 2**20 == pytest.approx(measured["inputs"], rel=0.05)
    assert plan.peak / 2**20 == pytest.approx(measured["peak"], rel=0.15)


def measure_block(directory: Path) -> None:
    memory_of("fp32-75", SHAPES["test"], "cpu", "dspark")  # libraries
    (directory / "figures.json").write_text(json.dumps(memory_of("fp32-75", BLOCK_SHAPE, "cpu", "dspark")))


def test_the_predicted_peak_of_a_block_draft_is_within_15_percent_of_the_measured_one(tmp_path: Path) -> None:
    assert run_ranks(1, measure_block, (tmp_path,), tmp_path / "log") == [0], log_of(tmp_path / "log")
    measured = json.loads((tmp_path / "figures.json").read_text())
    shape = BLOCK_SHAPE
    load = Workload(
        block_draft(shape).config, shape.length, precision="fp32", device="cpu", supervised=0.75, captured_ahead=0,
        sample_length=shape.length,
    )  # fmt: skip
    plan = plan_memory(load)
    states = ("weights, fp32 master", "optimizer state", "gradients")
    above_inputs = plan.peak - sum(size for name, size in plan.stays.items() if name not in states)
    assert above_inputs / 2**20 == pytest.approx(measured["peak"] - measured["inputs"], rel=0.15)


# --------------------------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize("changes", [{}, {"fc_norm": True}, {"target_hidden_size": 24}])
def test_parameters_are_those_of_the_draft(changes: dict) -> None:
    config = DraftConfig(16, 40, 4, 2, 50, 20, head_dim=6, **changes)
    t2d = torch.zeros(50, dtype=torch.bool)
    t2d[:20] = True
    draft = build_draft(config, torch.zeros(20, dtype=torch.int64), t2d)
    assert num_parameters(config) == sum(p.numel() for p in draft.parameters() if p.requires_grad)


def test_a_block_draft_of_8b_by_hand() -> None:
    """Qwen3-8B, 4,096 tokens of which all are supervised: figures of an independent count of the authors' code."""
    draft = config_from_file(ROOT / "configs" / "qwen3-8b-dspark.json")
    load = Workload(draft, 4096, sample_length=4096)
    assert num_parameters(draft) == 1_126_422_017
    assert disk_bytes(load, 1) == 48 * 1024  # five layers' outputs and the last state in bf16; EAGLE-3: 32 KiB
    assert operations_per_step(load) == pytest.approx(39.9e12, rel=0.02)
    assert operations_per_step(replace(load, num_anchors=256)) == pytest.approx(21.5e12, rel=0.03)
    plan = plan_memory(load)
    assert plan.stays["weights, fp32 master"] + plan.stays["optimizer state"] == 12 * num_parameters(draft)
    assert 24 < plan.peak / 2**30 < 32
    flex = plan_memory(replace(load, flex=True))
    assert flex.stays["block masks"] == 4 * 4 * 28 * 60 * 2  # 3,584 slots against 4,096 tokens and themselves
    assert flex.peak < plan.peak
    dflash = config_from_file(ROOT / "configs" / "qwen3-8b-dspark.json").replace(
        algorithm="dflash", markov_rank=0, confidence_head=False, block_size=16
    )
    assert num_parameters(dflash) == num_parameters(draft) - 2 * 151936 * 256 - (4096 + 256 + 1)
    fewer = replace(load, num_anchors=64)
    assert plan_memory(fewer).peak < plan.peak
    assert plan_memory(replace(load, activation_checkpointing=True)).peak < 0.95 * plan.peak


def test_operations_are_those_of_the_benchmark() -> None:
    shape = SHAPES["small"]
    operations = sum(2.0 * r * i * c * p for _, r, i, c, p in needed_gemms(shape, 1.0))
    draft = DraftConfig(shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.vocab, shape.draft_vocab)
    load = Workload(draft, shape.length, shape.num_steps, supervised=1.0, sample_length=shape.length)
    assert operations_per_step(load) == pytest.approx(operations, rel=0.05)  # 3% of the teachers are out of vocabulary
    operations = sum(2.0 * r * i * c * p for _, r, i, c, p in block_gemms(shape, 0.75))
    blocks = replace(load, draft=block_draft(shape).config, supervised=0.75)
    assert operations_per_step(blocks) == pytest.approx(operations, rel=0.05)


def test_disk_is_that_of_the_capture() -> None:
    config = CaptureSection(offline_dir=Path("unused"), states_dtype="bf16")
    draft = DraftConfig(INFO.hidden_size, 32, 4, 2, INFO.vocab_size, 40)
    expected = plan_capture(np.array([30, 70]), INFO, config).num_bytes
    assert disk_bytes(Workload(draft, 100), 100) == expected


def test_settings_move_the_terms_they_are_for() -> None:
    plain = plan_memory(load_of())
    sharded = plan_memory(load_of(sharding="fsdp2"))
    for term in ("weights, fp32 master", "optimizer state", "gradients"):
        assert sharded.stays[term] == plain.stays[term] / 4
    offloaded = plan_memory(load_of(sharding="fsdp2", cpu_offload=True))
    assert "optimizer state" not in offloaded.stays
    assert offloaded.host["optimizer state"] == sharded.stays["optimizer state"]
    shared = plan_memory(load_of(sp_size=4))
    assert shared.moments["loss"]["activations of step 3"] == plain.moments["loss"]["activations of step 3"] / 4
    assert plan_memory(load_of(optim="adamw_8bit")).stays["optimizer state"] < 0.26 * plain.stays["optimizer state"]
    assert plan_memory(load_of(activation_checkpointing=True)).peak < 0.8 * plain.peak
    assert plan_memory(load_of(supervised=0.1)).peak < 0.6 * plain.peak
    assert plan_memory(load_of(precision="fp32")).peak > 1.2 * plain.peak
    assert plan_memory(load_of(tied_head=True)).stays["target head"] == 0


def test_captured_states_are_counted_where_they_wait() -> None:
    name = "hidden states captured ahead"
    assert name in plan_memory(load_of()).host
    in_process = plan_memory(load_of(target_in_process=True))
    assert name not in in_process.host
    assert in_process.stays[name] == 2 * 8192 * 4 * 4096 * 2
    masks = plan_memory(load_of(flex=True)).stays["block masks"]
    assert masks == 4 * 4 * 64 * 64 * 7  # 64 blocks of 128 rows, 7 steps, four int32 tables


def test_the_time_of_a_step_by_hand() -> None:
    """8B shape, 4 x 2,048 tokens: 135 TFLOP; products alone take 0.21 s of Hopper at 65%."""
    load = load_of(world_size=1)
    time = step_time(load)
    assert operations_per_step(load) == pytest.approx(135e12, rel=0.03)
    assert time.products == pytest.approx(operations_per_step(load) / (989e12 * 0.65))
    assert 0.22 < time.seconds < 0.27
    assert time.mfu == pytest.approx(operations_per_step(load) / (989e12 * time.seconds))
    assert time.reduce == 0
    assert step_time(load_of(world_size=8)).reduce == pytest.approx(2 * 4 * num_parameters(load.draft) * 7 / 8 / 400e9)


def test_the_engines_share_of_a_gpu_is_what_the_plan_leaves() -> None:
    plan, gib = plan_memory(load_of()), 2**30
    left = 80 * gib - plan.peak - 2 * 1.5 * gib
    assert memory_fraction(plan, 16 * gib, 80 * gib) == pytest.approx(left / (80 * gib), abs=0.01)
    with pytest.raises(
        ConfigError, match=r"the trainer needs \d+\.\d GiB of this GPU's 40.0 GiB, which leaves \d+\.\d"
    ):
        memory_fraction(plan, 16 * gib, 40 * gib)


def test_memory_grows_linearly_with_the_tokens() -> None:
    first, second, third = (
        plan_memory(load_of(tokens=n)).peak for n in (32768, 65536, 98304)
    )  # one moment is the peak of all
    assert second - first == pytest.approx(third - second, rel=0.01)


def test_impossible_workloads_are_refused() -> None:
    with pytest.raises(ConfigError, match="sp_size 3: does not divide 4"):
        load_of(sp_size=3)
    with pytest.raises(ConfigError, match="precision fp8"):
        load_of(precision="fp8")


def test_speed_is_told_as_a_class() -> None:
    load = load_of()
    rate = load.tokens * 4 / step_time(load).seconds
    told = tokens_per_second(load)
    assert f"{told:.0f}".rstrip("0") in ("1", "2", "5")
    assert told <= rate < 2.5 * told


# -------------------------------------------------------------------------------------------------------------- script


def test_the_script_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--draft-model-config", str(LLAMA_8B), "--max-length", "4096", "--batch-size", "2", "--num-gpus", "8"]
    assert run_in_process("plan_memory", [*words, "--num-tokens", "1000000"]) == 0
    output = capsys.readouterr().out
    for part in ("activations of step 6", "optimizer state", "peak", "speed class", "32K per token, 30.5G in all"):
        assert part in output
    run_in_process("plan_memory", [*words, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert sum(report["terms"].values()) == pytest.approx(report["peak_bytes"])
    assert report["offline_bytes_per_token"] == 4 * 4096 * 2
    with pytest.raises(ConfigError, match=r"memory_gb 10: the peak is \d+\.\d GiB; try --activation-checkpointing"):
        run_in_process("plan_memory", [*words, "--memory-gb", "10"])
