"""Tensor parallelism of transformers for the hf engine: several torchrun ranks hold one target together.

A forward of a split model is a collective: all ranks of a group must run it, on the same tokens, at the same time. But
each rank asks for its own samples, when it likes, and one may run out of data before another. So one thread per rank
keeps step with the others of its group:

    rank 0   [s0 s1]            tell each other what is waiting -> forward of s0 s1 s2 on both -> s0 s1 stay here
    rank 1   [s2]                                                                                s2 stays here

The group is one of its own: its collectives never mix with those of the training thread.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.types import CapturedStates, TokenizedSample

SHORTEST_IDLE_SECONDS, LONGEST_IDLE_SECONDS = 0.001, 0.02
CLOSE_SECONDS = 30.0

Job = tuple[list[TokenizedSample], "Future[list[CapturedStates]]"]
Forward = Callable[[Sequence[TokenizedSample], range], list[CapturedStates]]


def open_group(tp_size: int, device: torch.device, wait_minutes: float) -> Any:
    """The process group of this rank and its `tp_size - 1` neighbours. Every rank calls this, at the same time.

    Raises ConfigError where the torchrun ranks cannot be divided into such groups, or `accelerate` is missing.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % tp_size:
        raise ConfigError(
            f"tp_size {tp_size}: the hf engine splits the target over the torchrun ranks, and there"
            f" {'is' if world_size == 1 else 'are'} {world_size}; start it with torchrun --nproc_per_node {tp_size}"
        )
    if not has_accelerate():
        raise ConfigError(f"tp_size {tp_size}: transformers needs the package 'accelerate' for it; pip install it")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=wait_minutes)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
    own = None
    for start in range(0, world_size, tp_size):
        ranks = list(range(start, start + tp_size))
        group = dist.new_group(ranks, timeout=timeout, backend=backend)
        own = group if dist.get_rank() in ranks else own
    return own


def has_accelerate() -> bool:
    """True if the package transformers wants for split models is installed."""
    return importlib.util.find_spec("accelerate") is not None


@contextmanager
def as_world(group: Any) -> Iterator[None]:
    """Let `group` be the world while transformers loads a model: it splits over all of the world, and would use the
    training thread's own group for that."""
    world = dist.group.WORLD
    dist.group.WORLD = group
    try:
        yield
    finally:
        dist.group.WORLD = world


class Lockstep:
    """Runs `forward(samples of all ranks, which of them are this rank's)` on all ranks of `group` together.

    `capture` may be called from any thread, `close` ends when all ranks have called it.
    """

    def __init__(self, group: Any, device: torch.device, forward: Forward) -> None:
        self._group, self._device, self._forward = group, device, forward
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._leaving = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hf-tensor-parallel", daemon=True)
        self._thread.start()

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """States of `samples`. Raises EngineError when the ranks have lost each other."""
        future: Future[list[CapturedStates]] = Future()
        self._jobs.put((list(samples), future))
        if not self._thread.is_alive():
            raise EngineError(f"hf: tensor parallelism has ended ({self._failed or 'closed'})")
        return future.result()

    def close(self) -> None:
        """Keep step until every rank has come here."""
        self._leaving.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        job: Job | None = None
        idle = SHORTEST_IDLE_SECONDS
        try:
            with own_stream(self._device):
                while True:
                    job = self._next_job()
                    counts = self._exchange_counts(job)
                    if counts is None:
                        return
                    if not any(counts):
                        time.sleep(idle)
                        idle = min(2 * idle, LONGEST_IDLE_SECONDS)
                        continue
                    idle = SHORTEST_IDLE_SECONDS
                    states = self._run_together(job, counts)
                    if job is not None:
                        job[1].set_result(states)
        except BaseException as error:
            self._failed = error
            self._fail(job, error)

    def _next_job(self) -> Job | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            return None

    def _exchange_counts(self, job: Job | None) -> list[int] | None:
        """Samples each rank has now; None when all ranks are leaving."""
        leaving = self._leaving.is_set() and job is None
        mine = torch.tensor([len(job[0]) if job else 0, int(leaving)])
        counts = self._gather(mine)
        return None if all(int(c[1]) for c in counts) else [int(c[0]) for c in counts]

    def _run_together(self, job: Job | None, counts: list[int]) -> list[CapturedStates]:
        mine = job[0] if job else []
        lengths = self._gather(padded([len(s) for s in mine], max(counts)))
        totals = [int(rank_lengths.sum()) for rank_lengths in lengths]
        flat = torch.cat([s.input_ids_L.cpu() for s in mine]) if mine else torch.zeros(0, dtype=torch.int64)
        tokens = self._gather(torch.nn.functional.pad(flat, (0, max(totals) - len(flat))))
        union: list[TokenizedSample] = []
        for rank, count in enumerate(counts):
            if rank == self._rank:
                union += mine
                continue
            rank_lengths = lengths[rank][:count].tolist()
            for ids_L in tokens[rank][: totals[rank]].split(rank_lengths):
                union.append(TokenizedSample(f"of rank {rank}", ids_L, torch.zeros_like(ids_L, dtype=torch.bool)))
        first = sum(counts[: self._rank])
        states = self._forward(union, range(first, first + len(mine)))
        hand_over(states, self._device)
        return states

    def _gather(self, mine: Tensor) -> list[Tensor]:
        """CPU tensors of one shape from all ranks of the group."""
        parts = [torch.empty_like(mine) for _ in range(self._size)]
        dist.all_gather(parts, mine, group=self._group)
        return parts

    def _fail(self, job: Job | None, error: BaseException) -> None:
        waiting = [job] if job is not None and not job[1].done() else []
        while (extra := self._next_job()) is not None:
            waiting.append(extra)
        for _, future in waiting:
            future.set_exception(error)


def padded(numbers: list[int], length: int) -> Tensor:
    """int64 [length], zeros at the end."""
    return torch.tensor(numbers + [0] * (length - len(numbers)), dtype=torch.int64)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A CUDA stream for this thread: two communicators on one stream would wait for each other across ranks."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def hand_over(states: list[CapturedStates], device: torch.device) -> None:
    """Make tensors of this thread's stream safe to use on the default one."""
    if device.type != "cuda":
        return
    torch.cuda.current_stream(device).synchronize()
    for item in states:
        for tensor in (item.aux_LAH, item.last_LH):
            if tensor.is_cuda:  # else the allocator may reuse it while the training thread still reads
                tensor.record_stream(torch.cuda.default_stream(device))
