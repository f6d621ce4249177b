"""The parts of a run from its config: data, engine, target head, a draft that is fresh or restored from the newest
checkpoint. `loop.Trainer` puts them together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from specforge_lite.capture.base import TargetEngine, TargetInfo, num_positions
from specforge_lite.capture.prefetch import SkipBudget
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config, local_directory
from specforge_lite.core.log import info
from specforge_lite.data.sampler import plan_steps
from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.initialize import init_from_target, init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead, load_target_head
from specforge_lite.serving.registry import open_engine
from specforge_lite.training.checkpoint import Progress, find_resume, restore_run
from specforge_lite.training.dataloader import BatchMaker, Dataloader
from specforge_lite.training.distributed import World
from specforge_lite.training.optimizer import DraftOptimizer
from specforge_lite.training.parallel import ReplicatedDraft, spread_draft
from specforge_lite.training.settings import TrainConfig, run_length
from specforge_lite.types import DraftBatch

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from specforge_lite.data.follow import FollowPlan, TrafficReader
    from specforge_lite.data.sampler import BatchPlan
    from specforge_lite.data.store import TokenizedDataset

# ----------------------------------------------------------------------------------------------------- data and target


@dataclass(frozen=True)
class RunData:
    """Datasets of a run, `eval` where there is one; with `--offline-dir` also what reads the states beside them."""

    train: TokenizedDataset | TrafficReader
    eval: TokenizedDataset | None
    states: TargetEngine | None = None


def is_traffic(rows: TokenizedDataset | TrafficReader) -> TypeIs[TrafficReader]:
    """True for rows that come while the run goes on; how many there will be is not known."""
    return not hasattr(rows, "lengths")


def load_data(config: TrainConfig) -> RunData:
    """Open or build the tokenized datasets; with `--offline-dir` they lie beside the captured states.

    Raises ConfigError first of all for a `--max-length` that the target has no positions for.
    """
    if config.training.offline_dir is not None:
        from specforge_lite.training.offline import open_offline

        return open_offline(config, config.training.offline_dir)
    _check_max_length(config)
    data, traffic = config.data, None
    if config.training.follow is not None:
        from specforge_lite.training.follow import open_traffic

        traffic = open_traffic(config)
        if data.eval_data_path is None:
            return RunData(traffic, None)
    from specforge_lite.data.cache import open_dataset

    train = traffic or open_dataset(data.train_data_path, config.target, data)
    return RunData(train, open_dataset(data.eval_data_path, config.target, data) if data.eval_data_path else None)


def _check_max_length(config: TrainConfig) -> None:
    """Raise ConfigError if the `--max-length` that was given is beyond the target's positions.

    A default is not refused, and neither is a server that was started with less: there the samples' lengths count.
    """
    if "max_length" not in config.data.model_fields_set:
        return
    longest = num_positions(load_config(config.target.target_model_path, config.target.trust_remote_code))
    if longest is not None and config.data.max_length > longest:
        raise ConfigError(
            f"max_length {config.data.max_length}: target {config.target.target_model_path} has positions for {longest}"
            f" tokens; use --max-length {longest} or less, or give its config.json rope scaling"
        )


def open_target(config: TrainConfig, world: World, data: RunData) -> AbstractContextManager[TargetEngine]:
    """The engine of the run, closed at the end; with `--offline-dir` the reader of captured states."""
    if world.device.type == "cuda":
        from specforge_lite.training.gpu_share import share_of_gpu

        config = share_of_gpu(config, world.device)
    return closing(
        data.states
        or open_engine(
            config.target,
            max_length=config.data.max_length,
            log_dir=config.checkpoint.output_dir / "engine",
            wait_minutes=config.distributed.dist_timeout,
            device=str(world.device),
        )
    )


# --------------------------------------------------------------------------------------------------------------- draft


def compute_dtype(config: TrainConfig, world: World) -> torch.dtype:
    """What `--precision` means on this device."""
    name = config.training.precision
    if name == "auto":
        name = "bf16" if world.device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def make_draft_config(config: TrainConfig, target: TargetInfo, target_config: Any) -> DraftConfig:
    """The draft's shape from `--draft-model-config`, or derived from the target; aux layers are the engine's."""
    section = config.draft
    source = _warm_start(config)
    if source is not None and section.draft_model_config is None:
        size = section.draft_vocab_size or source.config.draft_vocab_size
        draft = source.config.replace(draft_vocab_size=size, aux_layer_ids=None)
    elif section.draft_model_config is not None:
        from specforge_lite.checkpoints.draft_files import read_draft_config

        draft = read_draft_config(section.draft_model_config, config.algorithm, target_config)
        if section.draft_vocab_size is not None:
            draft = draft.replace(draft_vocab_size=section.draft_vocab_size)
    else:
        draft = DraftConfig.from_target(target_config, section.draft_vocab_size, config.algorithm)
    changes = config.draft_shape(draft, target_config)
    changes["aux_layer_ids"] = None if config.algorithm == "eagle1" else target.aux_layer_ids
    given = {"norm_output": section.norm_output, "fc_norm": section.fc_norm}
    changes |= {name: value for name, value in given.items() if value is not None}
    if draft.aux_layer_ids not in (None, target.aux_layer_ids) and section.draft_model_config is not None:
        raise ConfigError(
            f"{section.draft_model_config}: aux layers {list(draft.aux_layer_ids or ())}, the target's engine captures"
            f" {list(target.aux_layer_ids)}; give --aux-layer-ids or change the file"
        )
    draft = draft.replace(**changes)
    for name, ours, theirs in (
        ("target_hidden_size", draft.target_hidden_size, target.hidden_size),
        ("vocab_size", draft.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise ConfigError(f"draft config: {name} {ours}, the target has {theirs}")
    return draft


def _warm_start(config: TrainConfig) -> Draft | None:
    if not config.draft.starts_from_draft:
        return None
    from specforge_lite.training.warm_start import source_of

    return source_of(config)


@dataclass
class RunModels:
    """What is trained, what it learns from, and what must not change between a checkpoint and the run that continues
    it (`identity`)."""

    draft: Draft
    target_head: TargetHead
    identity: dict[str, Any]


def load_models(config: TrainConfig, target: TargetInfo, data: RunData, world: World) -> RunModels:
    """Target head on the device, and a freshly initialised draft, the same on every rank."""
    directory = local_directory(config.target.target_model_path)
    target_config = load_config(config.target.target_model_path, config.target.trust_remote_code)
    draft_config = make_draft_config(config, target, target_config)
    for dataset in (data.train, data.eval):
        if dataset is not None and not is_traffic(dataset):
            config.check_dataset(draft_config, dataset)
    source = _warm_start(config)
    if is_traffic(data.train):
        from specforge_lite.training.follow import kept_vocab_map

        d2t, t2d = kept_vocab_map(draft_config, source, data.train)
    else:
        from specforge_lite.data.vocab import open_or_build_vocab_map

        sizes = (draft_config.draft_vocab_size, draft_config.vocab_size)
        vocab_map = open_or_build_vocab_map(data.train, *sizes, config.data.cache_dir)
        d2t, t2d = vocab_map.d2t, vocab_map.t2d
    head = load_target_head(directory, target_config)
    draft = build_draft(draft_config, d2t, t2d)
    init_random(draft, config.training.seed)
    if draft.embed_tokens is not None:
        from specforge_lite.model.own_embeddings import fit_own_embeddings

        fit_own_embeddings(draft, head)
    if config.draft.init == "target" or (source is not None and config.algorithm == "eagle3"):
        left_random = init_from_target(draft, directory, target_config, head)
        if left_random and source is None:
            why = "absent in the target, of another shape, or quantised in a form that is not read"
            info(f"warm start: random, because {why}: {', '.join(left_random)}")
    if source is not None:
        from specforge_lite.training.warm_start import copy_source

        copy_source(draft, source, config.draft.init, config.draft.init_partial)
    digest = lambda content: hashlib.sha256(content).hexdigest()[:32]  # noqa: E731
    rows = head.lm_head_VH[::97].float().contiguous()  # enough to tell targets apart, with the final norm
    identity = {
        "draft": draft_config.to_dict(),
        "target": digest(head.norm_weight_H.float().numpy().tobytes() + rows.numpy().tobytes()),
        "data": data.train.fingerprint,
        "vocab_map": digest(d2t.numpy().tobytes()),
    }
    return RunModels(draft, head.to(world.device, compute_dtype(config, world)), identity)


# ------------------------------------------------------------------------------------------------------------- trainer


def plan_batches(config: TrainConfig, data: TokenizedDataset | TrafficReader, world: World) -> BatchPlan | FollowPlan:
    """Which samples form a batch in which step."""
    training = config.training
    sizes: dict[str, Any] = {
        "batch_size": training.batch_size,
        "accumulation_steps": training.accumulation_steps,
        "rank": world.dp_rank,
        "world_size": world.dp_size,
        "max_tokens_per_batch": training.max_tokens_per_batch,
    }
    if is_traffic(data):
        return data.plan(**sizes, captures=not world.sp_rank)
    return plan_steps(data.lengths, data.supervised_counts, seed=training.seed, **sizes)


def open_dataloader(
    config: TrainConfig,
    world: World,
    plan: BatchPlan | FollowPlan,
    data: RunData,
    engine: TargetEngine,
    to_batch: BatchMaker,
    skips: SkipBudget,
) -> Dataloader:
    """This rank's batches, captured ahead; ranks that share batches receive those of the first one."""
    dtype = compute_dtype(config, world)
    make: Callable[..., DraftBatch] = to_batch
    if world.sequence is not None:
        from specforge_lite.training.sequence import FollowerDataloader, share_batch

        if world.sp_rank:
            return FollowerDataloader(plan.steps(), world, dtype)
        make = lambda *parts: share_batch(to_batch(*parts), world, dtype)  # noqa: E731
    budget = config.training.max_tokens_per_batch
    length = config.data.max_length if is_traffic(data.train) else data.train.lengths.mean()
    per_batch = config.training.batch_size if budget is None else budget / length
    samples = cast("FollowPlan", plan) if is_traffic(data.train) else data.train
    return Dataloader(plan.steps(), samples, engine, make, skips, per_batch)


