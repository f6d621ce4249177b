"""From options and drafts to measured rows: what is checked first, and an engine per draft and way of speculation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from specforge_lite.benchmark.configs import BenchConfig, Speculation, spread
from specforge_lite.benchmark.hf import HfSession
from specforge_lite.benchmark.measure import Session
from specforge_lite.benchmark.rows import Drafter, ResultFile, SpeedupRow, fingerprint
from specforge_lite.benchmark.run import OpenSession, Workload, run_benchmark
from specforge_lite.benchmark.server import ServerSession, reserved_tokens
from specforge_lite.capture.base import num_positions
from specforge_lite.checkpoints.contract import check_draft
from specforge_lite.checkpoints.export import DTYPES, export_checkpoint, exported_config
from specforge_lite.checkpoints.loading import find_draft
from specforge_lite.checkpoints.training_run import TRAINING_CONFIG, read_config, verify_checkpoint
from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import info
from specforge_lite.inference.hf_generate import eos_token_ids_of
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.model.config_json import block_kind_of, config_from_file
from specforge_lite.serving.engine import read_draft_config
from specforge_lite.serving.environment import SERVING_ENGINES, first_installed_engine, has_gpu
from specforge_lite.serving.launch import check_server
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


@dataclass(frozen=True)
class ServedDraft:
    """A draft to measure. config: its config.json, as an engine reads it once it is exported."""

    path: str
    facts: Drafter
    config: dict[str, Any]


def check_options(options: ServingOptions, temperatures: Sequence[float], drafted: bool) -> None:
    """Refuse at once what would fail, or mean something else, after the first engine start. options: of a server, or
    `backend` hf. drafted: some configuration uses a draft."""
    if options.backend != "hf":
        check_server(options, max(temperatures, default=0.0) if drafted else 0.0)
        return
    for name, flag in SERVER_FLAGS.items():
        if getattr(options, name):
            raise ConfigError(f"{flag}: only for --backend sglang or vllm, the backend is hf")
    if options.tp_size != 1:
        raise ConfigError("--tp-size: --backend hf runs on one device")


def read_drafts(paths: Sequence[str | Path], options: ServingOptions) -> list[ServedDraft]:
    """Drafts as exported directories, hub names, checkpoints step_N or runs (the newest checkpoint), checked against
    the target. Raises CheckpointError or ConfigError for the first that would not be served."""
    folders = [find_draft(path) for path in paths]
    parts = range(1, max((len(folder.resolve().parts) for folder in folders), default=0) + 1)
    named = (["/".join(folder.resolve().parts[-count:]) for folder in folders] for count in parts)
    names = next((found for found in named if len(set(found)) == len(found)), None)
    if names is None and folders:
        raise ConfigError(f"drafts: {', '.join(map(str, paths))}: the same draft twice")
    target = load_config(options.model_path, options.trust_remote_code)
    return [_read_draft(folder, name, target, options) for folder, name in zip(folders, names or ())]


def _read_draft(folder: Path, name: str, target: Any, options: ServingOptions) -> ServedDraft:
    if (folder / TRAINING_CONFIG).exists():
        verify_checkpoint(folder)
        shape = config_from_file(folder / TRAINING_CONFIG)
        config, text = exported_config(shape, "bfloat16"), target.get_text_config()
        found = (shape.target_hidden_size, shape.vocab_size)
        if found != (text.hidden_size, text.vocab_size):
            raise CheckpointError(
                f"{folder}: of a target of width {found[0]} with {found[1]} tokens; {options.model_path} has"
                f" {text.hidden_size} and {text.vocab_size}"
            )
    elif options.backend == "hf":  # what it cannot load, it refuses before anything is decoded
        config = read_config(folder / "config.json") if (folder / "config.json").exists() else {}
    else:
        config = read_draft_config(folder)
        for finding in check_draft(folder, target):
            if finding.is_broken:
                raise CheckpointError(f"{folder}: {finding.check}: {finding.message} (scripts/check_draft.py)")
    return ServedDraft(str(folder), Drafter(fingerprint(str(folder)), name, block_kind_of(config)), config)


def configs_of(
    draft: ServedDraft,
    configs: Sequence[BenchConfig],
    temperatures: Sequence[float],
    modes: Sequence[str],
    options: ServingOptions,
) -> list[BenchConfig]:
    """`configs` of a draft at all temperatures, in those of `modes` that the engine can draft in. Raises ConfigError
    for what it does not serve."""
    if options.backend == "hf":
        return spread(configs, temperatures, modes)
    engine, gpu = SERVING_ENGINES[options.backend], has_gpu(options.engine_devices)
    for spec in {config.speculation for config in configs if not config.speculation.is_baseline}:
        engine.speculative_words(shaped(options, draft.path, spec), draft.config, gpu)  # raises for what it cannot
    problem = engine.sampling_problem(draft.config, 1, gpu)
    if problem and any(temperatures):
        if "greedy" not in modes:
            raise ConfigError(f"draft_sampling: {draft.facts.name}: {problem}; expected greedy")
        if "sampled" in modes:
            info(f"{draft.facts.name}: drafted tokens are not sampled: {problem}")
            modes = ("greedy",)
    return spread(configs, temperatures, modes)


def shaped(options: ServingOptions, draft_path: str | None, speculation: Speculation) -> ServingOptions:
    """Options of a server that drafts so; an engine is told to sample drafts by a temperature above 0."""
    return replace(
        options,
        draft_path=None if speculation.is_baseline else draft_path,
        num_steps=speculation.steps,
        topk=max(speculation.topk, 1),
        num_draft_tokens=max(speculation.num_draft_tokens, 1),
        temperature=float(speculation.draft_sampling == "sampled"),
    )


def measure_drafts(
    drafts: Sequence[tuple[ServedDraft | None, list[BenchConfig]]],
    work: Workload,
    results: ResultFile,
    options: ServingOptions,
    seed: int,
) -> list[SpeedupRow]:
    """Measure what `results` does not hold yet, draft by draft, and return all rows asked for, each once. None among
    the drafts: no draft at all."""
    longest = max(work.chat.longest(some, work.max_new_tokens) for some in work.prompts.values())
    rows: dict[Any, SpeedupRow] = {}
    for draft, configs in drafts:
        path = None if draft is None else draft.path
        with session_opener(replace(options, draft_path=path), longest, seed) as opener:
            facts = draft.facts if draft is not None else Drafter()
            rows |= {row.key: row for row in run_benchmark(configs, work, results, opener, facts)}
    return list(rows.values())


@contextmanager
def exported_draft(options: ServingOptions) -> Iterator[ServingOptions]:
    """Options with a draft that servers read: a training checkpoint `step_N` is exported for as long as this lasts."""
    path = options.draft_path
    if path is None or options.backend == "hf" or not (Path(path) / TRAINING_CONFIG).exists():
        yield options
        return
    with TemporaryDirectory(prefix="draft-") as directory:
        folder = export_checkpoint(path, Path(directory) / "draft", dtype=export_dtype(options))
        info(f"draft {path}: a training checkpoint, exported for this run (keep one: scripts/export_draft.py)")
        yield replace(options, draft_path=str(folder))


def export_dtype(options: ServingOptions) -> str:
    """What a checkpoint is exported in for these options."""
    return options.dtype if options.dtype in DTYPES else "bfloat16"


@contextmanager
def session_opener(options: ServingOptions, longest: int, seed: int) -> Iterator[OpenSession]:
    """A function (speculation, largest batch size) -> running session. longest: tokens of prompt and answer that the
    workload may reach; servers are started for that, or for what the model can do if that is less."""
    with ExitStack() as stack:  # what is loaded or exported, when the first session needs it
        served = functools.cache(lambda: stack.enter_context(exported_draft(options)))

        @functools.cache
        def model() -> tuple[SpeculativeModel, list[int]]:
            found = SpeculativeModel.from_pretrained(
                options.model_path, options.draft_path, dtype=options.dtype, trust_remote_code=options.trust_remote_code
            )
            return found, eos_token_ids_of(found.target.model, found.tokenizer)

        def open_session(speculation: Speculation, batch_size: int) -> Session:
            if options.backend == "hf":
                return HfSession(model()[0], speculation, seed, model()[1])
            limit = num_positions(load_config(options.model_path, options.trust_remote_code)) or 1 << 20
            engine_args = options.engine_args
            if options.backend == "vllm":  # else a run would find the prefixes that an earlier one computed
                engine_args = ("no-enable-prefix-caching", *engine_args)
            draft_path = None if speculation.is_baseline else served().draft_path
            wanted = longest + reserved_tokens(speculation.steps, speculation.topk, speculation.num_draft_tokens)
            serving = replace(
                shaped(options, draft_path, speculation),
                max_length=min(wanted, limit),
                concurrency=batch_size,
                engine_args=engine_args,
            )
            return ServerSession(ServingSession(serving))

        yield open_session
