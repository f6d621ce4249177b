"""The trainer of a run: the parts of `training.parts`, restored from the newest checkpoint if there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from specforge_lite.capture.base import TargetEngine
from specforge_lite.capture.prefetch import SkipBudget
from specforge_lite.checkpoints.draft_files import read_config
from specforge_lite.checkpoints.training_run import SavedState, load_draft_tensors, newest_complete, read_state
from specforge_lite.core.errors import CheckpointError
from specforge_lite.core.log import info
from specforge_lite.core.provenance import collect_provenance, redact
from specforge_lite.data.sampler import BatchPlan
from specforge_lite.model.draft import TTTSettings
from specforge_lite.training.checkpoint import restore, restore_rng
from specforge_lite.training.dataloader import BatchMaker, Feed, prefetch_depth
from specforge_lite.training.distributed import World
from specforge_lite.training.eagle_resume import find_eagle_state, resume_from_state
from specforge_lite.training.evaluate import EvalResult, evaluate
from specforge_lite.training.loop import Progress, Trainer
from specforge_lite.training.loss_scale import LossScaler
from specforge_lite.training.optimizer import DraftOptimizer
from specforge_lite.training.parallel import ParallelDraft, check_shape, frozen_tensors, spread_draft
from specforge_lite.training.reporting import Reporter
from specforge_lite.training.run_dir import StopRequest
from specforge_lite.training.settings import TrainConfig, run_length
from specforge_lite.training.shared_dataloader import FollowerFeed, SharingBatchMaker
from specforge_lite.training.wiring import RunData, RunModels, compute_dtype, ttt_settings


@runtime_checkable
class ReportsHealth(Protocol):
    """An engine that can say what is out of order with it, in a few words; nothing when all is well."""

    def health(self) -> str: ...


def build_trainer(
    config: TrainConfig,
    world: World,
    data: RunData,
    engine: TargetEngine,
    models: RunModels,
    reporter: Reporter,
    stop: StopRequest,
) -> Trainer:
    """Put the parts together; every rank calls it. Raises CheckpointError for a checkpoint of another run."""
    torch.manual_seed(config.training.seed + world.rank)
    skips = check_lengths(config, data, engine)
    resume = find_resume(config, models, world)
    eagle_state = find_eagle_state(config, models, world) if resume is None else None
    plan = make_plan(config, data, world)
    total_steps = run_length(config.training, plan.total_steps)
    dtype = compute_dtype(config, world)
    parallel = spread_draft(models.draft, world, config.distributed, dtype)
    scaler = LossScaler(config.optimizer, world.device) if dtype == torch.float16 else None
    optimizer = DraftOptimizer(parallel.parameters, config.optimizer, total_steps, scaler)
    progress = Progress(data=plan.state_dict())
    if resume is not None:
        progress = restore_run(*resume, parallel, optimizer, plan, world)
    elif eagle_state is not None:
        progress = resume_from_state(eagle_state, parallel, optimizer, plan, world, total_steps)
    ttt = replace(ttt_settings(config, dtype), sequence=world.sequence)
    to_batch = BatchMaker(models.target_head, len(engine.info.aux_layer_ids), world.device, dtype)
    _announce(config, models, world, total_steps, plan.steps_per_epoch, progress.step, dtype)
    reporter.start(progress.step, redact(config.model_dump(mode="json")))
    return Trainer(
        config=config,
        world=world,
        parallel=parallel,
        optimizer=optimizer,
        target_head=models.target_head,
        ttt=ttt,
        feed=make_feed(config, plan, data, engine, to_batch, skips, world, dtype),
        reporter=reporter,
        stop=stop,
        progress=progress,
        total_steps=total_steps,
        documents=run_documents(config, models),
        evaluator=make_evaluator(config, data, engine, models, parallel, to_batch, ttt, world),
        engine_health=engine.health if isinstance(engine, ReportsHealth) else str,
    )


def check_lengths(config: TrainConfig, data: RunData, engine: TargetEngine) -> SkipBudget:
    """The budget of samples that a rank may leave out. Raises ConfigError if more are too long for the target."""
    budget, longest = config.training.skip_budget, engine.info.max_length
    skips = SkipBudget(budget, len(data.train))
    skips.check_lengths(data.train.lengths.tolist(), longest, "training data")
    if data.eval is not None:
        lengths = data.eval.lengths.tolist()[: config.training.eval_max_samples]
        SkipBudget(budget, len(lengths)).check_lengths(lengths, longest, "evaluation data")
    return skips


def make_plan(config: TrainConfig, data: RunData, world: World) -> BatchPlan:
    """Which samples each rank trains on in which step."""
    training = config.training
    return BatchPlan(
        data.train.lengths,
        data.train.supervised_counts,
        batch_size=training.batch_size,
        accumulation_steps=training.accumulation_steps,
        rank=world.dp_rank,
        world_size=world.dp_size,
        seed=training.seed,
        max_tokens_per_batch=training.max_tokens_per_batch,
    )


def make_feed(
    config: TrainConfig,
    plan: BatchPlan,
    data: RunData,
    engine: TargetEngine,
    to_batch: BatchMaker,
    skips: SkipBudget,
    world: World,
    dtype: torch.dtype,
) -> Feed:
    """The batches of this rank; those of a sequence group come from its first rank."""
    if world.sp_rank:
        return FollowerFeed(plan.steps(), world, dtype)
    maker = to_batch if world.sequence is None else SharingBatchMaker(to_batch, world)
    return Feed(plan.steps(), data.train, engine, maker, skips, _depth(config, data, engine))


def _depth(config: TrainConfig, data: RunData, engine: TargetEngine) -> int:
    """Micro batches to capture ahead, by how many samples one has."""
    samples, budget = config.training.batch_size, config.training.max_tokens_per_batch
    if budget is not None:
        samples = max(1, int(budget / data.train.lengths.mean()))
    return prefetch_depth(engine, samples)


def run_documents(config: TrainConfig, models: RunModels) -> dict[str, Any]:
    """JSON files that each checkpoint carries besides its state."""
    values = config.model_dump(mode="json")
    return {
        "config.json": redact(values),
        "provenance.json": collect_provenance(values),
        "draft_config.json": models.draft.config.to_dict(),
        "identity.json": models.identity,
    }


def _announce(
    config: TrainConfig,
    models: RunModels,
    world: World,
    total_steps: int,
    per_epoch: int,
    step: int,
    dtype: torch.dtype,
) -> None:
    trained = sum(p.numel() for p in models.draft.parameters() if p.requires_grad)
    info(
        f"training {trained:,} parameters in {str(dtype).removeprefix('torch.')}: {total_steps} steps, {per_epoch} per"
        f" epoch, {world.world_size} rank(s)"
        + (f" ({world.sp_size} per batch)" if world.sp_size > 1 else "")
        + f", {config.distributed.sharding}, "
        + (f"resumed after step {step}" if step else "from the start")
    )


# ------------------------------------------------------------------------------------------------------------ evaluate


def make_evaluator(
    config: TrainConfig,
    data: RunData,
    engine: TargetEngine,
    models: RunModels,
    parallel: ParallelDraft,
    to_batch: BatchMaker,
    ttt: TTTSettings,
    world: World,
) -> Callable[[], EvalResult] | None:
    """A function that evaluates the draft as it is now; None without evaluation data."""
    dataset = data.eval
    if dataset is None:
        return None
    # An EAGLE-1 draft trains one step and decodes a chain; evaluation follows the chain.
    chain = config.training.eval_chain_length if config.algorithm == "eagle1" else 1
    # Every rank evaluates samples of its own: without gradients a long one fits as well.
    settings = replace(ttt, collect_rows=True, sequence=None, num_steps=max(ttt.num_steps, chain))

    def run() -> EvalResult:
        return evaluate(
            lambda batch: parallel.forward(batch, models.target_head, settings),
            dataset,
            engine,
            to_batch,
            num_steps=settings.num_steps,
            chain_length=config.training.eval_chain_length,
            batch_size=config.training.batch_size,
            max_samples=config.training.eval_max_samples,
            world=world,
            skips=SkipBudget(config.training.skip_budget, len(dataset)),
        )

    return run


# -------------------------------------------------------------------------------------------------------------- resume


def find_resume(config: TrainConfig, models: RunModels, world: World) -> tuple[Path, SavedState] | None:
    """The newest complete checkpoint of the output directory; rank 0 looks and checks, all ranks know.

    The draft takes over what is saved and not trained: its vocabulary map (another one only with
    `--allow-vocab-mismatch`) and, where it has one, its own embedding table. `data` is empty where the position in the
    data means nothing, because they are others.
    """
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            path = newest_complete(config.checkpoint.output_dir)
            if path is not None:
                check_identity(path, models.identity, config)
                state = read_state(path)
                if read_config(path / "identity.json")["data"] != models.identity["data"]:
                    state = replace(state, data={})
                answer = {"path": str(path), "state": asdict(state)}
        except CheckpointError as error:
            answer = {"problem": str(error)}
    answer = json.loads(world.broadcast_text(json.dumps(answer)))
    if "problem" in answer:
        raise CheckpointError(answer["problem"])
    if not answer:
        return None
    _take_saved_constants(Path(answer["path"]), models, world)
    return Path(answer["path"]), SavedState(**answer["state"])


def check_identity(path: Path, identity: dict[str, Any], config: TrainConfig) -> None:
    """Raise CheckpointError naming what differs between the checkpoint's run and this one; say what else changed."""
    before = read_config(path / "identity.json")
    checks = [("draft." + k, before["draft"].get(k), v) for k, v in identity["draft"].items()]
    checks += [(k, before.get(k), identity[k]) for k in ("target", "data", "vocab_map")]
    lenient = ("data", "vocab_map") if config.draft.allow_vocab_mismatch else ()
    for name, saved, now in checks:
        if saved != now and name not in lenient:
            hint = "; --allow-vocab-mismatch continues all the same" if name in ("data", "vocab_map") else ""
            raise CheckpointError(
                f"{path}: {name} was {saved}, this run has {now}; choose another --output-dir, or --overwrite{hint}"
            )
    old, new = _leaves(read_config(path / "config.json")), _leaves(redact(config.model_dump(mode="json")))
    changed = [f"{k} {old[k]} -> {new[k]}" for k in new if k in old and old[k] != new[k]]
    if changed:
        info(f"resuming with other settings: {', '.join(changed)}")


