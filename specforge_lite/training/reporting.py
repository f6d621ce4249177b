"""Everything a run tells the world: trackers, event log, heartbeat, exit summary. Silent on ranks other than 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from specforge_lite.core.log import info, warn
from specforge_lite.core.provenance import without_secrets
from specforge_lite.training.distributed import World
from specforge_lite.training.run_dir import EventLog, ExitSummary, RunDirectory
from specforge_lite.training.settings import TrainConfig
from specforge_lite.training.trackers import Tracker, open_trackers

MAX_NAMED_SAMPLES = 20


class Reporter:
    """Holds the output directory's lock from the start; trackers are opened once it is known where the run resumes.

    Raises ConfigError when another run holds the directory, or when its content and `--resume` do not go together.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self._config, self._main = config, world.is_main
        self._trackers: list[Tracker] = []
        self._directory: RunDirectory | None = None
        self._finished = False
        self._step = 0
        self._summarize: Callable[[str], ExitSummary] | None = None
        self._events = EventLog(config.logging.log_file if world.is_main else None)
        if world.is_main:
            self._directory = RunDirectory(config.checkpoint)

    @property
    def restarts(self) -> int:
        """How often this run was started before (rank 0 knows)."""
        return self._directory.restarts if self._directory is not None else 0

    def start(self, step: int, run_config: dict[str, Any]) -> None:
        """Open the trackers of a run that begins after `step`."""
        self._step = step
        if self._main:
            self._trackers = open_trackers(self._config.logging, self._config.checkpoint.output_dir, run_config, step)
        self.event("start", {"step": step})

    def watch(self, summarize: Callable[[str], ExitSummary]) -> None:
        """From now on an end by an error is told by `summarize(reason)`, with the run's counts and last checkpoint."""
        self._summarize = summarize

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Send flat metrics to every tracker and to the event log."""
        self._step = step
        for tracker in self._trackers:
            tracker.log(step, values)
        self.event("metrics", {"step": step, **values})

    def event(self, name: str, facts: dict[str, Any]) -> None:
        """One line of `--log-file`."""
        self._events.write(name, facts)

    def problem(self, name: str, step: int, message: str, sample_ids: list[str]) -> None:
        """A warning with the samples behind it; all ids go to the event log, the first ones to the terminal."""
        if not self._main:
            return
        shown = ", ".join(sample_ids[:MAX_NAMED_SAMPLES])
        more = f" and {len(sample_ids) - MAX_NAMED_SAMPLES} more" if len(sample_ids) > MAX_NAMED_SAMPLES else ""
        warn(f"{message}; samples: {shown or 'not known'}{more}")
        self.event(name, {"step": step, "message": message, "sample_ids": sample_ids})

    def beat(self, step: int, total_steps: int, state: str) -> None:
        """Sign of life (at most one a second)."""
        self._step = step
        if self._directory is not None:
            self._directory.beat(step, total_steps, state)

    def finish(self, summary: ExitSummary) -> None:
        """Show and store why the run ended."""
        self._finished = True
        if self._directory is not None:
            info(summary.line())
            summary.write(self._directory.path)
            self._directory.beat(summary.step, summary.total_steps, summary.reason, force=True)
        self.event("end", {**summary.__dict__})

    def fail(self, reason: str) -> None:
        """Store the end of a run that died before it could say more itself."""
        if self._finished:
            return
        reason = without_secrets(reason)  # the errors of hubs and trackers quote what they were given
        if self._summarize is not None:
            self.finish(self._summarize(reason))
        else:
            self.finish(ExitSummary(reason, self._step, 0, None, 0, 0, self.restarts, 0.0))

    def close(self) -> None:
        """Close trackers and give the directory back."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        self._events.close()
        if self._directory is not None:
            self._directory.close()


@contextmanager
def open_reporter(config: TrainConfig, world: World) -> Iterator[Reporter]:
    """A Reporter that also notes an end by an error or by an early signal, and is closed in any case."""
    reporter = Reporter(config, world)
    try:
        yield reporter
    except BaseException as error:
        reporter.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        reporter.close()
