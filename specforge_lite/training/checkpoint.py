"""Checkpoints: one directory per saved step, complete or absent, checked by hash before it is used.

    OUTPUT_DIR/step_120/
      draft.safetensors        fp32 master weights and the vocabulary map (d2t, t2d), names as in the draft
      draft_config.json        DraftConfig.to_dict()
      optimizer.safetensors    exp_avg.NAME, exp_avg_sq.NAME, step.NAME
      rng.safetensors          cpu [ranks, bytes], cuda [ranks, bytes]
      state.json               step, position in the data, counters, world size
      metrics.json             the newest training and evaluation metrics
      config.json  provenance.json  identity.json
      manifest.json            size and sha256 of every other file; written last

Whole tensors, whatever the sharding was, so any world size can continue. Nothing here unpickles anything.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from specforge_lite.checkpoints.training_run import (
    FORMAT_VERSION,
    MANIFEST,
    SavedState,
    checkpoints,
    is_complete,
    newest_complete,
    read_config,
    read_safetensors,
    read_state,
)
from specforge_lite.core.errors import CheckpointError
from specforge_lite.core.files import (
    atomic_directory,
    remove_directory,
    save_tensors,
    sha256_of,
    tensor_bytes,
    write_json,
)
from specforge_lite.core.log import format_bytes, info
from specforge_lite.core.provenance import redact
from specforge_lite.data.sampler import BatchPlan
from specforge_lite.model.draft import Draft
from specforge_lite.training.distributed import World
from specforge_lite.training.optimizer import DraftOptimizer
from specforge_lite.training.parallel import ReplicatedDraft, check_shape, frozen_tensors
from specforge_lite.training.settings import TrainConfig

if TYPE_CHECKING:
    from specforge_lite.data.follow import FollowPlan

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """Where the run stands; what a checkpoint keeps besides tensors. `data`: state of the sampler."""

    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    skipped_before: int = 0
    nonfinite_steps: int = 0
    seconds_before: float = 0.0
    last_checkpoint: Path | None = None


# ---------------------------------------------------------------------------------------------------------------- save


def save_checkpoint(
    output_dir: Path,
    state: SavedState,
    parallel: ReplicatedDraft,
    optimizer: DraftOptimizer,
    world: World,
    documents: dict[str, Any],
    keep: int | None,
) -> Path:
    """Write `output_dir/step_N`; every rank calls it, rank 0 writes. `documents`: more JSON files, by name.

    keep: delete the oldest checkpoints beyond this number, after the new one is complete.
    Raises CheckpointError when the disk is full or replicas have drifted apart.
    """
    own_weights = parallel.checksum()
    if own_weights is not None and len(set(all_ranks := world.gather_texts(str(own_weights)))) > 1:
        raise CheckpointError(
            f"the ranks' weights have drifted apart (checksums {', '.join(all_ranks)}); not saved."
            " Look for a faulty device or mixed library versions"
        )
    draft_tensors = {name: parallel.full(name, tensor) for name, tensor in parallel.parameters.items()}
    draft_tensors |= {name: tensor.detach().cpu() for name, tensor in parallel.frozen().items()}
    optimizer_tensors: dict[str, Tensor] = {}
    for name, moments in optimizer.saved_tensors().items():
        for kind in MOMENTS:
            optimizer_tensors[f"{kind}.{name}"] = parallel.full(name, moments[kind])
        optimizer_tensors[f"step.{name}"] = moments["step"].detach().cpu().clone()
    tensors = {
        "draft.safetensors": draft_tensors,
        "optimizer.safetensors": optimizer_tensors,
        "rng.safetensors": _gather_rng(world),
    }
    final = output_dir / f"step_{state.step}"

    def write() -> None:
        try:
            _write_directory(final, tensors, documents | {"state.json": asdict(state)})
            _delete_oldest(output_dir, keep)
        except OSError as error:
            needed, free = sum(map(tensor_bytes, tensors.values())), shutil.disk_usage(output_dir).free
            room = f"a checkpoint takes {format_bytes(needed)}, {format_bytes(free)} are free"
            raise CheckpointError(f"{final}: not saved: {error.strerror or error}; {room}") from None

    world.on_main(write)
    return final


def _write_directory(final: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> None:
    with atomic_directory(final, held=True) as temporary:  # the run's lock is held
        for name, group in tensors.items():
            save_tensors(group, temporary / name)
        for name, value in documents.items():
            write_json(temporary / name, value)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())
        }
        write_json(temporary / MANIFEST, {"format": FORMAT_VERSION, "files": files})


def _delete_oldest(output_dir: Path, keep: int | None) -> None:
    if keep is not None:
        for path in checkpoints(output_dir)[keep:]:
            remove_directory(path)


def prune_checkpoints(output_dir: Path, keep: int | None) -> None:
    """Delete what a run that was killed between a save and the deletion of the oldest checkpoint left too many, once
    the newest `keep` are complete."""
    found = checkpoints(output_dir)
    if keep is not None and len(found) > keep and all(is_complete(path) for path in found[:keep]):
        _delete_oldest(output_dir, keep)


def _gather_rng(world: World) -> dict[str, Tensor]:
    """RNG states of all ranks: cpu [ranks, bytes], cuda [ranks, bytes] where there is a GPU."""
    states = {"cpu": torch.stack(world.gather_bytes(bytes(torch.get_rng_state().numpy())))}
    if world.device.type == "cuda":
        own = torch.cuda.get_rng_state(world.device)
        states["cuda"] = torch.stack(world.gather_bytes(bytes(own.numpy())))
    return states


# -------------------------------------------------------------------------------------------------------------- resume


@dataclass
class Resume:
    """What a run goes on from, found before the draft is spread over the ranks.

    state.data is empty where the position in the data means nothing, because they are others. tensors, on rank 0 only:
    weights, exp_avg.NAME, exp_avg_sq.NAME. steps: AdamW's counters by parameter; empty: the optimizer starts fresh.
    from_eagle: `state_N` of EAGLE's own trainer, which keeps no random numbers that could be read.
    """

    path: Path
    state: SavedState
    steps: dict[str, float]
    from_eagle: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)


def find_resume(
    config: TrainConfig, draft: Draft, identity: dict[str, Any], plan: BatchPlan | FollowPlan, world: World
) -> Resume | None:
    """The newest complete checkpoint of the output directory, else EAGLE's newest `state_N`; rank 0 looks, all know.

    The draft takes over what is saved and not trained: its vocabulary map (another one only with
    `--allow-vocab-mismatch`) and, where it has one, its own embedding table. Raises CheckpointError for a checkpoint of
    another run, and for a tensor that does not fit.
    """
    tensors: dict[str, Tensor] = {}
    frozen = frozen_tensors(draft)

    def look() -> dict[str, Any] | None:
        found, section = _read_own(config, draft, identity, tensors), config.checkpoint
        may_be_eagle = found is None and isinstance(plan, BatchPlan) and section.resume and not section.overwrite
        if may_be_eagle and any(section.output_dir.glob("state_*")):
            from specforge_lite.training.eagle_resume import read_eagle

            found = read_eagle(config, draft, cast(BatchPlan, plan), tensors)
        for name, tensor in frozen.items():
            check_shape(name, tensor.shape, tensors.get(name, tensor))
        return found

    found = world.on_main(look)
    if found is None:
        return None
    with torch.no_grad():
        for name, tensor in frozen.items():
            tensor.copy_(world.from_main(tensors.get(name, tensor), tensor.shape, tensor.dtype))
    state = SavedState(**found["state"])
    return Resume(Path(found["path"]), state, found["steps"], found["from_eagle"], tensors)


def _read_own(
    config: TrainConfig, draft: Draft, identity: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Any] | None:
    """`Resume` as JSON, its tensors in `tensors`; None without a checkpoint."""
    path = newest_complete(config.checkpoint.output_dir)
    if path is None:
        return None
    _check_identity(path, identity, config)
    state = read_state(path)
    if read_config(path / "identity.json")["data"] != identity["data"]:
        state = replace(state, data={})
    tensors |= read_safetensors([path / "draft.safetensors", path / "optimizer.safetensors"])
    trained = {name: p.shape for name, p in draft.named_parameters() if p.requires_grad}
    wanted = [f"{kind}{name}" for name in trained for kind in ("", "exp_avg.", "exp_avg_sq.", "step.")]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} tensor(s) missing, first {missing[0]}")
    for name, shape in trained.items():
        for key in (name, *(f"{kind}.{name}" for kind in MOMENTS)):
            check_shape(key, shape, tensors[key])
    steps = {name: float(tensors[f"step.{name}"]) for name in trained}
    return {"path": str(path), "state": asdict(state), "steps": steps, "from_eagle": False}


def _check_identity(path: Path, identity: dict[str, Any], config: TrainConfig) -> None:
    """Raise CheckpointError naming what differs between the checkpoint's run and this one; log what else changed."""
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
    sections = (read_config(path / "config.json"), redact(config.model_dump(mode="json")))
    old, new = ({k: v for section in values.values() for k, v in section.items()} for values in sections)
    changed = [f"{k} {old[k]} -> {new[k]}" for k in new if k in old and old[k] != new[k]]
    if changed:
        info(f"resuming with other settings: {', '.join(changed)}")


