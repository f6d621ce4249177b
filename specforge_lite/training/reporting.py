"""What a run reports, on rank 0: metrics to trackers, events to a log file, signs of life, why it ended; the output
directory that holds it, one run at a time; and the signals that end a run well.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from specforge_lite.checkpoints.training_run import checkpoints
from specforge_lite.core import log
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import lock_directory, remove_leftovers, write_atomically, write_json
from specforge_lite.core.log import info, warn
from specforge_lite.core.provenance import collect_provenance, redact, wall_time, without_secrets
from specforge_lite.training.checkpoint import prune_checkpoints
from specforge_lite.training.distributed import World
from specforge_lite.training.metrics import of_end
from specforge_lite.training.settings import CheckpointSection, LoggingSection, TrainConfig

MAX_NAMED_SAMPLES = 20
METRICS_FILE = "metrics.jsonl"
HEARTBEAT_FILE = "heartbeat.json"
SUMMARY_FILE = "exit_summary.json"
PROVENANCE_FILE = "provenance.json"
STARTS_FILE = "starts.json"
HEARTBEAT_SECONDS = 1.0
# A second Ctrl-C within this time is the terminal's and torchrun's copy of the first, not a person's impatience.
SAME_SIGNAL_SECONDS = 2.0


class JsonLines:
    """A file that grows by one JSON object per line; a line is with the operating system when `write` returns.
    Engines warn from threads of their own."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream, self._lock = open(path, "a", encoding="utf-8"), threading.Lock()  # noqa: SIM115  (see close)

    def write(self, values: dict[str, Any]) -> None:
        with self._lock:
            if not self._stream.closed:
                self._stream.write(json.dumps(values) + "\n")
                self._stream.flush()

    def close(self) -> None:
        with self._lock:
            self._stream.close()


# ------------------------------------------------------------------------------------------------------------ trackers


@dataclass(frozen=True)
class Tracker:
    """Where the metrics of a step go: `log(step, metrics)`, flat ones with lists."""

    log: Callable[[int, dict[str, Any]], Any]
    close: Callable[[], Any]


def _open_metrics_file(path: Path, resume_step: int) -> Tracker:
    """OUTPUT_DIR/metrics.jsonl, `step` first. Lines after `resume_step` (steps that are trained again) are dropped."""
    if path.exists():
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            with suppress(ValueError, KeyError, TypeError):  # half a line of a killed run
                if line.endswith(b"\n") and json.loads(line)["step"] <= resume_step:
                    kept.append(line)
        write_atomically(path, b"".join(kept))
    file = JsonLines(path)
    return Tracker(lambda step, metrics: file.write({"step": step, **metrics}), file.close)


def open_trackers(
    config: LoggingSection, output_dir: Path, run_config: dict[str, Any], resume_step: int
) -> list[Tracker]:
    """The JSON-lines file and every tracker of `--report-to`. ConfigError for a package that cannot be loaded."""
    trackers = [_open_metrics_file(output_dir / METRICS_FILE, resume_step)]
    for name in config.trackers:
        from specforge_lite.training.trackers import open_tracker

        trackers.append(open_tracker(name, config, output_dir, run_config))
    return trackers


# -------------------------------------------------------------------------------------------------------- the directory


class RunDirectory:
    """`--output-dir`, held by a lock. Only rank 0 makes one. `restarts`: how often this run was started before.

    Raises ConfigError when another run holds it, or when its content and `--resume` do not go together.
    """

    def __init__(self, config: CheckpointSection) -> None:
        self.path = config.output_dir
        self._lock = lock_directory(self.path, "output_dir")
        self._last_beat = 0.0
        try:
            remove_leftovers(self.path, held=True)
            if config.resume and not config.overwrite:
                prune_checkpoints(self.path, config.save_total_limit)
            self._settle_earlier_run(config)
            starts = self.path / STARTS_FILE
            self.restarts = int(json.loads(starts.read_text(encoding="utf-8"))["starts"]) if starts.exists() else 0
            write_json(starts, {"starts": self.restarts + 1})
        except BaseException:
            self.close()
            raise

    def _settle_earlier_run(self, config: CheckpointSection) -> None:
        """Refuse, delete or keep what an earlier run left, as `--resume` and `--overwrite` ask."""
        earlier = checkpoints(self.path)
        traces = [*earlier, *(p for p in [self.path / METRICS_FILE] if p.exists())]
        if config.overwrite:
            if traces:
                info(f"--overwrite: deleting {len(earlier)} checkpoint(s) and the metrics of {self.path}")
            for path in earlier:
                shutil.rmtree(path)
            for name in (METRICS_FILE, SUMMARY_FILE, HEARTBEAT_FILE, PROVENANCE_FILE, STARTS_FILE, "wandb_run_id"):
                (self.path / name).unlink(missing_ok=True)
        elif not config.resume and traces:
            raise ConfigError(
                f"output_dir {self.path}: holds {traces[0].name} of an earlier run and --resume is off;"
                " --overwrite deletes that run, --resume continues it, or choose another --output-dir"
            )

    def beat(self, step: int, total_steps: int | None, state: str, force: bool = False) -> None:
        """Refresh heartbeat.json, at most once a second."""
        now = time.monotonic()
        if force or now - self._last_beat >= HEARTBEAT_SECONDS:
            self._last_beat = now
            facts = {"step": step, "total_steps": total_steps, "state": state, "time": wall_time(), "pid": os.getpid()}
            write_json(self.path / HEARTBEAT_FILE, facts, sync=False)

    def close(self) -> None:
        """Give the lock back. The lock file stays: deleting it would let two runs lock two different files."""
        self._lock.close()


