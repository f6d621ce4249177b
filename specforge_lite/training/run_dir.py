"""The output directory of a run: one run at a time, signs of life, and signals that end it well."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from specforge_lite.checkpoints.training_run import checkpoints
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import lock_directory, remove_leftovers, write_json
from specforge_lite.core.log import info
from specforge_lite.core.provenance import wall_time
from specforge_lite.training.checkpoint import prune_checkpoints
from specforge_lite.training.settings import CheckpointSection

METRICS_FILE = "metrics.jsonl"
HEARTBEAT_FILE = "heartbeat.json"
SUMMARY_FILE = "exit_summary.json"
PROVENANCE_FILE = "provenance.json"
STARTS_FILE = "starts.json"
HEARTBEAT_SECONDS = 1.0
# A second Ctrl-C within this time is the terminal's and torchrun's copy of the first, not a person's impatience.
SAME_SIGNAL_SECONDS = 2.0


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

    def beat(self, step: int, total_steps: int, state: str, force: bool = False) -> None:
        """Refresh heartbeat.json, at most once a second."""
        now = time.monotonic()
        if force or now - self._last_beat >= HEARTBEAT_SECONDS:
            self._last_beat = now
            facts = {"step": step, "total_steps": total_steps, "state": state, "time": wall_time(), "pid": os.getpid()}
            write_json(self.path / HEARTBEAT_FILE, facts, sync=False)

    def close(self) -> None:
        """Give the lock back. The lock file stays: deleting it would let two runs lock two different files."""
        self._lock.close()


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
