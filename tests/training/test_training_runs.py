"""Whole runs in this process: batching must not change gradients, resume must not change anything, bad numbers and
refused samples are skipped within their budgets."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_lite.capture.offline import OfflineEngine, OfflinePart, capture_offline
from specforge_lite.capture.prefetch import SkipBudget
from specforge_lite.capture.settings import CaptureSection
from specforge_lite.core.errors import CaptureError, CheckpointError, ConfigError, DataError, TrainingError
from specforge_lite.data.sampler import PlannedStep
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.training.block import DsparkConfig
from specforge_lite.training.dataloader import BatchMaker, Dataloader, bad_documents
from specforge_lite.training.distributed import World
from specforge_lite.training.eagle1 import Eagle1Config
from specforge_lite.training.loop import Trainer
from specforge_lite.training.metrics import WEIGHT_AT, empty_row, output_row
from specforge_lite.training.parallel import ReplicatedDraft, spread_draft
from specforge_lite.training.reporting import RunDirectory
from specforge_lite.training.settings import DistributedSection, TrainConfig
from specforge_lite.training.wiring import load_data
from tests.fake_engine import FakeEngine, Fault
from tests.training_runs import INFO, Run, capture, make_dataset, make_head, make_models, run_ranks, train, weights

ONE = World(0, 1, torch.device("cpu"), 60.0)
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ batching


def gradients(root: Path, micro_batches: list[list[int]], faults: dict[str, Fault] | None = None) -> Any:
    """Gradients / count of one step in double precision, and its metric row."""
    data = make_dataset(root / "data")
    models, ttt = make_models(data), TTTSettings(num_steps=4, attention_backend="sdpa")
    parallel = spread_draft(models.draft, ONE, DistributedSection(), torch.float32)
    engine = FakeEngine(INFO, faults=faults)
    to_batch = BatchMaker(make_head(), 3, CPU, torch.float32)
    skips = SkipBudget(1.0, len(data))
    loader = Dataloader(iter([PlannedStep(micro_batches, {})]), data, engine, to_batch, skips)
    row = empty_row(4, CPU)
    parallel.begin_step()
    for batch in next(loader).batches:
        output = parallel.forward(batch, models.target_head, ttt)
        parallel.backward(output.loss, last=True)
        if batch.sample_ids:
            row += output_row(output, batch)
    loader.close()
    parallel.reduce_gradients()
    flat = torch.cat([p.grad.flatten() for p in parallel.parameters.values() if p.grad is not None])
    return flat / row[WEIGHT_AT], row


@pytest.mark.parametrize("other", [[[0], [1], [2], [3]], [[3, 1], [2, 0]], [[0, 1, 2], [], [3]]])
def test_gradients_do_not_depend_on_the_split_into_micro_batches(tmp_path: Path, other: list[list[int]]) -> None:
    whole, whole_row = gradients(tmp_path, [[0, 1, 2, 3]])
    split, split_row = gradients(tmp_path, other)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(split_row, whole_row, rtol=1e-5, atol=1e-6)


def test_a_refused_sample_leaves_the_gradient_of_the_others(tmp_path: Path) -> None:
    with_hole, _ = gradients(tmp_path, [[0, 1], [2]], {"s1": Fault("refused")})
    without, _ = gradients(tmp_path, [[0], [2]])
    torch.testing.assert_close(with_hole, without, rtol=1e-5, atol=1e-7)


def test_an_idle_batch_has_a_gradient_of_exactly_zero(tmp_path: Path) -> None:
    flat, row = gradients(tmp_path, [[]])
    assert row.count_nonzero() == 0
    assert torch.nan_to_num(flat).count_nonzero() == 0  # 0 / 0


def test_gradients_are_views_of_one_buffer(tmp_path: Path) -> None:
    models = make_models(make_dataset(tmp_path / "data"))
    parallel = ReplicatedDraft(models.draft, ONE)
    to_batch = BatchMaker(models.target_head, 3, CPU, torch.float32)
    parallel.begin_step()
    before = {name: p.grad.data_ptr() for name, p in parallel.parameters.items() if p.grad is not None}
    parallel.backward(parallel.forward(to_batch.idle_batch(), models.target_head, TTTSettings(num_steps=2)).loss, True)
    assert before == {name: p.grad.data_ptr() for name, p in parallel.parameters.items() if p.grad is not None}


def test_a_broken_hidden_state_is_found_in_its_document(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    engine = FakeEngine(INFO, faults={"s1": Fault("nan")})
    samples = [data[i] for i in range(3)]
    batch = BatchMaker(make_head(), 3, CPU, torch.float32)(samples, engine.capture(samples))
    assert bad_documents(batch).tolist() == [False, True, False]


def test_states_without_the_final_norm_are_normed(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    raw = FakeEngine(INFO, last_is_normed=False).capture([data[0]])
    head = make_head()
    batch = BatchMaker(head, 3, CPU, torch.float32)([data[0]], raw)
    torch.testing.assert_close(batch.last_NH, head.norm(raw[0].last_LH))


def test_accumulation_and_packing_train_as_larger_batches_do(tmp_path: Path) -> None:
    base = Run(tmp_path, "whole", {"training": {"batch_size": 4}})
    train(base)
    accumulated = Run(tmp_path, "accumulated", {"training": {"batch_size": 2, "accumulation_steps": 2}})
    train(accumulated)
    assert accumulated.losses() == pytest.approx(base.losses(), rel=1e-4)
    packed = Run(tmp_path, "packed", {"training": {"max_tokens_per_batch": 100, "num_epochs": 1, "total_steps": None}})
    train(packed)
    rows = [row for row in packed.metrics() if "loss" in row]
    assert sum(row["supervised_tokens"] for row in rows) == supervised_rows(tmp_path)
    efficiencies = sorted(row["packing_efficiency"] for row in rows)
    assert efficiencies[1] > 0.8  # all but the bin with what was left over
    assert efficiencies[-1] <= 1


def supervised_rows(root: Path) -> int:
    """Tokens that a row can predict: supervised, and not among the first two of their sample."""
    data = make_dataset(root / "data-24")
    return sum(int(sample.loss_mask_L[2:].sum()) for sample in data)


def test_bf16_and_activation_checkpointing_run_and_keep_fp32_masters(tmp_path: Path) -> None:
    plain = Run(tmp_path, "plain")
    train(plain)
    for name, training in (("bf16", {"precision": "bf16"}), ("again", {"activation_checkpointing": True})):
        run = Run(tmp_path, name, {"training": training})
        train(run)
        assert run.losses() == pytest.approx(plain.losses(), rel=0.02 if name == "bf16" else 1e-6)
        tensors = weights(run.output_dir / "step_6")
        assert all(t.dtype == torch.float32 for n, t in tensors.items() if n.endswith("weight"))


# -------------------------------------------------------------------------------------------------------------- resume


def stop_after(steps: int) -> Any:
    """Make a trainer behave as if SIGTERM came during step `steps`."""

    def change(trainer: Trainer) -> None:
        original = trainer.train_step

        def train_step(batches: Any) -> None:
            original(batches)
            if trainer.progress.step == steps:
                trainer.stop.handle(15, None)

        trainer.train_step = train_step  # type: ignore[method-assign]

    return change


def assert_same_checkpoint(left: Path, right: Path) -> None:
    for name in ("draft", "optimizer", "rng"):
        assert (left / f"{name}.safetensors").read_bytes() == (right / f"{name}.safetensors").read_bytes(), name


def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole = Run(tmp_path, "whole", {"training": {"total_steps": 16}})
    train(whole)
    parts = Run(tmp_path, "parts", {"training": {"total_steps": 16}})
    for step in (3, 14):  # 12 steps are an epoch
        with pytest.raises(SystemExit) as caught:
            train(parts, stop_after(step))
        assert caught.value.code == 143
        assert (parts.output_dir / f"step_{step}").is_dir()
    summary = train(parts)
    assert_same_checkpoint(whole.output_dir / "step_16", parts.output_dir / "step_16")
    assert parts.losses() == whole.losses()
    assert summary.restarts == 2
    assert train(parts).reason == "finished"  # nothing left to do, nothing changed
    assert_same_checkpoint(whole.output_dir / "step_16", parts.output_dir / "step_16")


@pytest.mark.parametrize(
    ("training", "world_size", "total_steps"),
    [
        ({"batch_size": 4}, 1, 5 + 4 + 6),  # 14 samples left of the first epoch, 24 of the second
        ({"batch_size": 1}, 1, 5 + 14 + 24),
        ({"accumulation_steps": 3}, 1, 5 + 3 + 4),
        ({"max_tokens_per_batch": None, "batch_size": 5}, 2, 5 + 2 + 3),
    ],
)
def test_a_resume_in_other_batches_trains_every_sample_of_every_epoch_once(
    tmp_path: Path, training: dict[str, Any], world_size: int, total_steps: int
) -> None:
    epochs = {"num_epochs": 2, "total_steps": None}
    with pytest.raises(SystemExit):
        train(Run(tmp_path, settings={"training": epochs}), stop_after(5))
    other = Run(tmp_path, settings={"training": epochs | training})
    log = tmp_path / "log"
    resume = lambda: run_ranks(2, train, (other,), log) if world_size > 1 else train(other)  # noqa: E731
    resume()
    summary = json.loads((other.output_dir / "exit_summary.json").read_text())
    assert (summary["reason"], summary["step"]) == ("finished", total_steps)
    state = json.loads((other.output_dir / f"step_{total_steps}" / "state.json").read_text())
    assert (state["data"]["epoch"], state["data"]["consumed"]) == (2, 0)
    trained = sum(row["supervised_tokens"] for row in other.metrics() if "loss" in row)
    assert trained == 2 * supervised_rows(tmp_path)
    assert [row["epochs_done"] for row in other.metrics() if "epochs_done" in row] == [1, 2]
    resume()  # nothing is left to train
    assert sum(row["supervised_tokens"] for row in other.metrics() if "loss" in row) == trained


def test_total_steps_shape_the_rate_of_a_run_that_epochs_end(tmp_path: Path) -> None:
    long = Run(tmp_path, "long", {"training": {"num_epochs": 1, "total_steps": 1000}, "optimizer": {"warmup_steps": 0}})
    assert train(long).step == 12
    rates = [row["learning_rate"] for row in long.metrics() if "loss" in row]
    expected = [3e-3 * (1 + math.cos(math.pi * step / 1000)) / 2 for step in range(12)]
    assert rates == pytest.approx(expected)


def test_samples_beyond_the_drafts_positions_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import training_runs

    monkeypatch.setattr(training_runs, "DraftConfig", partial(DraftConfig, max_position_embeddings=30))
    lengths = make_dataset(tmp_path / "data-24").lengths
    train(Run(tmp_path))
    expected = f"{int((lengths > 30).sum())} of 24 samples are longer than the draft's 30 positions"
    assert expected in capsys.readouterr().err


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, settings={"checkpoint": {"save_interval": 2}})
    train(run)
    expected = (run.output_dir / "step_6" / "draft.safetensors").read_bytes()
    newest = run.output_dir / "step_6" / "draft.safetensors"
    content = bytearray(newest.read_bytes())
    content[-7] ^= 4
    newest.write_bytes(content)
    (run.output_dir / "step_4" / "optimizer.safetensors").unlink()
    capsys.readouterr()
    train(run)
    output = capsys.readouterr()
    assert "step_6/draft.safetensors: content differs from its sha256" in output.err
    assert "step_4/optimizer.safetensors: missing" in output.err
    assert "resumed after step 2" in output.out
    assert newest.read_bytes() == expected

    for path in run.output_dir.glob("step_*/manifest.json"):
        path.write_text("{")
    with pytest.raises(CheckpointError, match=r"3 checkpoint\(s\), all damaged; --overwrite"):
        train(run)


def test_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    run = Run(tmp_path, settings={"checkpoint": {"save_interval": 1, "save_total_limit": 2}})
    train(run)
    assert sorted(path.name for path in run.output_dir.glob("*step_*")) == ["step_5", "step_6"]


def test_saving_and_evaluating_by_epochs_and_steps(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        settings={
            "training": {"num_epochs": 2, "total_steps": None, "batch_size": 8, "eval_interval": 2},
            "checkpoint": {"save_epochs": 1},
        },
    )
    train(run)
    assert sorted(path.name for path in run.output_dir.glob("step_*")) == ["step_3", "step_6"]
    assert [row["step"] for row in run.metrics() if "eval/tau_walk" in row] == [2, 4, 6]


def test_an_earlier_run_is_never_overwritten_silently(tmp_path: Path) -> None:
    train(Run(tmp_path))
    with pytest.raises(ConfigError, match="step_6 of an earlier run and --resume is off; --overwrite"):
        train(Run(tmp_path, settings={"checkpoint": {"resume": False}}))
    again = Run(tmp_path, settings={"checkpoint": {"overwrite": True}, "training": {"total_steps": 2}})
    assert train(again).restarts == 0
    assert [path.name for path in again.output_dir.glob("step_*")] == ["step_2"]


def test_a_second_run_is_refused_while_the_first_holds_the_directory(tmp_path: Path) -> None:
    run = Run(tmp_path)
    holder = RunDirectory(run.config().checkpoint)
    with pytest.raises(ConfigError, match=r"in use by process \d+ since"):
        train(run)
    holder.close()
    train(run)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    train(run)
    other_data = Run(tmp_path, num_samples=20, settings={"training": {"total_steps": 8}})
    with pytest.raises(CheckpointError, match=r"step_6: data was \w+, this run has \w+.*--allow-vocab-mismatch"):
        train(other_data)
    forced = Run(
        tmp_path, num_samples=20, settings={"training": {"total_steps": 8}, "draft": {"allow_vocab_mismatch": True}}
    )
    saved = weights(run.output_dir / "step_6")
    train(forced)
    assert torch.equal(weights(run.output_dir / "step_8")["d2t"], saved["d2t"])
    assert forced.metrics()[-2]["epoch"] == pytest.approx(2 * 2 / 20)  # two steps of two into the other data
    shutil.rmtree(run.output_dir / "step_8")
    with pytest.raises(CheckpointError, match="seed 0, this run has 1"):
        train(Run(tmp_path, settings={"training": {"total_steps": 8, "seed": 1}}))


# ---------------------------------------------------------------------------------------------------- numbers, samples


def test_a_bad_sample_skips_its_step_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, settings={"training": {"total_steps": 12}}, faults={"s5": Fault("nan")})
    summary = train(run)
    assert summary.nonfinite_steps == 1
    error = capsys.readouterr().err
    assert "loss or gradient not finite; step skipped; samples: s5\n" in error
    assert all(torch.isfinite(t.float()).all() for t in weights(run.output_dir / "step_12").values())
    assert len(run.losses()) == 11  # the skipped step has no loss


def test_training_stops_when_too_many_steps_are_bad(tmp_path: Path) -> None:
    faults = {f"s{i}": Fault("nan") for i in range(0, 24, 3)}
    run = Run(tmp_path, settings={"training": {"nonfinite_budget": 2, "total_steps": 12}}, faults=faults)
    with pytest.raises(TrainingError, match="3 steps had a NaN or infinite loss"):
        train(run)
    assert "TrainingError" in (run.output_dir / "exit_summary.json").read_text()


def test_refused_samples_are_counted_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {"s3": Fault("refused"), "s4": Fault("wrong_ids")}
    run = Run(tmp_path, settings={"training": {"total_steps": 12, "skip_budget": 0.1}}, faults=faults)
    assert train(run).skipped_samples == 2
    assert "sample s3 was refused" in capsys.readouterr().err
    assert [row["skipped_samples"] for row in run.metrics() if "skipped_samples" in row][-1] == 2
    strict = Run(tmp_path, "strict", {"training": {"total_steps": 12, "skip_budget": 0.05}}, faults)
    with pytest.raises(CaptureError, match="2 skipped, the budget is 1"):
        train(strict)


def test_samples_too_long_for_the_target_are_skipped_in_every_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = sorted(make_dataset(tmp_path / "data-24").lengths.tolist())
    assert lengths[-2] < lengths[-1]
    run = Run(tmp_path, settings={"training": {"total_steps": 36, "skip_budget": 0.05}}, target_length=lengths[-2])
    assert train(run).skipped_samples == 3  # the same one in each of three epochs
    assert len(run.losses()) == 36
    assert f"training data: 1 of 24 samples are longer than the {lengths[-2]} tokens" in capsys.readouterr().err


@pytest.mark.parametrize("num_too_long", [1, 2])
def test_too_many_samples_that_are_too_long_are_told_before_the_first_step(tmp_path: Path, num_too_long: int) -> None:
    lengths = sorted(make_dataset(tmp_path / "data-24").lengths.tolist())
    budget = {1: 0.001, 2: 0.05}[num_too_long]
    limit = lengths[-num_too_long - 1]
    run = Run(tmp_path, settings={"training": {"skip_budget": budget}}, target_length=limit)
    found, allowed = f"training data: {num_too_long} of 24 samples", f"at most {num_too_long - 1} may"
    with pytest.raises(ConfigError, match=f"{found} .* {allowed}"):
        train(run)
    assert list(run.output_dir.glob("step_*")) == []


def test_a_loss_spike_is_logged_with_its_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(
        tmp_path, settings={"training": {"total_steps": 40}, "logging": {"log_file": str(tmp_path / "log.jsonl")}}
    )

    def change(trainer: Trainer) -> None:
        original = trainer.train_step

        def train_step(batches: Any) -> None:
            if trainer.progress.step == 36:  # a far too large step breaks the next one
                trainer.optimizer._config = trainer.config.optimizer.model_copy(
                    update={"learning_rate": 3.0, "max_grad_norm": 0.0, "lr_schedule": "constant"}
                )
            original(batches)

        trainer.train_step = train_step  # type: ignore[method-assign]

    train(run, change)
    assert "step 38: loss spike" in capsys.readouterr().err
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    spike = next(event for event in events if event["event"] == "loss_spike")
    assert spike["step"] == 38
    assert len(spike["sample_ids"]) == 2
    assert {"start", "info", "warning", "metrics", "checkpoint", "end"} <= {event["event"] for event in events}


# ------------------------------------------------------------------------------------------------------------- offline


def test_offline_training_is_online_training(tmp_path: Path) -> None:
    online = Run(tmp_path, "online")
    train(online)
    capture(online)
    offline = Run(tmp_path, "offline-run", offline=True)
    train(offline)
    assert offline.losses() == online.losses()
    assert_same_checkpoint(online.output_dir / "step_6", offline.output_dir / "step_6")
    results = [next(row for row in run.metrics() if "eval/loss" in row) for run in (online, offline)]
    assert results[0]["eval/loss"] == results[1]["eval/loss"]


def test_parts_with_the_same_sample_ids_are_told_apart(tmp_path: Path) -> None:
    config = CaptureSection(offline_dir=tmp_path, states_dtype="bf16")
    datasets = [make_dataset(tmp_path / name, 5, seed) for name, seed in (("a", 0), ("b", 1))]
    for part, dataset in zip("xy", datasets):
        capture_offline(dataset, FakeEngine(INFO), tmp_path / part, config)
    engine = OfflineEngine([OfflinePart(tmp_path / part) for part in "xy"])
    for dataset in datasets:
        for sample, state in zip(dataset, FakeEngine(INFO).capture(list(dataset))):
            assert torch.equal(engine.capture([sample])[0].aux_LAH, state.aux_LAH.bfloat16())


def test_offline_training_reads_some_of_the_captured_layers(tmp_path: Path) -> None:
    info = replace(INFO, num_layers=8, aux_layer_ids=(1, 3, 4, 6))
    dataset = make_dataset(tmp_path / "a", 5, 0)
    capture_offline(
        dataset, FakeEngine(info), tmp_path / "x", CaptureSection(offline_dir=tmp_path, states_dtype="fp32")
    )
    part, samples = OfflinePart(tmp_path / "x"), list(dataset)
    engine, whole = OfflineEngine([part], (1, 6)), OfflineEngine([part])
    assert engine.info.aux_layer_ids == (1, 6)
    for few, every in zip(engine.capture(samples), whole.capture(samples)):
        assert few.aux_layer_ids == (1, 6)
        assert torch.equal(few.aux_LAH, every.aux_LAH[:, [0, 3]])
        assert torch.equal(few.last_LH, every.last_LH)
    with pytest.raises(ConfigError, match=r"aux_layer_ids \[1, 5\].*holds layers \[1, 3, 4, 6\], not \[5\]"):
        OfflineEngine([part], (1, 5))


def test_aux_layer_ids_choose_among_the_captured_layers_of_offline_dir(tmp_path: Path) -> None:
    """The flag, not only the engine: a run that ignores it trains a wider fc and says nothing."""
    info = replace(INFO, num_layers=8, aux_layer_ids=(1, 3, 4, 6))
    dataset, section = make_dataset(tmp_path / "a", 5, 0), CaptureSection(offline_dir=tmp_path, states_dtype="fp32")
    capture_offline(dataset, FakeEngine(info), tmp_path / "states" / "train", section)

    def layers_read(config_class: type[TrainConfig], *aux_layer_ids: int) -> tuple[int, ...]:
        target = {"target_model_path": "unused"} | ({"aux_layer_ids": aux_layer_ids} if aux_layer_ids else {})
        training = {"offline_dir": tmp_path / "states"}
        config = config_class.model_validate(
            {"target": target, "data": {}, "training": training, "checkpoint": {"output_dir": tmp_path / "run"}}
        )
        states = load_data(config).states
        assert states is not None
        return states.info.aux_layer_ids

    assert layers_read(TrainConfig, 1, 6) == layers_read(DsparkConfig, 1, 6) == (1, 6)
    assert layers_read(TrainConfig) == layers_read(Eagle1Config) == (1, 3, 4, 6)
    with pytest.raises(ConfigError, match=r"aux_layer_ids \[1, 5\].*holds layers \[1, 3, 4, 6\], not \[5\]"):
        layers_read(TrainConfig, 1, 5)


def test_a_killed_capture_continues_and_damage_is_found(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", 400)
    directory = tmp_path / "off"
    config = CaptureSection(offline_dir=directory, states_dtype="fp32", shard_mb=1, prefetch_depth=1)
    faults = {"s399": Fault("gone", times=1)}
    with pytest.raises(Exception, match="the engine is gone"):
        capture_offline(data, FakeEngine(INFO, faults=faults), directory, config)
    with pytest.raises(DataError, match="no complete capture"):
        OfflinePart(directory)
    first = (directory / "states_00000.safetensors").stat().st_mtime_ns
    engine = FakeEngine(INFO)
    capture_offline(data, engine, directory, config)
    assert (directory / "states_00000.safetensors").stat().st_mtime_ns == first
    assert engine.num_samples < 400

    part = OfflinePart(directory)
    path = directory / "states_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    broken = OfflinePart(directory)
    last = next(i for i in range(400) if broken._places[f"s{i}"][0] == 1) - 1
    with pytest.raises(DataError, match=rf"states_00000.safetensors: states of sample s{last} changed"):
        broken.read(data[last])
    assert part.holds(data[last])
    with pytest.raises(ConfigError, match="holds states with dtype fp32, asked for bf16"):
        capture_offline(data, engine, directory, config.model_copy(update={"states_dtype": "bf16"}))


def test_the_size_is_predicted_exactly_and_checked_against_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from specforge_lite.capture import offline

    data = make_dataset(tmp_path / "data")
    config = CaptureSection(offline_dir=tmp_path / "off")
    predicted = offline.plan_capture(data.lengths, INFO, config).num_bytes
    capture_offline(data, FakeEngine(INFO), tmp_path / "off" / "train", config)
    written = (tmp_path / "off" / "train" / "states_00000.safetensors").stat().st_size
    assert 0 < written - predicted < 1024  # the header
    assert predicted == int(data.lengths.sum()) * 4 * INFO.hidden_size * 2
    free = offline.RESERVE_BYTES + predicted - 1
    monkeypatch.setattr(offline.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    with pytest.raises(ConfigError, match="are free; use --states-dtype bf16"):
        offline.check_room(tmp_path / "new", {"train": data}, INFO, config)
    offline.check_room(tmp_path / "off", {"train": data}, INFO, config)  # what is there already needs no room
    assert "is there already" in capsys.readouterr().out
