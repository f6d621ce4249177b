"""Run a target as a capture server that trainers attach to with --target-url, on this host or on others.

    python scripts/serve_target.py --target-model-path MODEL --target-backend sglang --tp-size 4 --port 30000
    python scripts/serve_target.py --target-model-path MODEL --host 10.0.0.2 --port 30000 \\
        --transport mooncake --mooncake-address 10.0.0.1:50051

It checks itself with a probe sample, restarts the server if it dies, and stops it on Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from pydantic import Field

from specforge_lite.core.errors import EngineError
from specforge_lite.core.log import info
from specforge_lite.core.sections import TargetSection
from specforge_lite.core.settings import Section, parse_config


class ServeSection(Section):
    """Where the server listens and what it accepts."""

    host: str = Field("127.0.0.1", description="address to listen on; there is no authentication")
    port: int = Field(30000, ge=1, le=65535)
    max_length: int = Field(2048, ge=8, description="tokens of the longest sample")
    log_dir: Path = Field(Path("outputs/serve_target"), description="where the server's log goes")
    startup_minutes: float = Field(20.0, gt=0, description="how long the server may take to load the model")


class ServeTargetConfig(Section):
    """A capture server."""

    target: TargetSection
    serve: ServeSection = ServeSection()


def main() -> None:
    config = parse_config(ServeTargetConfig, description=__doc__ or "")
    from specforge_lite.capture.base import EngineContext
    from specforge_lite.serving.launch import capture_host

    serve, target = config.serve, config.target
    context = EngineContext(serve.max_length, serve.log_dir, serve.startup_minutes)
    with capture_host(target, context, serve.host, serve.port) as (engine, server):
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        place = "" if target.transport == "tmpfs" else " --transport mooncake --mooncake-address ..."
        info(f"attach with: --target-backend {engine} --target-url {server.spec.url}{place}")
        while not stop.wait(0.5):
            if server.failure is not None:
                raise EngineError(server.failure)
