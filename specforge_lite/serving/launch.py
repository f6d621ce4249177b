"""From a config section to a RemoteEngine: launch a server or attach to running ones.

Under torchrun the first rank of each host launches one for its host; the others attach to it.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from specforge_lite.capture.base import EngineContext, TargetInfo, read_target_info
from specforge_lite.capture.remote import RemoteEngine
from specforge_lite.capture.transport import check_space, mooncake_address
from specforge_lite.core.errors import ConfigError, EngineError, SpecforgeError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.engine import Engine, Launch, engine_arg_words
from specforge_lite.serving.environment import SERVING_ENGINES, check_plugin, choose_backend, find_interpreter, has_gpu
from specforge_lite.serving.families import check_target
from specforge_lite.serving.probe import verify_capture
from specforge_lite.serving.process import LaunchedServer, RunDirectory, ServerSpec, collect_leftovers, free_port

# Tokens a server keeps back beside the prompt: SGLang 6 (tokenizer_manager), vLLM 1 new token and 1 draft token.
CONTEXT_MARGIN = 8
LARGEST_DTYPE_BYTES = 4
SHARED_MEMORY = Path("/dev/shm")


def open_remote(engine: Engine, target: TargetSection, context: EngineContext) -> RemoteEngine:
    """Return a probed engine. Raises ConfigError, EngineError or CaptureError; nothing is left running then."""
    wanted = _limit_length(read_target_info(target, engine.name), context.max_length)
    opened = (_attach if target.target_url else _launch)(engine, target, context, wanted)
    return _probed(opened, target)


def _probed(opened: RemoteEngine, target: TargetSection) -> RemoteEngine:
    try:
        replies = opened.probe()
        if target.verify_capture and os.environ.get("LOCAL_RANK", "0") == "0":
            verify_capture(replies, target.target_model_path, target.trust_remote_code)
    except BaseException:
        opened.close()
        raise
    return opened


def _limit_length(info: TargetInfo, max_length: int) -> TargetInfo:
    """`info` with a length limit of at most `max_length`: a server need not reserve memory for more."""
    return replace(info, max_length=min(info.max_length, max_length))


def _attach(engine: Engine, target: TargetSection, context: EngineContext, wanted: TargetInfo) -> RemoteEngine:
    for flag in ("engine_python", "engine_arg", "engine_devices", "mem_frac"):
        if getattr(target, flag):
            raise ConfigError(f"--{flag.replace('_', '-')}: the server at --target-url is not ours to configure")
    check_target(engine, target, wanted, None)
    # An attached server names its directory itself; its store must be the one we know.
    place = f"mooncake:{mooncake_address(target.mooncake_address)}" if target.transport == "mooncake" else "tmpfs:"
    urls = [_full_url(url) for url in target.target_url]
    first = int(os.environ.get("RANK", "0")) % len(urls)
    urls = urls[first:] + urls[:first]
    return RemoteEngine(engine, wanted, urls, place, target.requests_in_flight, context.wait_minutes)


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
    num_requests = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * target.requests_in_flight
    place = ""
    if target.transport == "mooncake":
        place = f"mooncake:{mooncake_address(target.mooncake_address)}"
    else:
        row = (len(wanted.aux_layer_ids) + 1) * wanted.hidden_size * LARGEST_DTYPE_BYTES
        check_space(target.transport_dir, num_requests * wanted.max_length * row)
    launch = Launch(
        python=interpreter.python,
        model_path=target.target_model_path,
        host=host,
        port=port or free_port(),
        gpu=has_gpu(target.engine_devices),
        context_length=wanted.max_length + CONTEXT_MARGIN,
        num_requests=num_requests,
        tp_size=target.tp_size,
        dtype=target.target_dtype,
        mem_frac=target.mem_frac,
        trust_remote_code=target.trust_remote_code,
        engine_args=target.engine_arg,
        devices=target.engine_devices,
    )
    group = os.environ.get("GROUP_RANK", "0")
    return start_server(
        engine,
        launch,
        engine.capture_command(launch, wanted),
        name=f"{engine.name} {interpreter.version} (tp {target.tp_size}, {'gpu' if launch.gpu else 'cpu'})",
        log_dir=context.log_dir,
        log_name=f"{engine.name}-server.log" if group == "0" else f"{engine.name}-server-{group}.log",
        startup_minutes=context.wait_minutes,
        parent=target.transport_dir,
        capture_place=place,
    )


def start_server(
    engine: Engine,
    launch: Launch,
    command: list[str],
    *,
    name: str,
    log_dir: Path | None,
    log_name: str,
    startup_minutes: float,
    parent: Path = SHARED_MEMORY,
    capture_place: str | None = None,
) -> LaunchedServer:
    """Run `command` and wait until it is healthy. parent: where its run directory goes. capture_place: where the
    capture plugin stores samples; "": the run directory, None: the plugin stays off.

    Raises ConfigError or EngineError, and leaves nothing behind then.
    """
    env = engine.environment(launch)
    if launch.devices is not None and launch.gpu:
        env["CUDA_VISIBLE_DEVICES"] = launch.devices
    collect_leftovers(parent)
    run_dir = RunDirectory(parent)
    if capture_place is not None:
        env["SPECFORGE_CAPTURE"] = capture_place or f"tmpfs:{run_dir.path}"
    spec = ServerSpec(
        name=name,
        command=command + engine_arg_words(launch.engine_args),
        env=env,
        url=f"http://{'127.0.0.1' if launch.host == '0.0.0.0' else launch.host}:{launch.port}",
        health_path=engine.health_path,
        log_path=(log_dir or Path(tempfile.mkdtemp(prefix=f"specforge-{engine.name}-"))) / log_name,
        startup_seconds=60 * startup_minutes,
    )
    server = LaunchedServer(spec, run_dir)
    server.start()
    return server


class CaptureHost:
    """A probed capture server without a trainer, for as long as the object lives; use as a context manager. It is what
    `scripts/serve_target.py` runs on a target host.

    host, port: where it listens (there is no authentication). max_length: tokens of the longest sample.
    Raises ConfigError, EngineError or CaptureError if it cannot be started or fails its probe.
    """

    def __init__(
        self,
        target: TargetSection,
        host: str = "127.0.0.1",
        port: int | None = None,
        max_length: int = 2048,
        log_dir: Path | None = None,
        startup_minutes: float = 20.0,
    ) -> None:
        self.engine = choose_backend(target) if target.target_backend == "auto" else target.target_backend
        if self.engine not in SERVING_ENGINES:
            raise ConfigError(f"target_backend {self.engine}: runs inside the trainer; serve with sglang or vllm")
        if target.target_url:
            raise ConfigError("--target-url: this starts a server, trainers attach to it")
        engine = SERVING_ENGINES[self.engine]
        wanted = _limit_length(read_target_info(target, self.engine), max_length)
        context = EngineContext(max_length, log_dir, startup_minutes)
        self.server = start_capture_server(engine, target, context, wanted, host, port)
        self._client = _probed(RemoteEngine(engine, wanted, [self.url], None, 1, startup_minutes, self.server), target)

    @property
    def url(self) -> str:
        return self.server.spec.url

    def wait(self, stop: threading.Event) -> None:
        """Return when `stop` is set; raise EngineError when the server will not come back."""
        while not stop.wait(0.5):
            if self.server.failure is not None:
                raise EngineError(self.server.failure)

    def close(self) -> None:
        """Stop the server; may be called twice."""
        self._client.close()

    def __enter__(self) -> CaptureHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
