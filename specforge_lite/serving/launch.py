"""From a config section to a RemoteEngine: launch a server or attach to running ones.

Under torchrun the first rank of each host launches one for its host; the others attach to it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from specforge_lite.capture.base import TargetInfo
from specforge_lite.capture.context import EngineContext, read_target_info
from specforge_lite.capture.transport import check_space, mooncake_address
from specforge_lite.core.errors import ConfigError, SpecforgeError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.environment import check_plugin, find_interpreter, has_gpu
from specforge_lite.serving.process import LaunchedServer, RunDirectory, ServerSpec, collect_leftovers, free_port
from specforge_lite.serving.remote import Dialect, RemoteEngine

# Tokens a server keeps back beside the prompt: SGLang 6 (tokenizer_manager), vLLM 1 new token and 1 draft token.
CONTEXT_MARGIN = 8
LARGEST_DTYPE_BYTES = 4


@dataclass(frozen=True)
class Launch:
    """Everything a dialect needs to build a command line. `layer_ids` in our convention (layer outputs)."""

    python: str
    target: TargetSection
    info: TargetInfo
    context_length: int
    num_ranks: int
    host: str
    port: int
    gpu: bool


@dataclass(frozen=True)
class Launcher:
    """How one engine is started for capture."""

    dialect: Dialect
    command: Callable[[Launch], list[str]]
    env: Callable[[Launch], dict[str, str]]


def open_remote(launcher: Launcher, target: TargetSection, context: EngineContext) -> RemoteEngine:
    """Return a probed engine. Raises ConfigError, EngineError or CaptureError; nothing is left running then."""
    wanted = limit_length(read_target_info(target, launcher.dialect.name), context.max_length)
    engine = (
        _attach(launcher, target, context, wanted) if target.target_url else _launch(launcher, target, context, wanted)
    )
    try:
        engine.probe()
    except BaseException:
        engine.close()
        raise
    return engine


def limit_length(info: TargetInfo, max_length: int) -> TargetInfo:
    """`info` with a length limit of at most `max_length`: a server need not reserve memory for more."""
    return replace(info, max_length=min(info.max_length, max_length))


def _attach(launcher: Launcher, target: TargetSection, context: EngineContext, wanted: TargetInfo) -> RemoteEngine:
    for flag in ("engine_python", "engine_arg", "engine_devices", "mem_frac"):
        if getattr(target, flag):
            raise ConfigError(f"--{flag.replace('_', '-')}: the server at --target-url is not ours to configure")
    # A server of somebody else names its directory itself; its store must be the one we know.
    place = f"mooncake:{mooncake_address(target.mooncake_address)}" if target.handoff == "mooncake" else "tmpfs:"
    urls = [_full_url(url) for url in target.target_url]
    first = int(os.environ.get("RANK", "0")) % len(urls)
    return RemoteEngine(
        launcher.dialect,
        wanted,
        urls[first:] + urls[:first],
        place,
        target.requests_in_flight,
        context.wait_minutes,
    )


def _launch(launcher: Launcher, target: TargetSection, context: EngineContext, wanted: TargetInfo) -> RemoteEngine:
    """Launch on the first rank of each host and tell the host's other ranks where, or why not."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        started: tuple[LaunchedServer, RunDirectory] | SpecforgeError | None = None
    else:
        try:
            started = start_server(launcher, target, context, wanted)
        except SpecforgeError as error:
            started = error
    message: tuple[str, str, str] | None = None
    if isinstance(started, SpecforgeError):
        message = ("error", type(started).__name__, str(started))
    elif started is not None:
        message = ("ready", started[0].spec.url, started[0].spec.env["SPECFORGE_CAPTURE"])
    try:
        kind, url, place = _share_with_host(message)
    except BaseException:
        if isinstance(started, tuple):
            started[0].stop()
            started[1].close()
        raise
    if kind == "error":
        raise (
            started if isinstance(started, SpecforgeError) else SpecforgeError(f"{url} on rank 0 of this host: {place}")
        )
    server, run_dir = started if isinstance(started, tuple) else (None, None)
    return RemoteEngine(
        launcher.dialect,
        wanted,
        [url],
        place,
        target.requests_in_flight,
        context.wait_minutes,
        server,
        run_dir,
    )


