"""From the `target` section of a config to a running engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from specforge_lite.capture.base import DEFAULT_WAIT_MINUTES, EngineContext, TargetEngine, read_target_info
from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.core.log import info
from specforge_lite.core.sections import TargetSection


def _open_hf(target: TargetSection, context: EngineContext) -> TargetEngine:
    from specforge_lite.capture.hf import HfEngine

    _refuse_server_flags(target, "hf")
    return HfEngine(
        target.target_model_path,
        aux_layer_ids=target.aux_layer_ids,
        dtype=target.target_dtype,
        device=context.device,
        trust_remote_code=target.trust_remote_code,
        tp=target.tp_size,
        wait_minutes=context.wait_minutes,
    )


def _open_fake(target: TargetSection, context: EngineContext) -> TargetEngine:
    from specforge_lite.capture.fake import FakeEngine

    _refuse_server_flags(target, "fake")
    return FakeEngine(read_target_info(target, "fake"))


def _open_server(name: str) -> Callable[[TargetSection, EngineContext], TargetEngine]:
    def open_one(target: TargetSection, context: EngineContext) -> TargetEngine:
        from specforge_lite.serving.environment import SERVING_ENGINES
        from specforge_lite.serving.launch import open_remote

        return open_remote(SERVING_ENGINES[name], target, context)

    return open_one


ENGINES: dict[str, Callable[[TargetSection, EngineContext], TargetEngine]] = {
    "hf": _open_hf,
    "fake": _open_fake,
    "sglang": _open_server("sglang"),
    "vllm": _open_server("vllm"),
}


def open_engine(
    target: TargetSection,
    max_length: int,
    log_dir: Path | None = None,
    wait_minutes: float = DEFAULT_WAIT_MINUTES,
    device: str | None = None,
) -> TargetEngine:
    """Start or attach to the engine that `target` names and check it with a probe sample.

    Under torchrun every rank calls this, after `init_process_group`: the first rank of each host launches the
    server, the others attach to it. Close the result, also after an error.

    Raises ConfigError for a combination that cannot work, EngineError if the engine does not come up, CaptureError
    if the probe's reply is not what the model's config promises.
    """
    context = EngineContext(max_length, log_dir, wait_minutes, device)
    name: str = target.target_backend
    if name == "auto":
        from specforge_lite.serving.environment import choose_backend

        name = choose_backend(target)
        info(f"target backend: {name} (auto)")
    if name not in ENGINES:
        raise ConfigError(f"target_backend: unknown engine '{name}'{suggest(name, ENGINES)}")
    return ENGINES[name](target, context)


def _refuse_server_flags(target: TargetSection, engine: str) -> None:
    for flag in ("target_url", "engine_python", "engine_arg", "engine_devices"):
        if getattr(target, flag):
            raise ConfigError(
                f"--{flag.replace('_', '-')}: only for --target-backend sglang or vllm, the backend is {engine}"
            )
