"""The output directory of a run: one run at a time, signs of life, and why it ended."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

from specforge_lite.checkpoints.training_run import checkpoints
from specforge_lite.core import log
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import lock_directory, remove_leftovers, write_json
from specforge_lite.core.log import info
from specforge_lite.core.provenance import redact, without_secrets
from specforge_lite.training.checkpoint import prune_checkpoints
from specforge_lite.training.settings import CheckpointSection
from specforge_lite.training.trackers import METRICS_FILE

HEARTBEAT_FILE = "heartbeat.json"
SUMMARY_FILE = "exit_summary.json"
STARTS_FILE = "starts.json"
HEARTBEAT_SECONDS = 1.0
# A second Ctrl-C within this time is the terminal's and torchrun's copy of the first, not a person's impatience.
SAME_SIGNAL_SECONDS = 2.0


class RunDirectory:
    """`--output-dir`, held by a lock. Only rank 0 makes one. `restarts`: how often this run was started before."""

    def __init__(self, config: CheckpointSection) -> None:
        self.path = config.output_dir
        self._lock = lock_directory(self.path, "output_dir")
        self._last_beat = 0.0
        try:
            remove_leftovers(self.path, held=True)
            if config.resume and not config.overwrite:
                prune_checkpoints(self.path, config.save_total_limit)
            _settle_earlier_run(self.path, config)
            self.restarts = _count_start(self.path / STARTS_FILE)
        except BaseException:
            self.close()
            raise

    def beat(self, step: int, total_steps: int, state: str, force: bool = False) -> None:
        """Refresh heartbeat.json, at most once a second."""
        now = time.monotonic()
        if force or now - self._last_beat >= HEARTBEAT_SECONDS:
            self._last_beat = now
            facts = {"step": step, "total_steps": total_steps, "state": state, "time": _now(), "pid": os.getpid()}
            write_json(self.path / HEARTBEAT_FILE, facts, sync=False)

    def close(self) -> None:
        """Give the lock back. The lock file stays: deleting it would let two runs lock two different files."""
        self._lock.close()


def _settle_earlier_run(directory: Path, config: CheckpointSection) -> None:
    """Refuse, delete or keep what an earlier run left, as `--resume` and `--overwrite` say."""
    earlier = checkpoints(directory)
    traces = [*earlier, *(p for p in [directory / METRICS_FILE] if p.exists())]
    if config.overwrite:
        if traces:
            info(f"--overwrite: deleting {len(earlier)} checkpoint(s) and the metrics of {directory}")
        for path in earlier:
            shutil.rmtree(path)
        for name in (METRICS_FILE, SUMMARY_FILE, HEARTBEAT_FILE, STARTS_FILE, "wandb_run_id"):
            (directory / name).unlink(missing_ok=True)
    elif not config.resume and traces:
        raise ConfigError(
            f"output_dir {directory}: holds {traces[0].name} of an earlier run and --resume is off;"
            " --overwrite deletes that run, --resume continues it, or choose another --output-dir"
        )


def _count_start(path: Path) -> int:
    before = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else 0
    write_json(path, {"starts": before + 1})
    return int(before)


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


# ------------------------------------------------------------------------------------------------------------- summary


@dataclass
class ExitSummary:
    """Why a run ended and what it leaves. `reason`: finished, stopped by SIGTERM / SIGINT, or an error's line."""

    reason: str
    step: int
    total_steps: int
    last_checkpoint: str | None
    skipped_samples: int
    nonfinite_steps: int
    restarts: int
    seconds: float

    def line(self) -> str:
        """For people."""
        return (
            f"ended: {self.reason} at step {self.step}/{self.total_steps} | last checkpoint"
            f" {self.last_checkpoint or 'none'} | skipped samples {self.skipped_samples} | non-finite steps"
            f" {self.nonfinite_steps} | restarts {self.restarts}"
        )

    def write(self, directory: Path) -> None:
        """exit_summary.json."""
        write_json(directory / SUMMARY_FILE, {**self.__dict__, "reason": without_secrets(self.reason), "time": _now()})


# -------------------------------------------------------------------------------------------------------------- events


class EventLog:
    """`--log-file`: every event of the run, and every line shown, as one JSON line {"time", "event", ...}."""

    def __init__(self, path: Path | None) -> None:
        self._stream: IO[str] | None = None
        self._lock = threading.Lock()  # engines warn from threads of their own
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)
                log.sinks.append(self._shown)
            except OSError as error:
                raise ConfigError(f"log_file {path}: {error.strerror or error}") from None

    def write(self, event: str, facts: dict[str, Any]) -> None:
        """Append one line, without anything that looks like a secret."""
        with self._lock:
            if self._stream is not None:
                self._stream.write(json.dumps({"time": _now(), "event": event, **redact(facts)}) + "\n")
                self._stream.flush()

    def _shown(self, kind: str, message: str) -> None:
        self.write(kind, {"message": message})

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._stream is not None:
            log.sinks.remove(self._shown)
            self._stream.close()
            self._stream = None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
