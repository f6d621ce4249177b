"""`--profile-start-step`: a chrome trace of some steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from specforge_lite.core.log import info
from specforge_lite.training.distributed import World
from specforge_lite.training.settings import TrainConfig


@contextmanager
def step_profiler(config: TrainConfig, world: World, done: int) -> Iterator[torch.profiler.profile | None]:
    """A chrome trace of the steps `--profile-start-step` .. + `--profile-num-steps`: host, device, capture threads.

    Its ranges: `capture` (a thread of the prefetcher waits for the engine), `copy to device`, `training step`.
    """
    first = config.training.profile_start_step
    assert first is not None
    skipped = first - 1 - done
    if skipped + config.training.profile_num_steps <= 0:
        yield None
        return
    path = config.checkpoint.output_dir / f"trace_rank{world.rank}.json"

    def write(profiler: torch.profiler.profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)  # on hosts other than rank 0's
        profiler.export_chrome_trace(str(path))
        info(f"trace: {path} (open in chrome://tracing or ui.perfetto.dev)")

    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    num_steps = config.training.profile_num_steps + min(0, skipped)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=max(0, skipped), warmup=0, active=num_steps, repeat=1),
        on_trace_ready=write,
        experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),  # captures have their own
    ) as profiler:
        yield profiler
