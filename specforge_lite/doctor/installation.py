"""What this machine can run: libraries, GPU, serving engines, memory, room for hidden states, compilers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from specforge_lite.checkpoints.contract import Finding
from specforge_lite.core.devices import num_gpus
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import format_bytes
from specforge_lite.doctor import Problem
from specforge_lite.serving.environment import check_plugin, find_interpreter

REQUIRED = ("torch", "transformers", "safetensors", "tokenizers", "datasets", "pydantic")
TRACKERS = ("wandb", "tensorboard", "trackio")
TMPFS = Path("/dev/shm")
# Requests in flight (16) of 4096 tokens with four states of an 8B model in 16 bits: 16 * 4096 * 4 * 4096 * 2 bytes.
WANTED_TMPFS_BYTES = 2 << 30
WANTED_DISK_BYTES = 10 << 30


def verify_installation() -> list[Finding]:
    """Run all checks; at least one finding each. `broken`: nothing can be trained before that is mended."""
    findings = []
    for name, check in CHECKS.items():
        findings += [Finding(name, level, message) for level, message in check()]
    return findings


def check_python() -> Iterator[Problem]:
    yield "ok", f"Python {platform.python_version()} ({sys.executable})"


def check_libraries() -> Iterator[Problem]:
    missing = [name for name in REQUIRED if _version(name) is None]
    if missing:
        yield "broken", f"not installed: {', '.join(missing)}; run `pip install -r requirements.txt`"
    else:
        yield "ok", ", ".join(f"{name} {_version(name)}" for name in REQUIRED)


def check_gpu() -> Iterator[Problem]:
    try:
        count = num_gpus()
    except ConfigError as error:
        yield "broken", str(error)
        return
    if count:
        for index in range(count):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: train with --precision fp16"
            yield "ok", f"{index}: {properties.name}, {format_bytes(properties.total_memory)}, {bf16}"
    else:
        yield "warning", "none: everything runs on the CPU, fit for small models only"


def check_memory() -> Iterator[Problem]:
    import psutil

    memory = psutil.virtual_memory()
    yield "ok", f"{os.cpu_count()} cores, {format_bytes(memory.available)} of {format_bytes(memory.total)} free"


def check_engines() -> Iterator[Problem]:
    yield "ok", "hf: transformers in this process"
    for engine in ("sglang", "vllm"):
        try:
            interpreter = find_interpreter(engine, None)
            check_plugin(interpreter)
            yield "ok", f"{engine} {interpreter.version} with capture plugin {interpreter.plugin_version}"
        except ConfigError as error:
            yield "warning", str(error)
    if importlib.util.find_spec("mooncake") is None:
        yield "ok", "mooncake: not installed; only --transport mooncake, between hosts, needs it (`make mooncake`)"
    else:
        yield "ok", "mooncake: installed"


def check_tmpfs() -> Iterator[Problem]:
    """Where a server's hidden states travel through (`--transport-dir`)."""
    if not TMPFS.is_dir():
        yield "warning", f"{TMPFS} does not exist; give --transport-dir a directory in memory"
        return
    usage = shutil.disk_usage(TMPFS)
    text = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free in {TMPFS}"
    if not os.access(TMPFS, os.W_OK):
        yield "warning", f"{TMPFS} is not writable; give --transport-dir another directory in memory"
    elif usage.free < WANTED_TMPFS_BYTES:
        yield (
            "warning",
            f"{text}; 16 requests of an 8B model want {format_bytes(WANTED_TMPFS_BYTES)}: enlarge it"
            " (docker --shm-size) or lower --requests-in-flight",
        )
    else:
        yield "ok", text


def check_disk() -> Iterator[Problem]:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{format_bytes(free)} free in {Path.cwd()}"
    if free < WANTED_DISK_BYTES:
        yield "warning", f"{text}; a checkpoint of an 8B target's draft takes about 5 GB"
    else:
        yield "ok", text


def check_compilers() -> Iterator[Problem]:
    """torch.compile needs a C++ compiler on a CPU, triton on a GPU."""
    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        yield "warning", "no g++ or clang++: --compile does not work on a CPU"
    else:
        problem = _compiles(compiler)
        yield ("ok", f"{compiler}: compiles") if problem is None else ("warning", f"{compiler}: {problem}")
    if torch.cuda.is_available():
        triton = _version("triton")
        found = "warning", "triton is missing: neither --compile nor flex_attention works on the GPU"
        yield found if triton is None else ("ok", f"triton {triton}")


def check_trackers() -> Iterator[Problem]:
    found = [name for name in TRACKERS if _version(name) is not None]
    missing = [name for name in TRACKERS if name not in found]
    text = ", ".join(f"{name} {_version(name)}" for name in found) or "none installed"
    hint = f"; `pip install {missing[0]}` for --report-to {missing[0]}" if missing else ""
    yield "ok", f"{text} (metrics.jsonl is written in any case{hint})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiles(compiler: str) -> str | None:
    """Build a shared object as torch.compile does; None, or the compiler's first complaint."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "probe.cpp"
        source.write_text('#include <vector>\nextern "C" int f() { return std::vector<int>{1}[0]; }\n')
        command = [compiler, "-shared", "-fPIC", "-o", str(source.with_suffix(".so")), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0:
            return None
        return next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")


CHECKS: dict[str, Callable[[], Iterator[Problem]]] = {
    "python": check_python,
    "libraries": check_libraries,
    "GPU": check_gpu,
    "memory": check_memory,
    "engines": check_engines,
    "tmpfs": check_tmpfs,
    "disk": check_disk,
    "compilers": check_compilers,
    "trackers": check_trackers,
}
