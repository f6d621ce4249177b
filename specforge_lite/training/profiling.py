"""A chrome trace of a few training steps: host, device, and the capture threads side by side.

Its ranges: `capture` (a thread of the prefetcher waits for the engine), `copy to device`, `training step`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from specforge_lite.core.log import info
from specforge_lite.training.distributed import World
from specforge_lite.training.settings import TrainingSection


class StepProfiler:
    """Records steps `profile_start_step` .. + `profile_num_steps` into OUTPUT_DIR/trace_rankR.json."""

    def __init__(self, config: TrainingSection, output_dir: Path, world: World) -> None:
        self._start, self._count = config.profile_start_step, config.profile_num_steps
        self._path = output_dir / f"trace_rank{world.rank}.json"
        self._cuda = world.device.type == "cuda"
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> StepProfiler:
        if self._start == 1:
            self._begin()
        return self

    def step(self, done: int) -> None:
        """Tell that `done` optimizer steps are done."""
        if self._start is None:
            return
        if self._profiler is None and self._start - 1 <= done < self._start - 1 + self._count:
            self._begin()
        elif self._profiler is not None and done >= self._start - 1 + self._count:
            self._end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._end()

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        everybody = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # captures run in their own
        self._profiler = torch.profiler.profile(activities=activities, experimental_config=everybody)
        self._profiler.__enter__()

    def _end(self) -> None:
        assert self._profiler is not None
        self._profiler.__exit__(None, None, None)
        self._path.parent.mkdir(parents=True, exist_ok=True)  # on hosts other than rank 0's
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
        self._start = None
        info(f"trace: {self._path} (open in chrome://tracing or ui.perfetto.dev)")
