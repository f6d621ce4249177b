"""From a config section to a RemoteEngine: launch a server or attach to running ones.

Under torchrun the first rank of each host launches one for its host; the others attach to it.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from specforge_lite.capture.base import DEFAULT_WAIT_MINUTES, TargetInfo, read_target_info
from specforge_lite.capture.remote import RemoteEngine
from specforge_lite.capture.transport import check_space, mooncake_address
from specforge_lite.core.errors import ConfigError, SpecforgeError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.engine import Engine, Launch, ServingOptions, engine_arg_words
from specforge_lite.serving.environment import (
    SERVING_ENGINES,
    Interpreter,
    check_plugin,
    choose_backend,
    find_interpreter,
    has_gpu,
)
from specforge_lite.serving.families import check_target
from specforge_lite.serving.probe import verify_capture
from specforge_lite.serving.process import (
    LaunchedServer,
    RunDirectory,
    ServerSpec,
    collect_leftovers,
    free_port,
    is_free,
)

# Tokens a server keeps back beside the prompt: SGLang 6 (tokenizer_manager), vLLM 1 new token and 1 draft token.
CONTEXT_MARGIN = 8
LARGEST_DTYPE_BYTES = 4
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class EngineContext:
    """What a served engine needs to know about the run besides its config section.

    max_length: tokens of the longest sample. log_dir: where server logs go (None: a temporary directory).
    wait_minutes: how long a server that does not answer is waited for (`--dist-timeout`).
    """

    max_length: int
    log_dir: Path | None = None
    wait_minutes: float = DEFAULT_WAIT_MINUTES


def open_remote(engine: Engine, target: TargetSection, context: EngineContext) -> RemoteEngine:
    """Return a probed engine. Raises ConfigError, EngineError or CaptureError; nothing is left running then."""
    wanted = read_target_info(target, engine.name, context.max_length)
    return _probed((_attach if target.target_url else _launch)(engine, target, context, wanted), target)


def _probed(opened: RemoteEngine, target: TargetSection) -> RemoteEngine:
    try:
        replies = opened.probe()
        if target.verify_capture and os.environ.get("LOCAL_RANK", "0") == "0":
            verify_capture(replies, target.target_model_path, target.trust_remote_code)
    except BaseException:
        opened.close()
        raise
    return opened


def _attach(engine: Engine, target: TargetSection, context: EngineContext, wanted: TargetInfo) -> RemoteEngine:
    for flag in ("engine_python", "engine_arg", "engine_devices", "mem_frac"):
        if getattr(target, flag):
            raise ConfigError(f"--{flag.replace('_', '-')}: the server at --target-url is not ours to configure")
    check_target(engine, target, wanted, None)
    # An attached server names its directory itself; its store must be the one we know.
    place = _mooncake_place(target) or "tmpfs:"
    urls = [_full_url(url) for url in target.target_url]
    first = int(os.environ.get("RANK", "0")) % len(urls)
    urls = urls[first:] + urls[:first]
    return RemoteEngine(engine, wanted, urls, place, target.requests_in_flight, context.wait_minutes)


def _mooncake_place(target: TargetSection) -> str:
    """Where samples travel through Mooncake; empty where they lie on tmpfs."""
    return f"mooncake:{mooncake_address(target.mooncake_address)}" if target.transport == "mooncake" else ""


def _full_url(url: str) -> str:
    full = url if "://" in url else f"http://{url}"
    if not full.startswith(("http://", "https://")):
        raise ConfigError(f"target_url {url}: expected http://HOST:PORT")
    return full.rstrip("/")


def _launch(engine: Engine, target: TargetSection, context: EngineContext, wanted: TargetInfo) -> RemoteEngine:
    """Launch on the first rank of each host and report to the host's other ranks where, or why not."""
    server: LaunchedServer | None = None
    error: SpecforgeError | None = None
    message: tuple[str, str, str] | None = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            server = start_capture_server(engine, target, context, wanted)
            message = ("ready", server.spec.url, server.spec.env["SPECFORGE_CAPTURE"])
        except SpecforgeError as failure:
            error = failure
            message = ("error", type(error).__name__, str(error))
    try:
        kind, url, place = _share_with_host(message)
        if kind == "error":
            raise error or SpecforgeError(f"{url} on rank 0 of this host: {place}")
    except BaseException:
        if server is not None:
            server.stop()
        raise
    return RemoteEngine(engine, wanted, [url], place, target.requests_in_flight, context.wait_minutes, server)


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


