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

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.checkpoints.draft_files import read_config, read_safetensors
from specforge_lite.checkpoints.training_run import (
    FORMAT_VERSION,
    MANIFEST,
    SavedState,
    checkpoints,
    is_complete,
    load_draft_tensors,
    newest_complete,
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
from specforge_lite.training.parallel import ParallelDraft, check_shape, frozen_tensors
from specforge_lite.training.settings import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


# ---------------------------------------------------------------------------------------------------------------- save


def save_checkpoint(
    output_dir: Path,
    state: SavedState,
    parallel: ParallelDraft,
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
    rng = _gather_rng(world)
    final = output_dir / f"step_{state.step}"
    problem = ""
    if world.is_main:
        tensors = {
            "draft.safetensors": draft_tensors,
            "optimizer.safetensors": optimizer_tensors,
            "rng.safetensors": rng,
        }
        try:
            _write_directory(final, tensors, documents | {"state.json": asdict(state)})
            _delete_oldest(output_dir, keep)
        except OSError as error:
            needed, free = sum(map(tensor_bytes, tensors.values())), shutil.disk_usage(output_dir).free
            room = f"a checkpoint takes {format_bytes(needed)}, {format_bytes(free)} are free"
            problem = f"{final}: not saved: {error.strerror or error}; {room}"
    problem = world.broadcast_text(problem)
    if problem:
        raise CheckpointError(problem)
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


# ---------------------------------------------------------------------------------------------------------------- load


def _restore_tensors(path: Path, parallel: ParallelDraft, optimizer: DraftOptimizer, world: World) -> None:
    """Load weights and optimizer state; rank 0 reads the files, the others receive them over gloo.

    The RNG state is restored only on the world size that saved it (a new rank has none); see `_restore_rng`.
    """
    problem, tensors, moments = "", {}, {}
    if world.is_main:
        try:
            tensors = read_safetensors([path / "draft.safetensors"])
            moments = read_safetensors([path / "optimizer.safetensors"])
            wanted = [f"{kind}.{name}" for name in parallel.parameters for kind in (*MOMENTS, "step")]
            missing = [name for name in [*parallel.parameters, *wanted] if name not in tensors and name not in moments]
            if missing:
                raise CheckpointError(f"{path}: {len(missing)} tensor(s) missing, first {missing[0]}")
        except CheckpointError as error:
            problem = str(error)
    problem = world.broadcast_text(problem)
    if problem:
        raise CheckpointError(problem)
    states = optimizer.state_tensors()
    steps = {name: float(moments[f"step.{name}"]) for name in states} if world.is_main else {}
    steps = json.loads(world.broadcast_text(json.dumps(steps)))
    for name, parameter in parallel.parameters.items():
        parallel.load(name, parameter.data, _share(world, tensors.get(name)))
        for kind in MOMENTS:
            parallel.load(name, states[name][kind], _share(world, moments.get(f"{kind}.{name}")))
    optimizer.load_steps(steps)


def _share(world: World, tensor: Tensor | None) -> Tensor:
    """A tensor of rank 0 on every rank (shape first, then content)."""
    if not world.distributed:
        assert tensor is not None
        return tensor
    shape = json.loads(world.broadcast_text(json.dumps(list(tensor.shape) if tensor is not None else [])))
    if tensor is None:
        tensor = torch.empty(shape, dtype=torch.float32)
    return world.broadcast_(tensor.float().contiguous())


# ----------------------------------------------------------------------------------------------------------------- rng


def _gather_rng(world: World) -> dict[str, Tensor]:
    """RNG states of all ranks: cpu [ranks, bytes], cuda [ranks, bytes] where there is a GPU."""
    states = {"cpu": torch.stack(world.gather_bytes(bytes(torch.get_rng_state().numpy())))}
    if world.device.type == "cuda":
        own = torch.cuda.get_rng_state(world.device)
        states["cuda"] = torch.stack(world.gather_bytes(bytes(own.numpy())))
    return states


def _restore_rng(path: Path, state: SavedState, world: World) -> None:
    """Give every rank its RNG state back, or log that the world size changed and the seeds are new."""
    if state.world_size != world.world_size:
        info(f"resumed on {world.world_size} rank(s), saved by {state.world_size}: random numbers start anew")
        return
    text = ""
    if world.is_main:
        saved = read_safetensors([path / "rng.safetensors"])
        text = json.dumps({kind: [bytes(row.numpy()).hex() for row in rows] for kind, rows in saved.items()})
    states = json.loads(world.broadcast_text(text))
    own = {
        kind: torch.frombuffer(bytearray.fromhex(rows[world.rank]), dtype=torch.uint8) for kind, rows in states.items()
    }
    expected = torch.get_rng_state().shape
    if own["cpu"].shape != expected:
        raise CheckpointError(
            f"{path / 'rng.safetensors'}: a state of {len(own['cpu'])} bytes, this torch has {expected[0]}"
        )
    torch.set_rng_state(own["cpu"])
    if world.device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], world.device)


# -------------------------------------------------------------------------------------------------------------- resume


def find_resume(
    config: TrainConfig, draft: Draft, identity: dict[str, Any], world: World
) -> tuple[Path, SavedState] | None:
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
                _check_identity(path, identity, config)
                state = read_state(path)
                if read_config(path / "identity.json")["data"] != identity["data"]:
                    state = replace(state, data={})
                answer = {"path": str(path), "state": asdict(state)}
        except CheckpointError as error:
            answer = {"problem": str(error)}
    answer = json.loads(world.broadcast_text(json.dumps(answer)))
    if "problem" in answer:
        raise CheckpointError(answer["problem"])
    if not answer:
        return None
    path = Path(answer["path"])
    saved = load_draft_tensors(path)[1] if world.is_main else {}
    for name, tensor in frozen_tensors(draft).items():
        value = saved.get(name, tensor).detach()
        check_shape(name, tensor.shape, value)
        with torch.no_grad():  # bool and small: gloo has no bool
            tensor.copy_(world.broadcast_(value.to(torch.uint8) if value.dtype == torch.bool else value.clone()))
    return path, SavedState(**answer["state"])


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
    path: Path, state: SavedState, parallel: ParallelDraft, optimizer: DraftOptimizer, plan: BatchPlan, world: World
) -> None:
    """Weights, optimizer, random numbers and the position in the data of a checkpoint."""
    _restore_tensors(path, parallel, optimizer, world)
    if optimizer.scaler is not None:
        optimizer.scaler.load_state(state.counters)
    _restore_rng(path, state, world)
    if state.data:
        plan.load_state_dict(state.data)
    else:
        info("the data are others than those of the checkpoint: their first epoch begins")
    info(f"resumed from {path}")