def _share_with_host(message: tuple[str, str, str] | None) -> tuple[str, str, str]:
    """Give every rank the message of the first rank of its own host; with one failed launch, all fail."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        if message is None:
            raise ConfigError("LOCAL_RANK is not 0 but torch.distributed is not initialized; open the engine after it")
        return message
    host = int(os.environ.get("GROUP_RANK", "0"))
    everyone: list[tuple[int, tuple[str, str, str] | None]] = [(0, None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (host, message))
    failed = [found for _, found in everyone if found is not None and found[0] == "error"]
    mine = [found for where, found in everyone if where == host and found is not None]
    return failed[0] if failed else mine[0]


def start_server(
    launcher: Launcher,
    target: TargetSection,
    context: EngineContext,
    wanted: TargetInfo,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> tuple[LaunchedServer, RunDirectory]:
    """Start a capture server of this process and wait until it is healthy; the run directory is the server's.

    Raises ConfigError or EngineError, and leaves nothing behind then.
    """
    name = launcher.dialect.name
    interpreter = find_interpreter(name, target.engine_python)
    check_plugin(interpreter)
    collect_leftovers(target.handoff_dir)
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if target.handoff == "mooncake":
        handoff = f"mooncake:{mooncake_address(target.mooncake_address)}"
    else:
        row = (len(wanted.aux_layer_ids) + 1) * wanted.hidden_size * LARGEST_DTYPE_BYTES
        check_space(target.handoff_dir, num_ranks * target.requests_in_flight * wanted.max_length * row)
        handoff = ""
    run_dir = RunDirectory(target.handoff_dir)
    try:
        launch = Launch(
            python=interpreter.python,
            target=target,
            info=wanted,
            context_length=wanted.max_length + CONTEXT_MARGIN,
            num_ranks=num_ranks,
            host=host,
            port=port or free_port(),
            gpu=has_gpu(target.engine_devices),
        )
        env = launcher.env(launch) | {"SPECFORGE_CAPTURE": handoff or f"tmpfs:{run_dir.path}"}
        if target.engine_devices is not None and launch.gpu:
            env["CUDA_VISIBLE_DEVICES"] = target.engine_devices
        log_dir = context.log_dir or Path(tempfile.mkdtemp(prefix=f"specforge-{name}-"))
        group = os.environ.get("GROUP_RANK", "0")
        spec = ServerSpec(
            name=f"{name} {interpreter.version} (tp {target.tp_size}, {'gpu' if launch.gpu else 'cpu'})",
            command=launcher.command(launch) + engine_arg_words(target.engine_arg),
            env=env,
            url=f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{launch.port}",
            health_path=launcher.dialect.health_path,
            log_path=log_dir / (f"{name}-server.log" if group == "0" else f"{name}-server-{group}.log"),
            run_dir=run_dir.path,
            startup_seconds=60 * context.wait_minutes,
        )
        server = LaunchedServer(spec)
        server.start()
    except BaseException:
        run_dir.close()
        raise
    return server, run_dir


def _full_url(url: str) -> str:
    full = url if "://" in url else f"http://{url}"
    if not full.startswith(("http://", "https://")):
        raise ConfigError(f"target_url {url}: expected http://HOST:PORT")
    return full.rstrip("/")


def cpu_thread_binding(tp_size: int) -> tuple[int, str]:
    """(threads per rank, binding `0-1|2-3`) that spread the usable cores over tensor-parallel ranks on CPU."""
    cores = sorted(os.sched_getaffinity(0))
    if tp_size > len(cores):
        raise ConfigError(f"tp_size {tp_size}: only {len(cores)} CPU cores here, one rank needs one")
    share = len(cores) // tp_size
    threads = max(1, share // 2 if tp_size == 1 else share)
    wanted = os.environ.get("OMP_NUM_THREADS")
    threads = int(wanted) if wanted and wanted.isdigit() else threads
    groups = [cores[rank * share : rank * share + min(threads, share)] for rank in range(tp_size)]
    return threads, "|".join(",".join(str(core) for core in group) for group in groups)


def without_compiler() -> dict[str, str]:
    """For a server on CPU: torch.compile off, unless the user has it on. It needs a C++ compiler, and builds the small
    functions around drafting for longer than they take."""
    return {"TORCHDYNAMO_DISABLE": os.environ.get("TORCHDYNAMO_DISABLE", "1")}


def engine_arg_words(items: Sequence[str]) -> list[str]:
    """`--engine-arg key=value` as flags of the server; a key alone is a switch. They come last, so they win."""
    words: list[str] = []
    for item in items:
        key, equals, value = item.partition("=")
        if not key.strip("-"):
            raise ConfigError(f"engine_arg '{item}': expected key=value, e.g. --engine-arg max-running-requests=32")
        words.append("--" + key.lstrip("-").replace("_", "-"))
        if equals:
            words.append(value)
    return words
