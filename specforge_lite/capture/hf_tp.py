"""Tensor parallelism of transformers for the hf engine: several torchrun ranks hold one target together.

A forward of a split model is a collective: all ranks of a group must run it, on the same tokens, at the same time. But
each rank asks for its own samples, when it likes, and one may run out of data before another. So one thread per rank
keeps step with the others of its group:

    rank 0   [s0 s1]            send each other what is waiting -> forward of s0 s1 s2 on both -> s0 s1 stay here
    rank 1   [s2]                                                                                s2 stays here

The group is one of its own: its collectives never mix with those of the training thread.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.types import CapturedStates, TokenizedSample

SHORTEST_IDLE_SECONDS, LONGEST_IDLE_SECONDS = 0.001, 0.02
CLOSE_SECONDS = 30.0

Job = tuple[list[TokenizedSample], "Future[list[CapturedStates]]"]
Forward = Callable[[Sequence[TokenizedSample], range], list[CapturedStates]]


def open_group(tp_size: int, device: torch.device, wait_minutes: float) -> Any:
    """The process group of this rank and its `tp_size - 1` neighbours. Every rank calls this, at the same time.

    Raises ConfigError where the torchrun ranks cannot be divided into such groups.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % tp_size:
        raise ConfigError(
            f"tp_size {tp_size}: the hf engine splits the target over the torchrun ranks, and there"
            f" {'is' if world_size == 1 else 'are'} {world_size}; start it with torchrun --nproc_per_node {tp_size}"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=wait_minutes)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
    starts = range(0, world_size, tp_size)
    groups = [dist.new_group(list(range(s, s + tp_size)), timeout=timeout, backend=backend) for s in starts]
    return groups[dist.get_rank() // tp_size]


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
                    waiting = self._exchange(job)
                    if waiting is None:
                        return
                    if not any(waiting):
                        time.sleep(idle)
                        idle = min(2 * idle, LONGEST_IDLE_SECONDS)
                        continue
                    idle = SHORTEST_IDLE_SECONDS
                    states = self._run_together(job[0] if job else [], waiting)
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

    def _exchange(self, job: Job | None) -> list[list[np.ndarray]] | None:
        """Token ids of the samples that each rank has waiting; None when all ranks are leaving."""
        mine = [sample.input_ids_L.cpu().numpy() for sample in job[0]] if job else []
        ranks: list[Any] = [None] * self._size
        dist.all_gather_object(ranks, (mine, self._leaving.is_set() and job is None), group=self._group)
        return None if all(leaving for _, leaving in ranks) else [token_ids for token_ids, _ in ranks]

    def _run_together(self, mine: list[TokenizedSample], waiting: list[list[np.ndarray]]) -> list[CapturedStates]:
        union: list[TokenizedSample] = []
        for rank, samples in enumerate(waiting):
            if rank == self._rank:
                first = len(union)
                union += mine
            else:
                ids = [torch.from_numpy(token_ids) for token_ids in samples]
                union += [TokenizedSample(f"of rank {rank}", i, torch.zeros_like(i, dtype=torch.bool)) for i in ids]
        states = self._forward(union, range(first, first + len(mine)))
        hand_over(states, self._device)
        return states

    def _fail(self, job: Job | None, error: BaseException) -> None:
        waiting = [job] if job is not None and not job[1].done() else []
        while (extra := self._next_job()) is not None:
            waiting.append(extra)
        for _, future in waiting:
            future.set_exception(error)


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


def load_part(loader: Any, model_path: str, options: dict[str, Any], group: Any) -> Any:
    """This rank's part of a model. loader: `from_pretrained` of its class."""
    from transformers.distributed import DistributedConfig

    with as_world(group):
        return loader(model_path, distributed_config=DistributedConfig(tp_size=group.size(), tp_plan="auto"), **options)
