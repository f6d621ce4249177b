"""SGLang: one hook around the function that turns a finished prefill into replies (sglang 0.5.23).

A request opts in with `return_hidden_states: true` and `sampling_params.custom_params: {"specforge_capture": KEY}`;
its reply then carries `meta_info.hidden_states = [{"specforge_capture": {...}}]` instead of lists of floats. The
server runs with --enable-return-aux-hidden-states, --disable-radix-cache and --chunked-prefill-size -1: a cached
prefix or a chunk leaves rows out, and such a request is refused here rather than stored in part.
"""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Callable
from typing import Any

from .sinks import SWITCH
from .writer import CaptureWriter

logger = logging.getLogger(__name__)

HOOKED = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor.process_batch_result_prefill"
)
_writer: CaptureWriter | None = None


def register() -> None:
    """Entry point of group `sglang.srt.plugins`; called in every process of the server."""
    if not os.environ.get(SWITCH):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    pkgutil.resolve_name(HOOKED)  # raises where this version of sglang has moved it
    HookRegistry.register(HOOKED, _around_prefill, HookType.AROUND)


def _around_prefill(original: Callable[..., Any], self: Any, batch: Any, result: Any) -> Any:
    output = getattr(result, "logits_output", None)
    if output is not None and output.hidden_states is not None and any(_key(req) for req in batch.reqs):
        try:
            _capture(self.model_worker, batch, result, output)
        except Exception as error:  # raised on, it would end the scheduler and with it every other request
            logger.exception("specforge_capture: batch was not captured")
            _refuse(batch, f"{type(error).__name__}: {error}")
        output.hidden_states = None  # the stock code then has nothing to turn into lists of floats
    return original(self, batch, result)


def _capture(model_worker: Any, batch: Any, result: Any, output: Any) -> None:
    last, lengths = output.last_hidden_states, result.extend_input_len_per_req
    if last is None or lengths is None:
        return _refuse(batch, "start the server with --enable-return-aux-hidden-states")
    aux = output.hidden_states
    if not aux.shape[0] == last.shape[0] == sum(lengths):
        return _refuse(batch, f"{aux.shape[0]} aux rows, {last.shape[0]} last rows, {sum(lengths)} tokens")
    from sglang.srt.runtime_context import get_parallel

    writing = get_parallel().attn_tp_rank == 0
    start = 0
    for req, length in zip(batch.reqs, lengths):
        rows = slice(start, start + length)
        start += length
        key = _key(req)
        if key is None or req.finished() or req.is_retracted or not writing:
            continue
        tokens = len(req.origin_input_ids)
        if length != tokens or req.inflight_middle_chunks > 0:
            reason = f"{length} of {tokens} tokens were run: the server caches prefixes or chunks prefills"
            req.hidden_states.append({"specforge_capture": {"error": reason}})
            continue
        writer = _get_writer(model_worker)
        aux_LAH = aux[rows].unflatten(1, (-1, last.shape[1]))
        # With overlap scheduling the stock code waits for `copy_done` before it replies, so it is free to wait for.
        ready = result.copy_done if aux.is_cuda or last.is_cuda else None
        writer.submit(key, list(req.origin_input_ids), aux_LAH, last[rows], ready)
        req.hidden_states.append({"specforge_capture": writer.reply(key)})
    return None


def _refuse(batch: Any, reason: str) -> None:
    for req in batch.reqs:
        if _key(req) is not None:
            req.hidden_states.append({"specforge_capture": {"error": reason}})


def _key(req: Any) -> str | None:
    params = getattr(req.sampling_params, "custom_params", None)
    key = params.get("specforge_capture") if isinstance(params, dict) else None
    return key if isinstance(key, str) else None


def _get_writer(model_worker: Any) -> CaptureWriter:
    global _writer
    if _writer is None:
        import sglang

        layer_ids = _captured_layer_ids(model_worker.model_runner.model)
        _writer = CaptureWriter(f"sglang {sglang.__version__}", layer_ids, last_is_normed=True).open()
    return _writer


def _captured_layer_ids(model: Any) -> list[int]:
    """Layers whose OUTPUT the model captures, from its own record, which names the layers before which it captures.

    The flag would not do: DeepSeek-V3 and GLM-4-MoE-Lite take its ids as layer inputs unless the first one is 1.
    """
    for module in model.modules():
        before = getattr(module, "layers_to_capture", None)
        if before:
            return sorted(i - 1 for i in before)
    raise RuntimeError(f"{type(model).__name__} keeps no record of the layers it captures")
