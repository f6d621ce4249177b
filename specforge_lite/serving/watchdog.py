"""Runs between the trainer and a server it launched, so that the server cannot outlive the trainer.

Started as a script (standard library only): `python watchdog.py '{"command": [...], ...}'`, as the leader of a new
session. All of the server's processes stay in that session (their environment and command line are no help: both
engines overwrite them), so they can be found and ended together: when the server exits, when the trainer closes the
pipe or dies, or on SIGTERM. Linux only, like both engines.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

PR_SET_PDEATHSIG = 1
SHARED_MEMORY = "/dev/shm/"
SAMPLE_SECONDS = 2.0  # a server killed within it after its start may leave shared memory behind
TRACKER_SECONDS = 2.0


def session_processes(session: int) -> list[int]:
    """Ids of the living processes of a session, besides its leader."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != session:
            fields = _stat(int(name))
            if fields and fields[0] != "Z" and int(fields[3]) == session:
                found.append(int(name))
    return found


def start_time(pid: int) -> str | None:
    """Clock ticks between boot and the start of a living process: with its id, unique on this host."""
    fields = _stat(pid)
    return fields[19] if fields else None


def _stat(pid: int) -> list[str] | None:
    """Fields 3 and later of /proc/PID/stat (state, ppid, pgrp, session, ...), or None if the process has ended."""
    return _proc(pid, "stat").rpartition(")")[2].split() or None


def _proc(pid: int, name: str) -> str:
    """/proc/PID/NAME; empty if the process has ended."""
    try:
        with open(f"/proc/{pid}/{name}", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def shared_memory_of(pids: list[int]) -> set[str]:
    """Files below /dev/shm that these processes have mapped: killed engines leave them behind."""
    lines = [line for pid in pids for line in _proc(pid, "maps").splitlines() if SHARED_MEMORY in line]
    paths = {line.split(maxsplit=5)[-1].strip() for line in lines}
    return {path for path in paths if path.startswith(SHARED_MEMORY) and not path.endswith("(deleted)")}


def end_session(session: int, grace_s: float, shared: set[str] | None = None) -> None:
    """End all of a session but its leader: SIGTERM, SIGKILL after `grace_s`; then delete their shared memory.

    Python's resource trackers come last: left alone, they delete the semaphores of the processes they outlive.
    """
    leftovers = set(shared or ()) | shared_memory_of(session_processes(session))
    _end_processes(lambda: [pid for pid in session_processes(session) if not _is_tracker(pid)], grace_s, leftovers)
    _wait_while(lambda: bool(session_processes(session)), TRACKER_SECONDS)
    _end_processes(lambda: session_processes(session), 0.0, leftovers)
    for path in leftovers:
        if os.path.isfile(path):
            os.unlink(path)


def _end_processes(find: Callable[[], list[int]], grace_s: float, leftovers: set[str]) -> None:
    if grace_s > 0:
        _signal_all(find(), signal.SIGTERM)
        _wait_while(lambda: bool(find()), grace_s)
    for _ in range(100):
        if not (pids := find()):
            return
        leftovers |= shared_memory_of(pids)
        _signal_all(pids, signal.SIGKILL)
        time.sleep(0.05)


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_tracker(pid: int) -> bool:
    return "multiprocessing.resource_tracker" in _proc(pid, "cmdline")


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _die_with_parent() -> None:
    """In the server's process, before exec: if this watchdog is killed outright, so is the server."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Read the order, run the server, clean up; exit with the server's status (negative: the signal)."""
    order = json.loads(sys.argv[1])
    trainer = os.getppid()
    stopping: list[bool] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stopping.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; it closes the pipe when it has tidied up
    server = subprocess.Popen(order["command"], stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    shared: set[str] = set()
    next_sample = time.monotonic() + SAMPLE_SECONDS
    while server.poll() is None and not stopping and os.getppid() == trainer:
        readable, _, _ = select.select([sys.stdin], [], [], 0.2)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
        if time.monotonic() > next_sample:
            shared |= shared_memory_of(session_processes(os.getpid()))
            next_sample = time.monotonic() + SAMPLE_SECONDS
    died = server.poll() is not None
    end_session(os.getpid(), 0.0 if died else float(order["grace_s"]), shared)
    server.wait()
    if os.getppid() != trainer:  # nothing is left that would restart the server or fetch its files
        for directory in order["directories"]:
            shutil.rmtree(directory, ignore_errors=True)
    return server.returncode


if __name__ == "__main__":
    sys.exit(main() & 0xFF)
