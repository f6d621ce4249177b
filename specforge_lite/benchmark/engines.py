"""From options to engines: an opener that starts one session per way of speculation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from specforge_lite.benchmark.configs import Speculation
from specforge_lite.benchmark.hf import HfSession
from specforge_lite.benchmark.measure import Session
from specforge_lite.benchmark.run import OpenSession
from specforge_lite.benchmark.server import ServerSession, reserved_tokens
from specforge_lite.capture.base import num_positions
from specforge_lite.checkpoints.export import DTYPES, export_checkpoint
from specforge_lite.checkpoints.loading import find_draft
from specforge_lite.checkpoints.training_run import TRAINING_CONFIG
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import info
from specforge_lite.inference.hf_generate import eos_token_ids_of
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.serving.environment import find_interpreter, first_installed_engine
from specforge_lite.serving.session import ServingOptions, ServingSession

SERVER_FLAGS = {
    "engine_python": "--engine-python",
    "engine_args": "--engine-arg",
    "engine_devices": "--engine-devices",
    "port": "--port",
    "mem_frac": "--mem-fraction-static",
}


def choose_backend(name: str) -> str:
    """`auto` -> sglang where it is installed, else vllm, else hf; logs what it chose."""
    if name != "auto":
        return name
    chosen = first_installed_engine() or "hf"
    info(f"backend: {chosen} (auto)")
    return chosen


def check_options(options: ServingOptions, drafted: bool) -> None:
    """Refuse at once what would fail after the first engine start. options: of a server, or `backend` hf. drafted:
    some configuration uses the draft."""
    if drafted and options.draft_path is None:
        raise ConfigError("config_list: drafting needs --speculative-draft-model-path (STEPS 0 does without)")
    if options.backend != "hf":
        find_interpreter(options.backend, options.engine_python)
        return
    for name, flag in SERVER_FLAGS.items():
        if getattr(options, name):
            raise ConfigError(f"{flag}: only for --backend sglang or vllm, the backend is hf")
    if options.tp_size != 1:
        raise ConfigError("--tp-size: --backend hf runs on one device")


def resolve_draft(path: str | None) -> str | None:
    """A draft path as given, or the checkpoint that is meant where it is the output directory of a training run."""
    return path if path is None or not Path(path).is_dir() else str(find_draft(path))


@contextmanager
def exported_draft(options: ServingOptions) -> Iterator[ServingOptions]:
    """Options with a draft that servers read: a training checkpoint `step_N` is exported for as long as this lasts."""
    path = options.draft_path
    if path is None or options.backend == "hf" or not (Path(path) / TRAINING_CONFIG).exists():
        yield options
        return
    dtype = options.dtype if options.dtype in DTYPES else "bfloat16"
    with TemporaryDirectory(prefix="draft-") as directory:
        folder = export_checkpoint(path, Path(directory) / "draft", dtype=dtype)
        info(
            f"draft {path}: a training checkpoint, exported in {dtype} for this run (keep one: scripts/export_draft.py)"
        )
        yield replace(options, draft_path=str(folder))


def session_opener(options: ServingOptions, longest: int, temperature: float, seed: int) -> OpenSession:
    """A function (speculation, largest batch size) -> running session. longest: tokens of prompt and answer that the
    workload may reach; servers are started for that, or for what the model can do if that is less."""
    if options.backend == "hf":
        model = SpeculativeModel.from_pretrained(
            options.model_path, options.draft_path, dtype=options.dtype, trust_remote_code=options.trust_remote_code
        )
        eos_token_ids = eos_token_ids_of(model.target.model, model.tokenizer)
        return lambda speculation, _: HfSession(model, speculation, temperature, seed, eos_token_ids)
    limit = num_positions(load_config(options.model_path, options.trust_remote_code)) or 1 << 20

    def open_server(speculation: Speculation, batch_size: int) -> Session:
        engine_args = options.engine_args
        if options.backend == "vllm":  # else a run would find the prefixes that an earlier one computed
            engine_args = ("no-enable-prefix-caching", *engine_args)
        wanted = longest + reserved_tokens(speculation.steps, speculation.topk, speculation.num_draft_tokens)
        serving = replace(
            options,
            draft_path=None if speculation.is_baseline else options.draft_path,
            num_steps=speculation.steps,
            topk=max(speculation.topk, 1),
            num_draft_tokens=max(speculation.num_draft_tokens, 1),
            max_length=min(wanted, limit),
            concurrency=batch_size,
            temperature=temperature,
            engine_args=engine_args,
        )
        return ServerSession(ServingSession(serving), temperature)

    return open_server
