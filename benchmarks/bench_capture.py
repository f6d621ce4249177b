"""Capture rate of the engines: hidden states per second out of transformers, SGLang and vLLM, same samples, same host.

    python benchmarks/bench_capture.py                                     # hf and the engines installed here
    python benchmarks/bench_capture.py --transport-only                    # GB/s of the way from server to trainer
    python benchmarks/bench_capture.py --engines hf vllm --target-model-path MODEL --tp-size 2 --dtype bfloat16

Each engine is asked through the prefetcher, as training does, with `--requests-in-flight` samples on their way; hf
gets as many in one call. Servers run side by side and idle while another engine is measured; rounds alternate, so
that a machine whose speed drifts cannot favour one. Figures are medians over rounds.

The transport is measured in this process, without a model: the plugin lays a sample out, checksums and writes it; the
trainer maps it and checks it. GB per second of processor time, so per core, beside a plain copy of the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field

from specforge_lite.capture.base import TargetEngine
from specforge_lite.capture.prefetch import Prefetcher
from specforge_lite.capture.transport import TmpfsTransport
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info, run_script
from specforge_lite.core.sections import TargetSection
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.serving.environment import PLUGIN_DIR, installed_engine_python
from specforge_lite.serving.registry import open_engine
from specforge_lite.types import TokenizedSample

ROOT = Path(__file__).resolve().parent.parent
TRANSPORT_SAMPLES_ALIVE = 8


class CaptureBenchConfig(Section):
    """Which engines, which samples."""

    engines: tuple[str, ...] = Field((), description="hf, sglang, vllm; default: hf and what is installed")
    target_model_path: str = str(ROOT / "specforge_lite" / "assets" / "tiny_target")
    dtype: str = Field("auto", description="dtype of the target")
    tp_size: int = Field(1, ge=1, description="tensor-parallel size of the servers")
    requests_in_flight: int = Field(16, ge=1)
    num_samples: int = Field(128, ge=1)
    shortest: int = Field(64, ge=1, description="tokens of the shortest sample")
    longest: int = Field(512, ge=1, description="tokens of the longest sample")
    num_rounds: int = Field(5, ge=1)
    transport_only: bool = Field(False, description="measure the transport, no engine")
    hidden_size: int = Field(4096, ge=1, description="of the transport's samples (bfloat16, 3 aux layers)")
    transport_tokens: int = Field(1024, ge=1, description="tokens of each of the transport's samples")
    transport_dir: Path = Field(Path("/dev/shm"), description="where the transport's samples travel through")
    output: Path | None = Field(None, description="append one JSON line per engine")


def make_samples(config: CaptureBenchConfig, vocab_size: int) -> list[TokenizedSample]:
    """Random ids, lengths uniform between the two bounds, always the same."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(config.shortest, config.longest + 1, (config.num_samples,), generator=generator)
    return [
        TokenizedSample(
            str(i), torch.randint(0, vocab_size, (length,), generator=generator), torch.ones(length, dtype=torch.bool)
        )
        for i, length in enumerate(lengths.tolist())
    ]