def _leaves(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for section in config.values() for key, value in section.items()}


def _take_saved_constants(path: Path, models: RunModels, world: World) -> None:
    draft = models.draft
    saved = load_draft_tensors(path)[1] if world.is_main else {}
    for name, tensor in frozen_tensors(draft).items():
        value = saved.get(name, tensor).detach()
        check_shape(name, tensor.shape, value)
        with torch.no_grad():  # bool and small: gloo has no bool
            tensor.copy_(world.broadcast_(value.to(torch.uint8) if value.dtype == torch.bool else value.clone()))


def restore_run(
    path: Path, state: SavedState, parallel: ParallelDraft, optimizer: DraftOptimizer, plan: BatchPlan, world: World
) -> Progress:
    """Weights, optimizer, random numbers and the position in the data of a checkpoint."""
    restore(path, parallel, optimizer, world)
    if optimizer.scaler is not None:
        optimizer.scaler.load_state(state.counters)
    restore_rng(path, state, world)
    if state.data:
        plan.load_state_dict(state.data)
    else:
        info("the data are others than those of the checkpoint: their first epoch begins")
    info(f"resumed from {path}")
    return Progress(
        step=state.step,
        data=plan.state_dict(),
        skipped_before=int(state.counters["skipped_samples"]),
        nonfinite_steps=int(state.counters["nonfinite_steps"]),
        seconds_before=state.counters["seconds"],
        last_checkpoint=path,
    )