# --------------------------------------------------------------------------------------------------- events and the end


@dataclass
class ExitSummary:
    """Why a run ended and what it leaves. `reason`: finished, stopped by SIGTERM / SIGINT, or an error's line."""

    reason: str
    step: int
    total_steps: int | None = 0
    last_checkpoint: str | None = None
    skipped_samples: int = 0
    nonfinite_steps: int = 0
    restarts: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """For people; of an error its kind only, since its text is printed as the error line."""
        return (
            f"ended: {self.reason.split(': ')[0]} at step {of_end(self.step, self.total_steps)} | last checkpoint"
            f" {self.last_checkpoint or 'none'} | skipped samples {self.skipped_samples} | non-finite steps"
            f" {self.nonfinite_steps} | restarts {self.restarts}"
        )


class Reporter:
    """Holds the output directory from the start; trackers are opened once it is known where the run resumes.

    summarize: makes the summary of an end by an error, with counts and the last checkpoint; set by the loop.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self._config = config
        self._trackers: list[Tracker] = []
        self._finished, self._step = False, 0
        self.summarize: Callable[[str], ExitSummary] | None = None
        path = config.logging.log_file if world.is_main else None
        try:
            self._events = JsonLines(path) if path is not None else None
        except OSError as error:
            raise ConfigError(f"log_file {path}: {error.strerror or error}") from None
        self._directory = RunDirectory(config.checkpoint) if world.is_main else None
        log.sinks.append(self._shown)
        self.restarts = self._directory.restarts if self._directory is not None else 0

    def start(self, step: int) -> None:
        """Open the trackers of a run that begins after `step`, and write provenance.json."""
        self._step = step
        if self._directory is not None:
            values = redact(self._config.model_dump(mode="json"))
            write_json(self._directory.path / PROVENANCE_FILE, collect_provenance(values))
            self._trackers = open_trackers(self._config.logging, self._directory.path, values, step)
        self.event("start", {"step": step})

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Send flat metrics to every tracker and to the event log."""
        self._step = step
        for tracker in self._trackers:
            tracker.log(step, values)
        self.event("metrics", {"step": step, **values})

    def event(self, name: str, facts: dict[str, Any]) -> None:
        """One line {"time", "event", ...} of `--log-file`, without anything that looks like a secret."""
        if self._events is not None:
            self._events.write({"time": wall_time(), "event": name, **redact(facts)})

    def _shown(self, kind: str, message: str) -> None:
        self.event(kind, {"message": message})

    def problem(self, name: str, step: int, message: str, sample_ids: list[str]) -> None:
        """A warning with the samples behind it; all ids go to the event log, the first ones to the terminal."""
        if self._directory is not None:
            shown = ", ".join(sample_ids[:MAX_NAMED_SAMPLES])
            more = f" and {len(sample_ids) - MAX_NAMED_SAMPLES} more" if len(sample_ids) > MAX_NAMED_SAMPLES else ""
            warn(f"{message}; samples: {shown or 'not known'}{more}")
            self.event(name, {"step": step, "message": message, "sample_ids": sample_ids})

    def beat(self, step: int, total_steps: int | None, state: str) -> None:
        """Sign of life (at most one a second)."""
        self._step = step
        if self._directory is not None:
            self._directory.beat(step, total_steps, state)

    def finish(self, summary: ExitSummary) -> None:
        """Show and store why the run ended. One that ended before its first step has nothing to sum up."""
        self._finished = True
        if self._directory is not None:
            if self.summarize is not None:
                info(summary.line())
            write_json(self._directory.path / SUMMARY_FILE, {**asdict(summary), "time": wall_time()})
            self._directory.beat(summary.step, summary.total_steps, summary.reason, force=True)
        self.event("end", asdict(summary))

    def close(self) -> None:
        """Close trackers and give the directory back."""
        for tracker in self._trackers:
            tracker.close()
        log.sinks.remove(self._shown)
        if self._events is not None:
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
        if not reporter._finished:  # errors of hubs and trackers quote what they were given
            reason = without_secrets(f"{type(error).__name__}: {error}")
            empty = ExitSummary(reason, reporter._step, restarts=reporter.restarts)
            reporter.finish(reporter.summarize(reason) if reporter.summarize is not None else empty)
        raise
    finally:
        reporter.close()


# ------------------------------------------------------------------------------------------------------------- signals


class StopRequest:
    """SIGTERM or Ctrl-C as a flag that the loop reads between steps; `exit_code` is 143 or 130 then.

    Before `in_loop` is set (nothing is trained yet) the first signal ends the process at once, engines are closed.
    A second Ctrl-C, after two seconds, ends it too, without saving.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.in_loop = False
        self._at = 0.0

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        return 128 + self.signum if self.signum is not None else 0

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name if self.signum is not None else ""

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        now = time.monotonic()
        again = self.signum is not None and signum == signal.SIGINT and now - self._at > SAME_SIGNAL_SECONDS
        if self.signum is None:
            self.signum, self._at = signum, now
            if self.in_loop:
                info(f"{signal.Signals(signum).name}: finishing this step, then saving (Ctrl-C again: do not save)")
        if again or not self.in_loop:
            sys.exit(128 + signum)


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Install the handlers of `StopRequest`, and a stack dump of all threads on SIGUSR1."""
    request = StopRequest()
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or 2, all_threads=True, chain=False)
    before = {number: signal.signal(number, request.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