def restore_or_start(
    config: TrainConfig, world: World, models: RunModels, plan: BatchPlan | FollowPlan, dtype: torch.dtype
) -> tuple[ReplicatedDraft, DraftOptimizer, Progress, float]:
    """(draft on its device, optimizer, position, total steps), from the newest checkpoint where there is one."""
    resume = find_resume(config, models.draft, models.identity, plan, world)
    parallel = spread_draft(models.draft, world, config.distributed, dtype)
    scaler = None
    if dtype == torch.float16:
        from specforge_lite.training.fp16 import LossScaler

        scaler = LossScaler(config.optimizer, world.device)
    optimizer = DraftOptimizer(parallel.parameters, config.optimizer, 1, scaler)
    progress = Progress(data=plan.state_dict())
    if resume is not None:
        progress = restore_run(resume, parallel, optimizer, plan, world)
    training = config.training
    # Epochs are counted in samples: what is left of them takes more or fewer steps in other batch sizes.
    total = run_length(training, lambda num_epochs: progress.step + plan.remaining_steps(num_epochs))
    optimizer.total_steps = training.total_steps or total
    if training.total_steps is not None and total < training.total_steps:
        info(
            f"--total-steps {training.total_steps} shapes the learning rate; the run ends after {total} steps"
            f" (--num-epochs {training.num_epochs})"
        )
    return parallel, optimizer, progress, total