def measure(engine: TargetEngine, samples: list[TokenizedSample], in_flight: int) -> float:
    """Tokens per second of one pass over the samples."""
    size = in_flight if engine.max_concurrency == 1 else 1
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    start = time.perf_counter()
    with Prefetcher(engine, iter(batches), depth=in_flight // size) as stream:
        num_tokens = sum(len(sample) for captured, _ in stream for sample in captured)
    return num_tokens / (time.perf_counter() - start)


def open_engines(config: CaptureBenchConfig, stack: ExitStack) -> dict[str, TargetEngine]:
    """The engines by name, closed when `stack` is."""
    installed = [name for name in ("sglang", "vllm") if installed_engine_python(name) is not None]
    opened: dict[str, TargetEngine] = {}
    for name in config.engines or ("hf", *installed):
        if name not in ("hf", "sglang", "vllm"):
            raise ConfigError(f"engines: unknown engine '{name}'; known: hf, sglang, vllm")
        target = TargetSection.model_validate(
            {
                "target_model_path": config.target_model_path,
                "target_backend": name,
                "target_dtype": config.dtype,
                "tp_size": config.tp_size if name != "hf" else 1,
                "requests_in_flight": config.requests_in_flight,
            }
        )
        opened[name] = stack.enter_context(closing(open_engine(target, max_length=config.longest)))
    return opened


def measure_transport(config: CaptureBenchConfig) -> dict[str, float]:
    """GB per second of processor time: storing a sample, taking it, and copying as many bytes. As in a run, a few
    samples are alive at a time. The first rounds, which touch new memory, are not counted."""
    sys.path.insert(0, str(PLUGIN_DIR))
    from specforge_capture.blob import Blob
    from specforge_capture.sinks import TmpfsSink

    aux = torch.randn(config.transport_tokens, 3, config.hidden_size).bfloat16()
    last = torch.randn(config.transport_tokens, config.hidden_size).bfloat16()
    token_ids = range(config.transport_tokens)
    num_bytes = aux.nbytes + last.nbytes
    copies = [torch.empty_like(aux) for _ in range(TRANSPORT_SAMPLES_ALIVE)]
    alive: deque[Any] = deque(maxlen=TRANSPORT_SAMPLES_ALIVE)
    rates: dict[str, list[float]] = {"store": [], "take": [], "memcpy": []}
    place = tempfile.TemporaryDirectory(dir=config.transport_dir, prefix="bench-capture-")
    with place as directory, closing(asyncio.new_event_loop()) as loop:
        sink, transport = TmpfsSink(directory), TmpfsTransport(directory)
        for number in range(8 * config.num_rounds + 2 * TRANSPORT_SAMPLES_ALIVE):
            key = f"{number:032x}"
            times = [time.process_time()]
            sink.put(key, Blob(token_ids, aux, last, {"key": key, "layer_ids": "1,15,28", "last_is_normed": "1"}))
            times.append(time.process_time())
            alive.append(loop.run_until_complete(transport.take(key, 5.0)))
            times.append(time.process_time())
            copies[number % TRANSPORT_SAMPLES_ALIVE].copy_(aux)
            times.append(time.process_time())
            if number >= 2 * TRANSPORT_SAMPLES_ALIVE:
                for name, size, seconds in zip(rates, (num_bytes, num_bytes, aux.nbytes), _differences(times)):
                    rates[name].append(size / seconds / 1e9)
        alive.clear()
        sink.delete_free_slots()
    return {name: round(median(values), 2) for name, values in rates.items()}


def _differences(times: list[float]) -> list[float]:
    return [max(after - before, 1e-9) for before, after in pairwise(times)]


def main() -> None:
    config = parse_config(CaptureBenchConfig, description=__doc__ or "")
    transport = measure_transport(config)
    info(
        f"transport, width {config.hidden_size}: store {transport['store']} GB/s a core, take {transport['take']},"
        f" memcpy {transport['memcpy']}"
    )
    if config.transport_only:
        return
    with ExitStack() as stack:
        engines = open_engines(config, stack)
        samples = make_samples(config, next(iter(engines.values())).info.vocab_size)
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for engine in engines.values():
            measure(engine, samples[: config.requests_in_flight], config.requests_in_flight)  # warm-up
        for number in range(config.num_rounds):
            for name, engine in engines.items():
                rates[name].append(measure(engine, samples, config.requests_in_flight))
            info(f"round {number + 1}: " + ", ".join(f"{name} {rate[-1]:.0f} tok/s" for name, rate in rates.items()))
    hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} torch threads"
    info(f"\n{config.num_samples} samples of {config.shortest} to {config.longest} tokens on {hardware}")
    for name, rate in rates.items():
        result = {"engine": name, "tokens_per_second": round(median(rate), 1), "rounds": [round(r, 1) for r in rate]}
        if "hf" in rates:
            result["relative_to_hf"] = round(median(r / h for r, h in zip(rate, rates["hf"])), 3)
        settings = {key: getattr(config, key) for key in ("dtype", "tp_size", "requests_in_flight", "num_samples")}
        line = json.dumps({**result, **settings, "hardware": hardware})
        info(line)
        if config.output is not None:
            with config.output.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    run_script(main)
