"""From flags to engines: an opener that starts one session per way of speculation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specforge_lite.benchmark.configs import Speculation
from specforge_lite.benchmark.hf import HfSession
from specforge_lite.benchmark.run import OpenSession
from specforge_lite.benchmark.server import ServerSession, reserved_tokens
from specforge_lite.benchmark.session import Session
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import info
from specforge_lite.inference.hf_generate import eos_token_ids_of
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.serving.environment import find_interpreter, first_installed_engine
from specforge_lite.serving.session import ServingOptions

BACKENDS = ("hf", "sglang", "vllm")


@dataclass(frozen=True)
class EngineOptions:
    """How the target and its draft are run."""

    backend: str
    model_path: str
    draft_path: str | None
    temperature: float = 0.0
    seed: int = 0
    dtype: str = "auto"
    tp_size: int = 1
    port: int | None = None
    mem_frac: float | None = None
    engine_python: str | None = None
    engine_args: tuple[str, ...] = ()
    engine_devices: str | None = None
    startup_minutes: float = 20.0
    trust_remote_code: bool = False
    log_dir: Path | None = None


def choose_backend(name: str) -> str:
    """`auto` -> sglang where it is installed, else vllm, else hf; says what it chose."""
    if name != "auto":
        return name
    chosen = first_installed_engine() or "hf"
    info(f"backend: {chosen} (auto)")
    return chosen


def check_options(options: EngineOptions, drafted: bool) -> None:
    """Refuse at once what would fail after the first engine start. drafted: some configuration uses the draft."""
    if drafted and options.draft_path is None:
        raise ConfigError("config_list: drafting needs --speculative-draft-model-path (STEPS 0 does without)")
    if options.backend == "hf":
        for flag in ("engine_python", "engine_args", "engine_devices", "port", "mem_frac"):
            if getattr(options, flag):
                raise ConfigError(f"--{FLAG_NAMES[flag]}: only for --backend sglang or vllm, the backend is hf")
        if options.tp_size != 1:
            raise ConfigError("--tp-size: --backend hf runs on one device")
    else:
        find_interpreter(options.backend, options.engine_python)


FLAG_NAMES = {
    "engine_python": "engine-python",
    "engine_args": "engine-arg",
    "engine_devices": "engine-devices",
    "port": "port",
    "mem_frac": "mem-fraction-static",
}


def session_opener(options: EngineOptions, longest: int) -> OpenSession:
    """A function (speculation, largest batch size) -> running session. longest: tokens of prompt and answer that the
    workload may reach; servers are started for that, or for what the model can do if that is less."""
    return _hf_opener(options) if options.backend == "hf" else _server_opener(options, longest)


def _hf_opener(options: EngineOptions) -> OpenSession:
    model = SpeculativeModel.from_pretrained(
        options.model_path, options.draft_path, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    eos_token_ids = eos_token_ids_of(model.target.model, model.tokenizer)

    def open_session(speculation: Speculation, batch_size: int) -> Session:
        return HfSession(model, speculation, options.temperature, options.seed, eos_token_ids)

    return open_session


def _server_opener(options: EngineOptions, longest: int) -> OpenSession:
    limit = context_limit(options.model_path, options.trust_remote_code)

    def open_session(speculation: Speculation, batch_size: int) -> Session:
        engine_args = options.engine_args
        if options.backend == "vllm":  # else a run would find the prefixes that an earlier one computed
            engine_args = ("no-enable-prefix-caching", *engine_args)
        wanted = longest + reserved_tokens(speculation.steps, speculation.topk, speculation.num_draft_tokens)
        serving = ServingOptions(
            backend=options.backend,
            model_path=options.model_path,
            draft_path=None if speculation.is_baseline else options.draft_path,
            num_steps=speculation.steps,
            topk=max(speculation.topk, 1),
            num_draft_tokens=max(speculation.num_draft_tokens, 1),
            tp_size=options.tp_size,
            dtype=options.dtype,
            mem_frac=options.mem_frac,
            max_length=min(wanted, limit),
            concurrency=batch_size,
            port=options.port,
            engine_python=options.engine_python,
            engine_args=engine_args,
            engine_devices=options.engine_devices,
            log_dir=options.log_dir,
            startup_minutes=options.startup_minutes,
            trust_remote_code=options.trust_remote_code,
        )
        return ServerSession(serving, options.temperature)

    return open_session


def context_limit(model_path: str, trust_remote_code: bool) -> int:
    """Positions the target has been made for. Raises ConfigError if its config cannot be read."""
    config = load_config(model_path, trust_remote_code, "model_path")
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)