def check_lengths(config: TrainConfig, data: RunData, engine: TargetEngine, draft: DraftConfig) -> SkipBudget:
    """The budget of samples that a rank may leave out. Raises ConfigError if more are too long for the target; warns
    of samples that are too long for the draft's positions."""
    budgets = []
    parts = ((data.train, "training data", None), (data.eval, "evaluation data", config.training.eval_max_samples))
    for dataset, what, count in parts:
        if dataset is not None and not is_traffic(dataset):
            lengths = dataset.lengths.tolist()[:count]
            budgets.append(SkipBudget(config.training.skip_budget, len(lengths)))
            budgets[-1].check_lengths(lengths, engine.info.max_length, what)
            dataset.warn_beyond(draft.max_position_embeddings)
    if is_traffic(data.train):
        from specforge_lite.training.follow import FollowBudget

        return FollowBudget(config.training.skip_budget)
    return budgets[0]


def ttt_settings(config: TrainConfig, dtype: torch.dtype, world: World, draft: Draft) -> TTTSettings:
    """The draft's own view of the settings."""
    training = config.training
    return TTTSettings(
        num_steps=draft.num_training_steps(training.ttt_length),
        step_decay=training.step_decay,
        attention_backend=training.draft_attention_backend,
        loss_mask_alignment=training.loss_mask_alignment,
        loss=training.loss,
        compute_dtype=dtype,
        activation_checkpointing=training.activation_checkpointing,
        compile=training.compile,
        sequence=world.sequence,
        **training.loss_settings(),
    )
