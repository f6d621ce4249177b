"""The trainer's parts one by one: settings, schedule, update, metrics, acceptance walk, trackers, provenance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_lite.checkpoints.training_run import verify_checkpoint
from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.core.files import write_atomically
from specforge_lite.core.jsonl import read_jsonl
from specforge_lite.core.log import format_bytes
from specforge_lite.core.provenance import REMOVED, collect_provenance, redact, redact_argv
from specforge_lite.core.settings import parse_config
from specforge_lite.training.evaluate import evaluation_batches, result_of, walk_document
from specforge_lite.training.metrics import SpikeDetector, step_line, summarize_sums
from specforge_lite.training.optimizer import DraftOptimizer, learning_rate_at
from specforge_lite.training.reporting import open_trackers
from specforge_lite.training.settings import LoggingSection, OptimizerSection, TrainConfig, TrainingSection, run_length

# ------------------------------------------------------------------------------------------------------------ settings


def flags(tmp_path: Path, *more: str) -> list[str]:
    data = tmp_path / "train.jsonl"
    data.touch()
    base = ["--target-model-path", "M", "--train-data-path", str(data), "--output-dir", str(tmp_path / "out")]
    return [*base, *more]


def test_flags_of_the_design_are_understood(tmp_path: Path) -> None:
    config = parse_config(
        TrainConfig,
        flags(
            tmp_path, "--max-num-steps", "7", "--gradient-accumulation-steps", "3", "--ttt_length=5", "--step-decay",
            "0.9", "--resume", "false", "--sharding", "fsdp2", "--cpu-offload", "--report-to", "none", "tensorboard",
            "--draft-attention-backend", "eager", "--mem-frac", "0.3", "--dist-timeout", "0.5", "--max-grad-norm", "0",
        ),
    )  # fmt: skip
    assert (config.training.total_steps, config.training.accumulation_steps, config.training.ttt_length) == (7, 3, 5)
    assert config.checkpoint.resume is False
    assert config.logging.trackers == ("tensorboard",)
    assert config.distributed.cpu_offload
    assert config.target.mem_frac == 0.3


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            TrainConfig,
            flags(tmp_path, "--batch-size", "0", "--ttt-lenght", "7", "--precision", "fp64", "--learning-rate", "fast"),
        )
    message = str(caught.value)
    for part in (
        "--batch-size: ",
        "--ttt-lenght: unknown flag; did you mean '--ttt-length'?",
        "unknown value 'fp64'",
        "--learning-rate: ",
    ):
        assert part in message


def test_impossible_combinations_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            TrainConfig,
            flags(
                tmp_path, "--warmup-ratio", "0.1", "--warmup-steps", "3", "--cpu-offload", "--max-tokens-per-batch",
                "100", "--max-length", "200", "--eval-data-path", str(tmp_path / "absent.jsonl"),
            ),
        )  # fmt: skip
    message = str(caught.value)
    for part in ("--warmup-steps and --warmup-ratio", "--cpu-offload", "--max-tokens-per-batch 100", "absent.jsonl"):
        assert part in message


def test_a_key_on_the_command_line_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="WANDB_API_KEY") as caught:
        parse_config(TrainConfig, flags(tmp_path, "--wandb-key", "abcdef123456"))
    assert "abcdef123456" not in str(caught.value)


@pytest.mark.parametrize(
    ("total", "epochs", "expected"), [(None, None, 10), (None, 3, 30), (25, None, 25), (25, 2, 20), (5, 2, 5)]
)
def test_run_length(total: int | None, epochs: int | None, expected: int) -> None:
    assert run_length(TrainingSection(total_steps=total, num_epochs=epochs), lambda n: 10 * n) == expected


# ----------------------------------------------------------------------------------------------------------- optimizer


def test_schedules_against_values_by_hand() -> None:
    config = OptimizerSection(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(config, s, 12) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate_at(config, 8, 12) == pytest.approx(0.5)  # half of the cosine
    assert learning_rate_at(config, 12, 12) == pytest.approx(0.0)
    linear = OptimizerSection(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=0, lr_schedule="linear")
    assert [learning_rate_at(linear, s, 4) for s in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    constant = OptimizerSection(learning_rate=1.0, warmup_ratio=0.5, lr_schedule="constant")
    assert [learning_rate_at(constant, s, 4) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]


def make_parameters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"matrix": torch.nn.Parameter(torch.randn(5, 3)), "vector": torch.nn.Parameter(torch.randn(4))}


def test_update_equals_plain_adamw_on_divided_and_clipped_gradients() -> None:
    config = OptimizerSection(learning_rate=0.01, weight_decay=0.1, warmup_steps=0, lr_schedule="constant")
    ours, plain = make_parameters(), make_parameters()
    optimizer = DraftOptimizer(ours, config, total_steps=5)
    groups = [{"params": [plain["matrix"]], "weight_decay": 0.1}, {"params": [plain["vector"]], "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False)
    for step in range(5):
        sums = {name: torch.randn_like(p) * 10 ** (step - 2) for name, p in ours.items()}
        count = torch.tensor(7.0)
        for name in sums:
            ours[name].grad, plain[name].grad = sums[name].clone(), sums[name] / 7
        square_sum = torch.stack([g.square().sum() for g in sums.values()]).sum()
        result = optimizer.step(step, count, torch.tensor(1.0), square_sum)
        norm = torch.nn.utils.clip_grad_norm_(plain.values(), 0.5)
        oracle.step()
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        for name in sums:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken: str) -> None:
    parameters = make_parameters()
    optimizer = DraftOptimizer(parameters, OptimizerSection(), total_steps=5)
    for name, parameter in parameters.items():
        parameter.grad = torch.ones_like(parameter)
        del name
    optimizer.step(0, torch.tensor(2.0), torch.tensor(1.0), torch.tensor(19.0))
    before = {k: v.clone() for k, v in parameters.items()}
    states = {k: {s: t.clone() for s, t in v.items()} for k, v in optimizer.state_tensors().items()}
    nan = torch.tensor(float("nan"))
    if broken == "gradient":
        parameters["matrix"].grad = torch.full((5, 3), float("nan"))
    loss, squares = (nan, torch.tensor(19.0)) if broken == "loss" else (torch.tensor(1.0), nan)
    result = optimizer.step(1, torch.tensor(2.0), loss, squares)
    assert result.skipped.item() == 1.0
    for name in before:
        assert torch.equal(parameters[name], before[name])
        assert all(torch.equal(optimizer.state_tensors()[name][s], t) for s, t in states[name].items())


# ------------------------------------------------------------------------------------------------------------- metrics


def test_sums_become_means() -> None:
    #        loss tokens run_sum rows weight | loss_sum counted  supervised  correct
    values = [9.0, 50.0, 12.0, 8.0, 10.0, 20.0, 6.0, 10.0, 3.0, 16.0, 4.0, 8.0, 1.0]
    metrics = summarize_sums(values, num_steps=2)
    assert metrics["step_losses"] == [2.0, 2.0]
    assert metrics["accuracies"] == [0.5, 0.25]
    assert metrics["acc0"] == 0.5
    assert metrics["tau"] == 2.5


def test_step_line() -> None:
    metrics = {
        "loss": 3.4123, "acc0": 0.5189, "tau": 2.304, "tokens_per_second": 812.4, "wait_share": 0.031,
        "memory_bytes": int(1.9 * 2**30), "eta_seconds": 720, "skipped_samples": 0, "nonfinite_steps": 0, "engine": "",
    }  # fmt: skip
    line = step_line(120, 800, metrics)
    assert line == "step 120/800 loss 3.412 acc0 0.519 tau 2.30 tok/s 812 wait 3% mem 1.9G eta 12m"
    assert step_line(120, 800, metrics | {"skipped_samples": 3}).endswith("eta 12m skipped 3")
    assert step_line(120, 800, metrics | {"engine": "engine restarted 1x"}).endswith("eta 12m engine restarted 1x")


def test_spikes_need_a_history_and_a_jump() -> None:
    detector = SpikeDetector()
    assert not any(detector.is_spike(10.0 + 0.1 * (i % 5)) for i in range(40))
    assert not detector.is_spike(11.0)
    assert detector.is_spike(31.0)


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (17, 812 * 2**20, int(1.9 * 2**30), 300 * 2**30)] == [
        "17B",
        "812M",
        "1.9G",
        "300G",
    ]


# ---------------------------------------------------------------------------------------------------------------- walk


def walked(*arguments: Any, **options: Any) -> tuple[int, int]:
    """(tokens, passes)"""
    passes = walk_document(*arguments, **options)
    return sum(tokens for tokens, _ in passes), len(passes)


def test_walk_over_a_document_drawn_by_hand() -> None:
    # Tokens 0..11; the answer is 4..10. Prefill gives token 4, so the first row is 3. Right steps per row:
    #   row 3: token 5, 6 right, 7 wrong -> run 2, goes 3 tokens on (5, 6 accepted, 7 from the target)
    #   row 6: token 8 wrong             -> run 0, goes 1 on (8)
    #   row 7: token 9 right, 10 right, 11 does not exist in the answer -> run 2, but only 2 tokens are left
    mask = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0]).bool()
    supervised, correct = torch.zeros(12, 3).bool(), torch.zeros(12, 3).bool()
    for row in range(12):
        for k in range(3):
            supervised[row, k] = row + 2 + k < 12 and mask[row + 2 + k]
    correct[3] = torch.tensor([1, 1, 0]).bool()
    correct[4] = torch.tensor([1, 1, 1]).bool()  # never stood on
    correct[7] = torch.tensor([1, 1, 1]).bool()  # the third is outside the answer
    assert walked(correct, supervised, mask, chain_length=3) == (6, 3)
    assert walked(correct, supervised, mask, chain_length=1) == (6, 4)  # rows 3 (5, 6), 5 (7), 6 (8), 7 (9, 10)
    assert walked(torch.zeros_like(correct), supervised, mask, 3) == (6, 6)
    assert walked(supervised, supervised, mask, 3) == (6, 2)


def test_walk_ignores_answers_of_one_token_and_handles_several() -> None:
    mask = torch.tensor([0, 0, 1, 0, 0, 1, 1, 1]).bool()
    supervised = torch.zeros(8, 2).bool()
    supervised[3, 1] = supervised[4] = True
    supervised[5, 0] = True
    assert walked(supervised.clone(), supervised, mask, 2) == (2, 1)


def test_result_over_batches() -> None:
    #       samples run rows tok jumps | loss      counted   supervised correct  alpha
    rows = [
        [2.0, 3.0, 4.0, 9.0, 4.0, 8.0, 2.0, 4.0, 2.0, 4.0, 2.0, 2.0, 1.0, 2.0, 1.0, 3.0, 2.0],
        [0.0] * 17,  # a rank without samples
        [1.0, 1.0, 2.0, 3.0, 2.0, 8.0, 3.0, 2.0, 1.0, 2.0, 0.0, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0],
    ]
    result = result_of(rows, num_steps=2, chain_length=2)
    assert (result.num_batches, result.num_samples) == (2, 3)
    assert result.accuracy == pytest.approx([4 / 6, 1 / 2])
    assert result.accuracy_mean == pytest.approx([(0.5 + 1.0) / 2, 0.5])
    assert result.accuracy_std == pytest.approx([math.sqrt(0.125), 0.0])
    assert result.loss_mean == pytest.approx([3.0, 2.0])
    assert result.tau_chain == pytest.approx(1 + 4 / 6)
    assert result.tau_walk == pytest.approx(12 / 6)
    assert (result.num_passes, result.num_tokens, result.accepted_at) == (6, 12, [4, 2])
    assert result.tau_sampling == pytest.approx(1 + 0.5 + 0.5 * 0.5)


def test_evaluation_batches_are_shared_out_evenly() -> None:
    assert evaluation_batches(5, 2) == [[0, 1], [2, 3], [4]]
    assert evaluation_batches(5, 2, rank=0, world_size=2) == [[0, 1], [4]]
    assert evaluation_batches(5, 2, rank=1, world_size=2) == [[2, 3], []]


# ------------------------------------------------------------------------------------------------------------ trackers


def test_metrics_file_forgets_steps_that_are_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    (tracker,) = open_trackers(LoggingSection(), tmp_path, {}, resume_step=2)
    tracker.log(3, {"loss": 1.5})
    tracker.close()
    assert read_jsonl(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 3, "loss": 1.5}]


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    for tracker in open_trackers(LoggingSection(report_to=("tensorboard",)), tmp_path, {}, 0):
        tracker.log(1, {"loss": 2.0, "accuracies": [0.1, 0.2], "note": "text"})
        tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "accuracies/0", "accuracies/1"}
    assert events.Scalars("accuracies/1")[0].value == pytest.approx(0.2)


def test_a_missing_tracker_package_is_reported_with_the_other_mistakes(tmp_path: Path) -> None:
    """Before anything is loaded; trackio is not among the requirements."""
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, flags(tmp_path, "--report-to", "trackio", "--batch-size", "0"))
    message = str(caught.value)
    assert "--report-to: trackio: not installed; install with `pip install trackio`" in message
    assert "--batch-size: " in message


# ---------------------------------------------------------------------------------------------------------- provenance


def test_secrets_do_not_reach_provenance() -> None:
    token = "hf_" + "a" * 30
    argv = ["train.py", "--hub-token", "s3cret", "--wandb-api-key=s3cret", "--engine-arg", "api_key=s3cret", token]
    argv += ["--target-url", "http://me:s3cret@host:1/v1", "--token", "--batch-size", "2"]
    words = redact_argv(argv)
    assert "s3cret" not in " ".join(words)
    assert token not in words
    assert words[-2:] == ["--batch-size", "2"]
    assert words[:3] == ["train.py", "--hub-token", REMOVED]
    nested = redact({"a": {"api_key": "s3cret", "max_tokens": 5}, "engine_arg": ["api-key=s3cret", "x=1"], "n": None})
    assert nested == {
        "a": {"api_key": REMOVED, "max_tokens": 5},
        "engine_arg": [f"api-key={REMOVED}", "x=1"],
        "n": None,
    }


def test_provenance_is_json_and_names_versions() -> None:
    facts = json.loads(json.dumps(collect_provenance({"x": 1})))
    assert facts["packages"]["torch"] == torch.__version__.split("+")[0] or facts["packages"]["torch"]
    assert facts["config"] == {"x": 1}


# --------------------------------------------------------------------------------------------------------------- files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, 7)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": {"../x": {"size": 1, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match="leaves the directory"):
        verify_checkpoint(tmp_path)
