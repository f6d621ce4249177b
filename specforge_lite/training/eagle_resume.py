"""Going on from `state_N` of EAGLE's own trainer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from specforge_lite.checkpoints.compat.eagle_state import epoch_of, read_start, state_directories
from specforge_lite.checkpoints.training_run import SavedState
from specforge_lite.core.errors import CheckpointError
from specforge_lite.data.sampler import BatchPlan
from specforge_lite.model.draft import Draft
from specforge_lite.training.settings import TrainConfig, run_length


def read_eagle(config: TrainConfig, draft: Draft, plan: BatchPlan, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """`Resume` as JSON, its tensors in `tensors`, from the newest `state_N`, written at the end of epoch N: training
    goes on with epoch N + 1, as EAGLE's own trainer does. The learning-rate schedule follows from the step; EAGLE's
    scheduler is not read. Raises CheckpointError where the run ends before that epoch."""
    states = state_directories(config.checkpoint.output_dir)
    if not states:
        return None
    epoch = epoch_of(states[0]) + 1
    step, end = plan.total_steps(epoch), run_length(config.training, plan.total_steps)
    if step >= end:
        raise CheckpointError(
            f"{states[0]}: {epoch} epochs are done ({step} steps), the run ends after {end} steps; give --num-epochs"
            f" above {epoch}, or another --output-dir to start anew"
        )
    read, steps = read_start(states[0], config.draft.draft_model_config, draft)
    tensors |= read
    counters = {"skipped_samples": 0.0, "nonfinite_steps": 0.0, "seconds": 0.0}
    data = {**plan.state_dict(), "epoch": epoch, "consumed": 0}
    state = SavedState(step, data, counters, 0)
    return {"path": str(states[0]), "state": asdict(state), "steps": steps, "from_eagle": True}
