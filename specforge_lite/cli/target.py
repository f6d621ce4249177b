"""The commands that run a target: capture its hidden states to disk, or serve them."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from specforge_lite.capture.settings import CaptureSection
from specforge_lite.core.errors import EngineError
from specforge_lite.core.log import info
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.core.settings import Section, flag, parse_config

CAPTURE_HELP = """\
Capture a target's hidden states once to disk, to train from them with --offline-dir, without running the target.

    python scripts/capture_hidden_states.py --target-model-path MODEL --train-data-path FILE --offline-dir DIR
    python scripts/train_eagle3_online.py --target-model-path MODEL --offline-dir DIR --output-dir RUN

The size is printed and checked against the free disk before anything starts. A killed capture continues.
"""
SERVE_HELP = """\
Run a target as a capture server that trainers attach to with --target-url, on this host or on others.

    python scripts/serve_target.py --target-model-path MODEL --target-backend sglang --tp-size 4 --port 30000
    python scripts/serve_target.py --target-model-path MODEL --host 10.0.0.2 --port 30000 \\
        --transport mooncake --mooncake-address 10.0.0.1:50051

It checks itself with a probe sample, restarts the server if it dies, and stops it on Ctrl-C or SIGTERM.
"""


class CaptureConfig(Section):
    """Capture hidden states to disk."""

    target: TargetSection
    data: DataSection = DataSection()
    capture: CaptureSection


def capture() -> int:
    config = parse_config(CaptureConfig, description=CAPTURE_HELP)
    from specforge_lite.capture.base import read_target_info
    from specforge_lite.capture.offline import capture_offline, check_room
    from specforge_lite.core.files import lock_directory
    from specforge_lite.data.cache import open_dataset
    from specforge_lite.serving.registry import open_engine
    from specforge_lite.training.reporting import catch_signals

    capture = config.capture
    datasets = {"train": open_dataset(config.data.train_data_path, config.target, config.data)}
    if config.data.eval_data_path is not None:
        datasets["eval"] = open_dataset(config.data.eval_data_path, config.target, config.data)
    check_room(capture.offline_dir, datasets, read_target_info(config.target, config.target.target_backend), capture)
    with catch_signals(), lock_directory(capture.offline_dir, "offline_dir"):
        engine = open_engine(config.target, config.data.max_length, log_dir=capture.offline_dir / "engine")
        try:
            for part, dataset in datasets.items():
                capture_offline(dataset, engine, capture.offline_dir / part, capture)
        finally:
            engine.close()
    return 0


class ServeSection(Section):
    """Where the server listens and what it accepts."""

    host: str = flag("127.0.0.1", "address to listen on; there is no authentication")
    port: int = flag(30000, "port to listen on", ge=1, le=65535)
    max_length: int = flag(2048, "tokens of the longest sample", ge=8)
    log_dir: Path = flag(Path("outputs/serve_target"), "where the server's log goes")
    startup_minutes: float = flag(20.0, "how long the server may take to load the model", gt=0)


class ServeTargetConfig(Section):
    """A capture server."""

    target: TargetSection
    serve: ServeSection = ServeSection()


def serve() -> None:
    config = parse_config(ServeTargetConfig, description=SERVE_HELP)
    from specforge_lite.serving.launch import EngineContext, capture_host

    options, target = config.serve, config.target
    context = EngineContext(options.max_length, options.log_dir, options.startup_minutes)
    with capture_host(target, context, options.host, options.port) as (engine, server):
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        place = "" if target.transport == "tmpfs" else " --transport mooncake --mooncake-address ..."
        info(f"attach with: --target-backend {engine} --target-url {server.spec.url}{place}")
        while not stop.wait(0.5):
            if server.failure is not None:
                raise EngineError(server.failure)
