"""A capture server of its own, without a trainer: what `scripts/serve_target.py` runs on a target host."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from specforge_lite.capture.context import EngineContext, read_target_info
from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.launch import limit_length, start_server
from specforge_lite.serving.registry import choose_backend
from specforge_lite.serving.remote import RemoteEngine
from specforge_lite.serving.sglang import LAUNCHER as SGLANG
from specforge_lite.serving.vllm import LAUNCHER as VLLM

LAUNCHERS = {"sglang": SGLANG, "vllm": VLLM}


class CaptureHost:
    """A probed capture server for as long as the object lives; use as a context manager.

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
        if self.engine not in LAUNCHERS:
            raise ConfigError(f"target_backend {self.engine}: runs inside the trainer; serve with sglang or vllm")
        if target.target_url:
            raise ConfigError("--target-url: this starts a server, trainers attach to it")
        launcher = LAUNCHERS[self.engine]
        context = EngineContext(max_length, log_dir, startup_minutes)
        wanted = limit_length(read_target_info(target, self.engine), max_length)
        self.server, self._run_dir = start_server(launcher, target, context, wanted, host, port)
        self._client = RemoteEngine(
            launcher.dialect, wanted, [self.url], None, 1, startup_minutes, self.server, self._run_dir
        )
        try:
            self._client.probe()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return self.server.spec.url

    def wait(self, stop: threading.Event) -> None:
        """Return when `stop` is set; raise EngineError when the server is gone for good."""
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
