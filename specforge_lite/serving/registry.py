"""From the `target` section of a config to a running engine."""

from __future__ import annotations

from pathlib import Path

from specforge_lite.capture.base import DEFAULT_WAIT_MINUTES, TargetEngine, read_target_info
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info
from specforge_lite.core.sections import TargetSection

IN_PROCESS = ("hf", "fake")


def open_engine(
    target: TargetSection,
    max_length: int,
    log_dir: Path | None = None,
    wait_minutes: float = DEFAULT_WAIT_MINUTES,
    device: str | None = None,
) -> TargetEngine:
    """Start or attach to the engine that `target` names and check it with a probe sample.

    max_length: tokens of the longest sample. device: of an engine inside this process. log_dir: where server logs go
    (None: a temporary directory). wait_minutes: how long a server that does not answer is waited for.
    Under torchrun every rank calls this, after `init_process_group`: the first rank of each host launches the
    server, the others attach to it. Close the result, also after an error.

    Raises ConfigError for a combination that cannot work, EngineError if the engine does not come up, CaptureError
    if the probe's reply is not what the model's config promises.
    """
    name: str = target.target_backend
    if name == "auto":
        from specforge_lite.serving.environment import choose_backend

        name = choose_backend(target)
        info(f"target backend: {name} (auto)")
    if name not in IN_PROCESS:
        from specforge_lite.serving.environment import SERVING_ENGINES
        from specforge_lite.serving.launch import EngineContext, open_remote

        return open_remote(SERVING_ENGINES[name], target, EngineContext(max_length, log_dir, wait_minutes))
    for flag in ("target_url", "engine_python", "engine_arg", "engine_devices"):
        if getattr(target, flag):
            raise ConfigError(
                f"--{flag.replace('_', '-')}: only for --target-backend sglang or vllm, the backend is {name}"
            )
    if name == "fake":
        from specforge_lite.capture.fake import FakeEngine

        return FakeEngine(read_target_info(target, name))
    from specforge_lite.capture.hf import HfEngine

    return HfEngine(
        target.target_model_path,
        aux_layer_ids=target.aux_layer_ids,
        dtype=target.target_dtype,
        device=device,
        trust_remote_code=target.trust_remote_code,
        tp=target.tp_size,
        wait_minutes=wait_minutes,
    )