def restore_run(
    resume: Resume, parallel: ReplicatedDraft, optimizer: DraftOptimizer, plan: BatchPlan | FollowPlan, world: World
) -> Progress:
    """Weights, optimizer, random numbers and the position in the data; every rank calls it."""
    load_tensors(resume, parallel, optimizer, world)
    state = resume.state
    if optimizer.scaler is not None:
        optimizer.scaler.load_state(state.counters)
    if not resume.from_eagle:
        _restore_rng(resume.path / "rng.safetensors", state, world)
    if state.data:
        plan.load_state_dict(state.data)
    else:
        info("the data are others than those of the checkpoint: their first epoch begins")
    begins = f": epoch {state.data['epoch']} begins" if resume.from_eagle else ""
    info(f"resumed from {resume.path}{begins}{'' if resume.steps else ', optimizer fresh'}")
    return Progress(
        step=state.step,
        data=plan.state_dict(),
        skipped_before=int(state.counters["skipped_samples"]),
        nonfinite_steps=int(state.counters["nonfinite_steps"]),
        seconds_before=state.counters["seconds"],
        last_checkpoint=None if resume.from_eagle else resume.path,
    )


def load_tensors(resume: Resume, parallel: ReplicatedDraft, optimizer: DraftOptimizer, world: World) -> None:
    """Weights and optimizer state; rank 0 has them, the others receive them over gloo."""
    states, shapes = optimizer.state_tensors(), {name: p.shape for name, p in parallel.draft.named_parameters()}
    for name, parameter in parallel.parameters.items():
        places = {name: parameter.data}
        if resume.steps:
            places |= {f"{kind}.{name}": states[name][kind] for kind in MOMENTS}
        for key, place in places.items():
            parallel.load(name, place, world.from_main(resume.tensors.get(key), shapes[name]))
    if resume.steps:
        optimizer.load_steps(resume.steps)


def _restore_rng(file: Path, state: SavedState, world: World) -> None:
    """Give every rank its RNG state back, or log that the world size changed and the seeds are new."""
    if state.world_size != world.world_size:
        info(f"resumed on {world.world_size} rank(s), saved by {state.world_size}: random numbers start anew")
        return
    read = lambda: {kind: [bytes(row.numpy()).hex() for row in rows] for kind, rows in read_safetensors([file]).items()}  # noqa: E731
    own = {
        kind: torch.frombuffer(bytearray.fromhex(rows[world.rank]), dtype=torch.uint8)
        for kind, rows in world.on_main(read).items()
    }
    expected = torch.get_rng_state().shape
    if own["cpu"].shape != expected:
        raise CheckpointError(f"{file}: a state of {len(own['cpu'])} bytes, this torch has {expected[0]}")
    torch.set_rng_state(own["cpu"])
    if world.device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], world.device)
