"""From tensors on the engine's device to a stored sample, without ever making the scheduler wait for a GPU.

On CPU the sample is stored before `submit` returns, so before the reply leaves. On CUDA the copy runs on a stream of
its own into pinned memory and a thread stores it when the copy is done; the client waits for the sample to appear.
The CUDA branch has not been run: no GPU was at hand when it was written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import VERSION
from .blob import Blob
from .sinks import KEY, SWITCH, MooncakeSink, TmpfsSink, open_sink

logger = logging.getLogger(__name__)

# Threads are started as samples pile up: one stores 1.5 GB/s and more, a fast engine captures several times that.
NUM_WRITERS = max(4, min(16, (os.cpu_count() or 4) // 4))


class CaptureWriter:
    """Stores samples of one serving process (the first tensor-parallel rank), once `open` was called.

    engine: name and version, echoed to the client. layer_ids: what the server captures, in the engine's own
    convention. last_is_normed: whether `last` has been through the model's final norm.
    """

    def __init__(self, engine: str, layer_ids: Sequence[int], last_is_normed: bool) -> None:
        self._place = os.environ[SWITCH]
        self._sink: TmpfsSink | MooncakeSink | None = None
        self._facts = {
            "engine": engine,
            "plugin": VERSION,
            "layer_ids": ",".join(str(i) for i in layer_ids),
            "last_is_normed": str(int(last_is_normed)),
        }
        self._threads = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="specforge-capture")
        self._copy_stream: Any = None

    def open(self) -> CaptureWriter:
        """Connect to the place SPECFORGE_CAPTURE names. Raises OSError or ValueError if that is impossible."""
        self._sink = open_sink()
        return self

    def reply(self, key: str) -> dict[str, str]:
        """What the client receives: enough to check that this plugin, and not a stock path, handled its request."""
        return {**self._facts, "key": key, "place": self._place}

    def submit(self, key: str, input_ids: Sequence[int], aux: Any, last: Any, ready: Any = None) -> None:
        """Store aux [L, A, H] and last [L, H]. `ready`: CUDA event after which they are complete (None: the current
        stream's work). Never raises: an exception here would end the serving process."""
        try:
            if self._sink is None:
                raise RuntimeError("capture writer was not opened")
            if not KEY.match(key):
                raise ValueError(f"capture key {key!r}: expected 32 hexadecimal digits")
            if aux.is_cuda or last.is_cuda:
                done = self._copy_async([aux, last], ready)
                self._threads.submit(self._store, key, input_ids, *done)
            elif isinstance(self._sink, MooncakeSink):
                self._threads.submit(self._store, key, input_ids, aux.clone(), last.clone(), None)
            else:
                self._store(key, input_ids, aux, last, None)
        except Exception as error:  # whatever it is, the server goes on, and the failure is reported at once
            logger.exception("specforge_capture: sample %s was not stored", key)
            self._report(key, error)

    def fail(self, key: str, reason: str) -> None:
        """Tell the client that this sample will not come."""
        logger.error("specforge_capture: %s: %s", key, reason)
        self._report(key, RuntimeError(reason))

    def _report(self, key: str, error: Exception) -> None:
        """Report the failure to the client. Never raises: a client without a report asks again."""
        if self._sink is None or not KEY.match(key):
            return
        try:
            self._sink.fail(key, error)
        except Exception:
            logger.exception("specforge_capture: cannot report the failure of %s", key)

    def _copy_async(self, tensors: list[Any], ready: Any) -> tuple[Any, Any, Any]:
        import torch

        device = next(t.device for t in tensors if t.is_cuda)
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(device)
        if ready is None:
            self._copy_stream.wait_stream(torch.cuda.current_stream(device))
        else:
            self._copy_stream.wait_event(ready)
        hosts = []
        with torch.cuda.stream(self._copy_stream):
            for tensor in tensors:
                if tensor.is_cuda:
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    host.copy_(tensor, non_blocking=True)
                    tensor.record_stream(self._copy_stream)
                else:
                    host = tensor
                hosts.append(host)
            done = torch.cuda.Event()
            done.record(self._copy_stream)
        return hosts[0], hosts[1], done

    def _store(self, key: str, input_ids: Sequence[int], aux: Any, last: Any, done: Any) -> None:
        assert self._sink is not None
        try:
            if done is not None:
                done.synchronize()
            self._sink.put(key, Blob(input_ids, aux, last, {**self._facts, "key": key}))
        except Exception as error:
            logger.exception("specforge_capture: sample %s was not stored", key)
            self._report(key, error)