def start_capture_server(
    engine: Engine,
    target: TargetSection,
    context: EngineContext,
    wanted: TargetInfo,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> LaunchedServer:
    """Start a capture server of this process and wait until it is healthy.

    Raises ConfigError or EngineError, and leaves nothing behind then.
    """
    interpreter = find_interpreter(engine.name, target.engine_python)
    check_plugin(interpreter)
    check_target(engine, target, wanted, interpreter)
    options = ServingOptions(
        engine.name,
        target.target_model_path,
        tp_size=target.tp_size,
        dtype=target.target_dtype,
        mem_frac=target.mem_frac,
        max_length=wanted.max_length + CONTEXT_MARGIN,
        concurrency=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * target.requests_in_flight,
        port=port,
        engine_args=target.engine_arg,
        engine_devices=target.engine_devices,
        log_dir=context.log_dir,
        startup_minutes=context.wait_minutes,
        trust_remote_code=target.trust_remote_code,
    )
    place = _mooncake_place(target)
    if not place:
        row_bytes = (len(wanted.aux_layer_ids) + 1) * wanted.hidden_size * LARGEST_DTYPE_BYTES
        check_space(target.transport_dir, options.concurrency * wanted.max_length * row_bytes)
    group = os.environ.get("GROUP_RANK", "0")
    return start_server(
        engine,
        options,
        interpreter,
        lambda launch: engine.capture_command(launch, wanted),
        what=f"tp {target.tp_size}, {'gpu' if has_gpu(target.engine_devices) else 'cpu'}",
        log_name="server.log" if group == "0" else f"server-{group}.log",
        host=host,
        parent=target.transport_dir,
        capture_place=place,
    )


def start_server(
    engine: Engine,
    options: ServingOptions,
    interpreter: Interpreter,
    command: Callable[[Launch], list[str]],
    *,
    what: str,
    log_name: str,
    host: str = "127.0.0.1",
    parent: Path = SHARED_MEMORY,
    capture_place: str | None = None,
) -> LaunchedServer:
    """Run `command` and wait until it is healthy. what, log_name: its kind, for its name and for its log's. parent:
    where its run directory goes. capture_place: where the capture plugin stores samples; "": the run directory, None:
    the plugin stays off.

    Raises ConfigError or EngineError, and leaves nothing behind then.
    """
    check_port(options.port, host)
    port = options.port or free_port()
    words, env = _words_and_environment(engine, replace(options, port=port), interpreter, command, host)
    collect_leftovers(parent)
    run_dir = RunDirectory(parent)
    if capture_place is not None:
        env["SPECFORGE_CAPTURE"] = capture_place or f"tmpfs:{run_dir.path}"
    log_dir = options.log_dir or Path(tempfile.mkdtemp(prefix=f"specforge-{engine.name}-"))
    spec = ServerSpec(
        name=f"{engine.name} {interpreter.version} ({what})",
        command=words,
        env=env,
        url=f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",
        health_path=engine.health_path,
        log_path=log_dir / f"{engine.name}-{log_name}",
        startup_seconds=60 * options.startup_minutes,
    )
    server = LaunchedServer(spec, run_dir)
    server.start()
    return server


def _words_and_environment(
    engine: Engine, options: ServingOptions, interpreter: Interpreter, command: Callable[[Launch], list[str]], host: str
) -> tuple[list[str], dict[str, str]]:
    gpu = has_gpu(options.engine_devices)
    launch = Launch(**vars(options), python=interpreter.python, host=host, gpu=gpu)
    words, env = command(launch), engine.environment(launch)
    if options.engine_devices is not None and gpu:
        env["CUDA_VISIBLE_DEVICES"] = options.engine_devices
    return words + engine_arg_words(options.engine_args), env


def check_port(port: int | None, host: str = "127.0.0.1") -> None:
    if port is not None and not is_free(port, host):
        raise ConfigError(f"port {port}: in use on {host}; give another, or none for one that is free")


def check_server(options: ServingOptions, temperature: float) -> None:
    """What can be known before a server is started: raises ConfigError where the engine is not installed, its port is
    in use, or it would not answer at this temperature. temperature: the highest with a draft."""
    find_interpreter(options.backend, options.engine_python)
    check_port(options.port)
    if temperature > 0 and SERVING_ENGINES[options.backend].greedy_on_cpu and not has_gpu(options.engine_devices):
        raise ConfigError(
            f"temperature {temperature:g}: {options.backend} on a CPU answers greedily with a draft, whatever the"
            " temperature; give temperature 0, or take vllm"
        )


def launch_script(options: ServingOptions) -> str:
    """A shell script that starts a server with these options, as the benchmarks do. Raises ConfigError."""
    engine, interpreter = SERVING_ENGINES[options.backend], find_interpreter(options.backend, options.engine_python)
    words, env = _words_and_environment(engine, options, interpreter, engine.serving_command, "127.0.0.1")
    lines = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    return "\n".join(["#!/bin/sh", *lines, "exec " + shlex.join(words).replace(" --", " \\\n  --"), ""])


@contextmanager
def capture_host(
    target: TargetSection, context: EngineContext, host: str = "127.0.0.1", port: int | None = None
) -> Iterator[tuple[str, LaunchedServer]]:
    """The engine's name and a probed capture server of it without a trainer: what `scripts/serve_target.py` runs.

    host, port: where it listens (there is no authentication). context: its longest sample, log directory and time to
    start. Raises ConfigError, EngineError or CaptureError if it cannot be started or fails its probe.
    """
    name = choose_backend(target)
    if name not in SERVING_ENGINES:
        raise ConfigError(f"target_backend {name}: runs inside the trainer; serve with sglang or vllm")
    if target.target_url:
        raise ConfigError("--target-url: this starts a server, trainers attach to it")
    engine = SERVING_ENGINES[name]
    wanted = read_target_info(target, name, context.max_length)
    server = start_capture_server(engine, target, context, wanted, host, port)
    client = RemoteEngine(engine, wanted, [server.spec.url], None, 1, context.wait_minutes, server)
    with closing(_probed(client, target)):
        yield name, server
