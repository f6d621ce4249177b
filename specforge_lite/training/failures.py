"""How ranks learn that one of them failed, died or hangs, and name the rank at fault.

Each rank has a thread that writes a counter and the rank's place into the rendezvous store once a second and looks
for a report of another rank. The rank that reports first prints its own error before the others print anything.

    rank 1 raises       -> report, prints its traceback          others: stopped, because rank 1 failed
    rank 1 is killed    -> its counter stands still              others: rank 1 died without an error message
    rank 1 hangs        -> its counter runs, its place does not  others, after --dist-timeout: rank 1 hangs in step 12

torch's `@record` was tried in its place: it writes one rank's exception into a file that torchrun's closing traceback
quotes, but knows nothing of a killed or hanging rank, and the quote is not the last line either.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

from specforge_lite.core.errors import SpecforgeError
from specforge_lite.core.launcher import print_last

BEAT_SECONDS = 0.5
# Time that a rank has to leave on its own (through the error of its collective) before its watcher ends the process.
GRACE_SECONDS = 10.0
PEER_FAILED_EXIT_CODE = 1
# What gloo and nccl report when a peer is dead or late; they raise RuntimeError for everything.
BROKEN_COLLECTIVE_MARKS = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket closed",
    "timed out waiting", "application timeout", "remote process exited", "communicator was aborted",
)  # fmt: skip


class FailureBoard:
    """What the ranks write about themselves into the rendezvous store. Thread-safe as the store is."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = dist.PrefixStore("ranks", store)
        self._rank, self._world_size = rank, world_size
        self._where, self._step, self._beat = "starting", 0, 0
        self._closed, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure-board", daemon=True)
        self._thread.start()

    def place(self, where: str, step: int) -> None:
        """Where this rank is now; published with the next beat."""
        self._where, self._step = where, step

    def report(self, error: BaseException) -> None:
        """Show `error` of this rank, unless another rank failed before; then name that one. Later calls do nothing.

        A collective that broke because a peer went away is never shown as this rank's own error.
        """
        if self._leaving.is_set():
            return
        self._leaving.set()
        text = str(error).strip()
        line = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
        if isinstance(error, RuntimeError) and any(mark in text.lower() for mark in BROKEN_COLLECTIVE_MARKS):
            self._print(self._who_failed(line))
            return
        try:
            first = int(self._store.compare_set("first", "", str(self._rank)).decode())
        except RuntimeError:  # the store's host is dead; our own error is what we know
            first = self._rank
        if first != self._rank:
            self._print(self._describe(first))
            return
        if isinstance(error, SpecforgeError):
            print_last(f"rank {self._rank}: error: {error}")
        else:
            self._print("".join(traceback.format_exception(error)))
            print_last(f"rank {self._rank}: {line}", only_after_launcher=True)
        with contextlib.suppress(RuntimeError):
            self._store.set("error", line)

    def close(self) -> None:
        """This rank is done: stop the thread."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join(2 * BEAT_SECONDS)

    # ------------------------------------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        seen_at: float | None = None
        while not self._closed.wait(BEAT_SECONDS):
            try:
                self._beat += 1
                self._store.set(f"beat/{self._rank}", f"{self._beat}|{self._step}|{self._where}")
                failed = self._store.check(["first"])
            except RuntimeError:  # no store, no torchrun: the collective of the main thread will raise
                continue
            if failed and not self._leaving.is_set():
                seen_at = seen_at or time.monotonic()
                if time.monotonic() - seen_at > GRACE_SECONDS:  # the main thread sits in a call that will not return
                    message = "another rank failed"
                    with contextlib.suppress(RuntimeError):
                        message = self._describe(int(self._store.get("first").decode()))
                    self._print(message)
                    os._exit(PEER_FAILED_EXIT_CODE)

    def _print(self, message: str) -> None:
        print(f"rank {self._rank}: {message}", file=sys.stderr, flush=True)

    def _describe(self, rank: int) -> str:
        deadline = time.monotonic() + 5.0  # until it has shown its own error
        while not self._store.check(["error"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        error = self._store.get("error").decode() if self._store.check(["error"]) else "no message"
        return f"stopped, because rank {rank} failed: {error}"

    def _who_failed(self, line: str) -> str:
        """A collective broke. Find who reported, else whose counter stands still, else who is behind."""
        try:
            before = self._beats()
            deadline = time.monotonic() + 4 * BEAT_SECONDS
            while time.monotonic() < deadline:
                if self._store.check(["first"]):
                    return self._describe(int(self._store.get("first").decode()))
                time.sleep(0.1)
            after = self._beats()
        except RuntimeError:
            return f"stopped: lost the other ranks and the rendezvous store ({line})"
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        dead = [rank for rank in others if after[rank][0] == before[rank][0]]
        if dead:
            places = "; ".join(f"rank {rank}, last seen {after[rank][2]}" for rank in dead)
            return f"stopped, because a rank ended without an error message (killed? out of memory?): {places}"
        step = min(after[rank][1] for rank in others)
        slow = [rank for rank in others if after[rank][1] == step and not after[rank][2].startswith("waiting")]
        if slow:
            places = "; ".join(f"rank {rank} hangs {after[rank][2]}" for rank in slow)
            return f"stopped after waiting for --dist-timeout: {places}"
        return f"stopped: a collective failed ({line})"

    def _beats(self) -> list[tuple[int, int, str]]:
        """(counter, step, place) of every rank; (0, 0, "starting") for one that never wrote."""
        found = []
        for rank in range(self._world_size):
            key = f"beat/{rank}"
            text = self._store.get(key).decode() if self._store.check([key]) else "0|0|starting"
            beat, step, where = text.split("|", 2)
            found.append((int(beat), int(step), where))
        return found
