"""Sequence parallelism: processes that share a batch give the losses, counts and gradients of one process."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specforge_lite.checkpoints.training_run import verify_checkpoint
from specforge_lite.core.errors import ConfigError
from specforge_lite.model.draft import TTTSettings
from specforge_lite.model.row_plan import plan_rows, predictable_tokens
from specforge_lite.model.sequence import SequenceGroup, needed_steps, own_rows
from specforge_lite.training.dataloader import StepBatches
from specforge_lite.training.distributed import open_world
from specforge_lite.training.loop import Trainer
from specforge_lite.training.settings import DistributedSection
from tests.fake_engine import Fault
from tests.model.test_eagle3 import MASKS, gradients, make_batch, make_draft, make_target_head
from tests.training.test_training_processes import log_of
from tests.training_runs import Run, run_ranks, train

SETTINGS = TTTSettings(num_steps=4)
BATCHES = {
    "packed": list(MASKS.values()),
    "long prompt": ["0" * 40 + "1" * 6, "0" * 3],
    "several turns": ["000111000001111000011", "0010"],
    "one token for two ranks": ["00100"],
    "nothing supervised": ["0" * 9],
}
SUMS = ("loss", "loss_sum_K", "counted_K", "supervised_K", "correct_K", "run_sum", "run_rows")
VARIANTS = {
    "sdpa": SETTINGS,
    "eager": replace(SETTINGS, attention_backend="eager"),
    "checkpointing": replace(SETTINGS, activation_checkpointing=True),
    "eagle mask": replace(SETTINGS, loss_mask_alignment="eagle"),
    "one step": replace(SETTINGS, num_steps=1),
    "lk": replace(SETTINGS, loss="lk"),
    "normed state": SETTINGS,
}


# ---------------------------------------------------------------------------------------------------------------- rows


def test_needed_steps_typed_by_hand() -> None:
    """Tokens 5 and 6 supervised, K = 3: token 5 is predicted by rows 3, 2, 1 at steps 0, 1, 2, token 6 by 4, 3, 2."""
    mask = torch.tensor([c == "1" for c in "000001100"])
    assert needed_steps(mask, 3).tolist() == [0, 3, 3, 2, 1, 0, 0, 0, 0]


def test_parts_cover_the_rows_once_in_order_and_cost_the_same() -> None:
    batch = make_batch(["0" * 200 + "1" * 300, "1" * 150, "0" * 90 + "1" * 10])
    mask = predictable_tokens(batch.loss_mask_N, batch.doc_offsets)
    parts = [own_rows(mask, batch.doc_offsets, 4, rank, 3) for rank in range(3)]
    whole = plan_rows(mask, batch.doc_offsets, 4)
    plans = [plan_rows(mask, batch.doc_offsets, 4, owned_N=part) for part in parts]
    assert torch.cat([plan.key_tokens for plan in plans]).sort().values.tolist() == whole.key_tokens.tolist()
    exact = plan_rows(mask, batch.doc_offsets, 4, spare_share=0)
    for k in range(4):
        rows = torch.cat([plan.steps[k].row_tokens for plan in plans]).tolist()
        assert len(set(rows)) == len(rows)
        assert set(exact.steps[k].row_tokens.tolist()) <= set(rows)
    needed = [sum(len(step.row_tokens) for step in plan.steps) for plan in plans]
    total = sum(len(step.row_tokens) for step in whole.steps)
    assert max(needed) < 1.1 * total / 3
    heads = [int((plan.head_places_MK >= 0).sum()) for plan in plans]
    assert sum(heads) == int((whole.head_places_MK >= 0).sum())


def test_front_and_back_of_a_long_document_go_together() -> None:
    """So that all see as many keys: 800 rows, two processes, quarters 0 and 3 against 1 and 2."""
    mask = torch.zeros(802, dtype=torch.bool)
    mask[2:] = True
    parts = [own_rows(mask, [0, 802], 1, rank, 2) for rank in range(2)]
    assert [part.nonzero().squeeze(1).diff().max().item() - 1 for part in parts] == [400, 0]
    pairs = [int(part.nonzero().sum()) for part in parts]
    assert pairs[0] == pytest.approx(pairs[1], rel=0.01)


# ----------------------------------------------------------------------------------------------------------- gradients


def draft_of(variant: str) -> Any:
    return make_draft(norm_output=variant == "normed state", fc_norm=True)


def share_batches(directory: Path, variants: list[str]) -> None:
    """On every rank: sums and gradients of its part, added up over the ranks; rank 0 writes them down."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = SequenceGroup(rank, size, dist.group.WORLD)
    results = {}
    for variant in variants:
        settings = VARIANTS[variant]
        for name, masks in BATCHES.items():
            draft, head, batch = draft_of(variant), make_target_head(), make_batch(masks)
            output = draft(batch, head, replace(settings, sequence=group))
            found = {key: getattr(output, key).detach().double() for key in SUMS}
            found |= gradients(draft, output.loss)
            for tensor in found.values():
                dist.all_reduce(tensor)
            results[f"{variant}/{name}"] = found
    if rank == 0:
        torch.save(results, directory / "shared.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "variants"), [(2, list(VARIANTS)), (3, ["sdpa"])])
def test_processes_that_share_a_batch_equal_one_process(tmp_path: Path, size: int, variants: list[str]) -> None:
    arguments = (tmp_path, variants)
    assert run_ranks(size, share_batches, arguments, tmp_path / "log") == [0] * size, log_of(tmp_path / "log")
    shared = torch.load(tmp_path / "shared.pt", weights_only=True)
    for variant in variants:
        settings = VARIANTS[variant]
        for name, masks in BATCHES.items():
            draft, batch = draft_of(variant), make_batch(masks)
            output = draft(batch, make_target_head(), settings)
            expected = {key: getattr(output, key).detach().double() for key in SUMS} | gradients(draft, output.loss)
            found = shared[f"{variant}/{name}"]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                tolerance = 1e-6 if key == "loss_sum_K" else 1e-10  # that one is kept in fp32
                torch.testing.assert_close(
                    found[key], value, rtol=tolerance, atol=tolerance, msg=f"{variant}/{name}: {key}"
                )


def rows_of(rank: int, size: int) -> tuple[int, int]:
    """(rows over all steps, tokens asked of the teacher) that one rank computes of a long batch."""
    batch = make_batch(["0" * 100 + "1" * 300] * 2)
    mask = predictable_tokens(batch.loss_mask_N, batch.doc_offsets)
    owned = None if size == 1 else own_rows(mask, batch.doc_offsets, 4, rank, size)
    plan = plan_rows(mask, batch.doc_offsets, 4, owned_N=owned)
    return sum(len(s.row_tokens) for s in plan.steps), len(plan.predicted_tokens)


def test_the_work_of_a_rank_shrinks_with_the_group() -> None:
    alone = rows_of(0, 1)
    for size in (2, 4):
        for rank in range(size):
            for part, whole in zip(rows_of(rank, size), alone):
                assert part < 1.25 * whole / size


def memory_of_a_step(directory: Path) -> None:
    """Bytes that one step keeps for backward, on a group of all ranks."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    group = None
    if size > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        group = SequenceGroup(rank, size, dist.group.WORLD)
    kept: dict[int, int] = {}  # several uses of one tensor keep it once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make_draft()(make_batch(["1" * 400]), make_target_head(), replace(SETTINGS, sequence=group))
    (directory / f"kept_{size}_{rank}").write_text(str(sum(kept.values())))
    if size > 1:
        dist.destroy_process_group()


def test_the_memory_of_a_rank_shrinks_with_the_group(tmp_path: Path) -> None:
    memory_of_a_step(tmp_path)
    assert run_ranks(2, memory_of_a_step, (tmp_path,), tmp_path / "log") == [0, 0], log_of(tmp_path / "log")
    kept = {path.name: int(path.read_text()) for path in tmp_path.glob("kept_*")}
    # half of everything but the step-0 keys and values of the whole batch and the weights
    assert max(kept["kept_2_0"], kept["kept_2_1"]) < 0.65 * kept["kept_1_0"]


# ---------------------------------------------------------------------------------------------------------------- runs


def train_and_count(*runs: Run) -> None:
    """Runs one after the other; rank 0 writes down the tokens of each step."""
    for number, run in enumerate(runs):
        if "MASTER_PORT" in os.environ:
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)

        def count(trainer: Trainer, run: Run = run) -> None:
            train_step = trainer.train_step

            def counting(step: StepBatches) -> None:
                train_step(step)
                if trainer.world.is_main:
                    with (run.root / f"{run.name}.tokens").open("a") as file:
                        file.write(f"{int(trainer._pending[-1].values[1])}\n")

            trainer.train_step = counting  # type: ignore[method-assign]

        train(run, count)


def tokens_of(run: Run) -> list[int]:
    return [int(line) for line in (run.root / f"{run.name}.tokens").read_text().splitlines()]


def test_a_run_on_two_ranks_that_share_batches_is_that_of_one(tmp_path: Path) -> None:
    settings = {
        "training": {"batch_size": 3, "total_steps": 6, "accumulation_steps": 2},
        "checkpoint": {"save_interval": 3},
    }
    one = Run(tmp_path, "one", settings)
    train_and_count(one)
    ddp = Run(tmp_path, "ddp", settings | {"distributed": {"sp_size": 2}})
    fsdp = Run(tmp_path, "fsdp", settings | {"distributed": {"sp_size": 2, "sharding": "fsdp2"}})
    assert run_ranks(2, train_and_count, (ddp, fsdp), tmp_path / "log") == [0, 0], log_of(tmp_path / "log")
    assert "2 rank(s) (2 per batch)" in log_of(tmp_path / "log")
    for run in (ddp, fsdp):
        assert run.losses() == pytest.approx(one.losses(), rel=1e-5)
        for ours, theirs in zip(run.metrics(), one.metrics()):
            for key in ("acc0", "tau", "supervised_tokens", "eval/accuracy", "eval/tau_walk"):
                assert ours.get(key) == pytest.approx(theirs.get(key)), key
        verify_checkpoint(run.output_dir / "step_6")
    assert tokens_of(ddp) == tokens_of(fsdp) == tokens_of(one)  # a batch that two ranks share is counted once
    assert min(tokens_of(one)) > 0
    # a checkpoint of the group continues on one rank
    longer = {**settings, "training": {**settings["training"], "total_steps": 8}}
    back, whole = Run(tmp_path, "ddp", longer), Run(tmp_path, "one", longer)
    train(back)
    train(whole)
    assert back.losses()[-2:] == pytest.approx(whole.losses()[-2:], rel=1e-4)


def test_groups_and_replicas_together(tmp_path: Path) -> None:
    """Four ranks: two groups of two, each with its own batches."""
    settings = {"training": {"batch_size": 1, "total_steps": 4}}
    four = Run(tmp_path, "four", settings | {"distributed": {"sp_size": 2}})
    assert run_ranks(4, train, (four,), tmp_path / "log") == [0] * 4, log_of(tmp_path / "log")
    two = Run(tmp_path, "two", {"training": {"batch_size": 2, "total_steps": 4}})
    train(two)
    assert four.losses() == pytest.approx(two.losses(), rel=1e-5)


def test_bad_samples_are_named_once_and_skipped_by_the_whole_group(tmp_path: Path) -> None:
    faults = {"s3": Fault("refused"), "s5": Fault("nan")}
    settings = {"training": {"total_steps": 12, "skip_budget": 0.1}}
    one = Run(tmp_path, "one", settings, faults)
    train(one)
    two = Run(tmp_path, "two", settings | {"distributed": {"sp_size": 2}}, faults)
    assert run_ranks(2, train, (two,), tmp_path / "log") == [0, 0], log_of(tmp_path / "log")
    assert log_of(tmp_path / "log").count("loss or gradient not finite; step skipped; samples: s5\n") == 1
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert len(two.losses()) == 11
    summary = json.loads((two.output_dir / "exit_summary.json").read_text())
    assert (summary["skipped_samples"], summary["nonfinite_steps"]) == (1, 1)


def test_a_leader_that_fails_ends_its_group(tmp_path: Path) -> None:
    faults = {f"s{i}": Fault("refused") for i in range(24)}
    run = Run(tmp_path, "run", {"distributed": {"sp_size": 2}}, faults)
    codes = run_ranks(2, train, (run,), tmp_path / "log")
    assert codes == [2, 1]
    assert "the budget is 0" in log_of(tmp_path / "log")
    assert "rank 1: stopped" in log_of(tmp_path / "log", 1)  # here the store that says why ends with rank 0


def test_group_sizes_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sp_size 2: does not divide the 1 torchrun rank\(s\)"):
        with open_world(DistributedSection(sp_size=2)):
            raise AssertionError("not reached")
