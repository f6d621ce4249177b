"""Continue a run of EAGLE: weights, vocabulary map and, where they can be told apart, AdamW's moments of `state_N`.

`state_N` is written at the end of epoch N, so training goes on with epoch N + 1, as EAGLE's own trainer does. The
learning-rate schedule follows from the step; EAGLE's scheduler and random states are not read.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from specforge_lite.checkpoints.compat.eagle_state import EagleStart, read_start, state_directories
from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.core.log import info
from specforge_lite.data.sampler import BatchPlan
from specforge_lite.model.draft import Draft
from specforge_lite.training.checkpoint import MOMENTS
from specforge_lite.training.distributed import World
from specforge_lite.training.loop import Progress
from specforge_lite.training.optimizer import DraftOptimizer
from specforge_lite.training.parallel import ParallelDraft
from specforge_lite.training.settings import TrainConfig
from specforge_lite.training.wiring import RunModels


def find_eagle_state(config: TrainConfig, models: RunModels, world: World) -> EagleStart | None:
    """Load the newest `state_N` of --output-dir into the draft; None where there is none or --no-resume says so.

    Every rank calls it; rank 0 reads. Raises CheckpointError naming the tensor that does not fit.
    """
    if not config.checkpoint.resume or config.checkpoint.overwrite:
        return None
    start, problem = EagleStart("", 0, []), ""
    tensors: dict[str, Tensor] = {}
    if world.is_main:
        states = state_directories(config.checkpoint.output_dir)
        try:
            if states:
                start, tensors = read_start(states[0], config.draft.draft_model_config, models.draft)
        except (CheckpointError, ConfigError) as error:
            problem = str(error)
    facts = {"path": start.path, "epoch": start.epoch, "names": start.names, "tensors": {}, "problem": problem}
    facts["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    facts = json.loads(world.broadcast_text(json.dumps(facts)))
    if facts["problem"]:
        raise CheckpointError(facts["problem"])
    if not facts["path"]:
        return None
    _set_tensors(models.draft, tensors, facts["tensors"], world)
    return EagleStart(facts["path"], facts["epoch"], facts["names"], start.moments)


@torch.no_grad()
def _set_tensors(draft: Draft, tensors: dict[str, Tensor], shapes: dict[str, list[int]], world: World) -> None:
    """Copy rank 0's tensors into the draft of every rank."""
    own = dict(draft.named_parameters()) | dict(draft.named_buffers())
    for name, shape in shapes.items():
        place = own[name]
        if list(place.shape) != shape:
            raise CheckpointError(f"{name}: shape {shape} in the state, {list(place.shape)} in this run's draft")
        # gloo has no bool
        kind = torch.uint8 if place.dtype == torch.bool else place.dtype
        value = tensors[name].to(kind) if name in tensors else torch.empty(shape, dtype=kind)
        place.copy_(world.broadcast_(value.contiguous()))


def resume_from_state(
    start: EagleStart, parallel: ParallelDraft, optimizer: DraftOptimizer, plan: BatchPlan, world: World
) -> Progress:
    """AdamW's moments, and the beginning of epoch N + 1."""
    states = optimizer.state_tensors()
    steps = {name: float(values["step"]) for name, values in start.moments.items()}
    steps = json.loads(world.broadcast_text(json.dumps(steps)))
    shapes = {name: parameter.shape for name, parameter in parallel.draft.named_parameters()}
    for name in start.names:
        for kind in MOMENTS:
            full = start.moments[name][kind].float() if world.is_main else torch.empty(shapes[name])
            parallel.load(name, states[name][kind], world.broadcast_(full.contiguous()))
    if start.names:
        optimizer.load_steps(steps)
    plan.load_state_dict({**plan.state_dict(), "epoch": start.epoch + 1, "consumed": 0})
    done = plan.total_steps(start.epoch + 1)
    info(f"resumed from {start.path}: epoch {start.epoch + 1} begins" + ("" if start.names else ", optimizer fresh"))
    return Progress(step=done, data=plan.state_dict())
