"""The parts of a run from its config: data, engine, target head, and a fresh draft."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specforge_lite.capture.base import TargetEngine, TargetInfo
from specforge_lite.capture.context import num_positions
from specforge_lite.capture.offline import OfflineEngine, OfflinePart
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config, load_tokenizer, local_directory
from specforge_lite.core.log import info
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.data.cache import open_or_build_dataset
from specforge_lite.data.store import TokenizedDataset
from specforge_lite.data.vocab import VocabMap, open_or_build_vocab_map
from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.initialize import fit_own_embeddings, init_from_target, init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead, load_target_head
from specforge_lite.serving.registry import open_engine
from specforge_lite.training.distributed import World
from specforge_lite.training.eagle1 import Eagle1TrainingSection
from specforge_lite.training.settings import TrainConfig

# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class RunData:
    """Datasets of a run. `eval` may be missing."""

    train: TokenizedDataset
    eval: TokenizedDataset | None


def load_data(config: TrainConfig) -> RunData:
    """Open or build the tokenized datasets; with `--offline-dir` they lie beside the captured states.

    Raises ConfigError first of all for a `--max-length` that the target has no positions for.
    """
    check_max_length(config)
    if config.training.offline_dir is not None:
        parts = open_offline(config.training.offline_dir)
        return RunData(parts[0].dataset, parts[1].dataset if len(parts) > 1 else None)
    train = open_dataset(config.data.train_data_path, config.target, config.data)
    evaluation = config.data.eval_data_path
    return RunData(train, open_dataset(evaluation, config.target, config.data) if evaluation is not None else None)


def open_dataset(path: str | None, target: TargetSection, data: DataSection) -> TokenizedDataset:
    """Open or build the tokenized dataset of a file. Raises ConfigError without one."""
    if path is None:
        raise ConfigError("train_data_path: required (flag --train-data-path)")
    return open_or_build_dataset(path, load_tokenizer(target.target_model_path, target.trust_remote_code), data)


def open_offline(offline_dir: Path) -> list[OfflinePart]:
    """The `train` and, where it was captured, the `eval` part of an offline directory."""
    evaluation = offline_dir / "eval"
    return [OfflinePart(offline_dir / "train"), *([OfflinePart(evaluation)] if evaluation.exists() else [])]


# -------------------------------------------------------------------------------------------------------------- target


@contextmanager
def open_target(config: TrainConfig, world: World) -> Iterator[TargetEngine]:
    """The engine of the run, closed at the end; with `--offline-dir` a reader of captured states."""
    if config.training.offline_dir is not None:
        engine: TargetEngine = OfflineEngine(open_offline(config.training.offline_dir))
    else:
        engine = open_engine(
            config.target,
            max_length=config.data.max_length,
            log_dir=config.checkpoint.output_dir / "engine",
            wait_minutes=config.distributed.dist_timeout,
            device=str(world.device),
        )
    try:
        yield engine
    finally:
        engine.close()


def check_max_length(config: TrainConfig) -> None:
    """Raise ConfigError if the `--max-length` that was given is beyond the target's positions.

    A default is not refused, and neither is a server that was started with less: there the samples' lengths count.
    """
    if config.training.offline_dir is not None or "max_length" not in config.data.model_fields_set:
        return
    longest = num_positions(load_config(config.target.target_model_path, config.target.trust_remote_code))
    if longest is not None and config.data.max_length > longest:
        raise ConfigError(
            f"max_length {config.data.max_length}: target {config.target.target_model_path} has positions for {longest}"
            f" tokens; use --max-length {longest} or less, or give its config.json rope scaling"
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
    if section.draft_model_config is not None:
        draft = read_draft_config(section.draft_model_config, config.algorithm)
        if section.draft_vocab_size is not None:
            draft = draft.replace(draft_vocab_size=section.draft_vocab_size)
    else:
        draft = DraftConfig.from_target(target_config, section.draft_vocab_size, config.algorithm)
    changes: dict[str, Any] = {"aux_layer_ids": target.aux_layer_ids if config.algorithm == "eagle3" else None}
    if section.norm_output is not None:
        changes["norm_output"] = section.norm_output
    if section.fc_norm is not None:
        changes["fc_norm"] = section.fc_norm
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


def read_draft_config(path: Path, algorithm: str) -> DraftConfig:
    """A draft's config.json for `algorithm`; a plain Llama config, as EAGLE's are, fits both."""
    draft = DraftConfig.from_json(path)
    if draft.algorithm == algorithm:
        return draft
    file = path / "config.json" if path.is_dir() else path
    architecture = "".join(json.loads(file.read_text(encoding="utf-8")).get("architectures") or [])
    if "Eagle" in architecture:
        script = "train_eagle3_online.py" if draft.algorithm == "eagle3" else "train_eagle1.py"
        raise ConfigError(f"{path}: architectures {architecture}: that is trained with scripts/{script}")
    return draft.replace(algorithm=algorithm, draft_vocab_size=draft.vocab_size)


@dataclass
class RunModels:
    """What is trained, and what it learns from."""

    draft: Draft
    target_head: TargetHead
    identity: dict[str, Any]


def load_models(config: TrainConfig, target: TargetInfo, data: RunData, world: World) -> RunModels:
    """Target head on the device, and a freshly initialised draft, the same on every rank."""
    directory = local_directory(config.target.target_model_path)
    target_config = load_config(config.target.target_model_path, config.target.trust_remote_code)
    draft_config = make_draft_config(config, target, target_config)
    vocab_map = open_or_build_vocab_map(
        data.train, draft_config.draft_vocab_size, draft_config.vocab_size, config.data.cache_dir
    )
    head = load_target_head(directory, target_config)
    draft = build_draft(draft_config, vocab_map.d2t, vocab_map.t2d)
    init_random(draft, config.training.seed)
    fit_own_embeddings(draft, head)
    if config.draft.init == "target":
        left_random = init_from_target(draft, directory, target_config, head)
        if left_random:
            why = "absent in the target, of another shape, or quantised in a form that is not read"
            info(f"warm start: random, because {why}: {', '.join(left_random)}")
    identity = _identity(config, draft_config, vocab_map, data, head)
    return RunModels(draft, head.to(world.device, compute_dtype(config, world)), identity)


def _identity(
    config: TrainConfig, draft: DraftConfig, vocab_map: VocabMap, data: RunData, head: TargetHead
) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that continues it."""
    return {
        "draft": draft.to_dict(),
        "target": _target_fingerprint(head),
        "data": data.train.fingerprint,
        "vocab_map": _digest(vocab_map.d2t.numpy().tobytes()),
    }


def _target_fingerprint(head: TargetHead) -> str:
    """Tells targets apart cheaply: final norm and every 97th row of the head."""
    rows = head.lm_head_VH[::97].float().contiguous()
    return _digest(head.norm_weight_H.float().numpy().tobytes() + rows.numpy().tobytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def ttt_settings(config: TrainConfig, dtype: torch.dtype) -> TTTSettings:
    """The draft's own view of the settings."""
    training = config.training
    settings = TTTSettings(
        num_steps=training.ttt_length,
        step_decay=training.step_decay,
        attention_backend=training.draft_attention_backend,
        loss_mask_alignment=training.loss_mask_alignment,
        loss=training.loss,
        compute_dtype=dtype,
        activation_checkpointing=training.activation_checkpointing,
        compile=training.compile,
    )
    if isinstance(training, Eagle1TrainingSection):
        settings = replace(settings, v_weight=training.v_weight, p_weight=training.p_weight, noise=training.noise)
    return settings
