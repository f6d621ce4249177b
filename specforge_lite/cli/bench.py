"""Speed-up of a draft on benchmark prompts, in a real engine, the way users will see it.

    python benchmarks/bench_model_speedup.py --model-path TARGET --speculative-draft-model-path DRAFT \\
        --backend sglang --config-list 1,3,1,4 4,3,1,4 4,7,10,60 --benchmark-list mtbench:80 gsm8k:200

A configuration is B,STEPS,TOPK,VERIFY: requests in flight, draft steps, candidates per step, tokens verified at once
(the root included); STEPS 0 is no draft. The run without a draft is made once per batch size, asked for or not.
Above temperature 0 chains are measured twice: drafted greedily, as engines do by default, and sampled.

Writes --output (JSON lines, one per benchmark and configuration), a table, and beside it a bar chart as .png and a page
as .html. Started again with the same --output it skips what is finished. scripts/plan_speculation.py reads the rows.

The one statistic: acceptance length = completion tokens / verification passes, over all requests
(specforge_lite/benchmark/statistics.py defines all others).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from specforge_lite.cli.options import serving_options
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import write_atomically
from specforge_lite.core.log import info
from specforge_lite.core.provenance import collect_provenance
from specforge_lite.core.sections import DRAFT_FLAGS, Dtype, EngineFlags, TargetPathSection
from specforge_lite.core.settings import Section, flag, parse_config

if TYPE_CHECKING:
    from specforge_lite.benchmark.choice import Candidate, Point
    from specforge_lite.benchmark.configs import BenchConfig
    from specforge_lite.benchmark.engines import ServedDraft
    from specforge_lite.benchmark.rows import SpeedupRow
    from specforge_lite.serving.session import ServingOptions

DEFAULT_BENCHMARKS = ("mtbench:80", "gsm8k:200", "humaneval:200", "math500:200")
ACCEPTANCE_HELP = """\
Serve drafts or checkpoints of a run and choose the best for a workload: acceptance and speed in the engine itself.

    python scripts/serve_acceptance.py outputs/run --model-path TARGET --backend vllm \\
        --concurrency 1 8 32 --temperature 0 0.7 1 --steps 2 3 5 7 --workload 8/0.7

DRAFTS are exported drafts, checkpoints step_N, or runs (all their checkpoints). Each is served with every number of
drafted tokens, with greedy and with sampled drafting above temperature 0, and held against the same server without a
draft. A workload is CONCURRENCY/TEMPERATURE, or several with shares of the generated tokens: 1/0:1 8/0.7:3.

Writes rows as bench_model_speedup.py does, a page with the ranking, and launch.sh: the engine's command for the best.
Started again with the same --output it skips what is finished.
"""


class EngineSection(TargetPathSection, EngineFlags):
    """The target and the engine that runs it."""

    backend: Literal["auto", "sglang", "vllm", "hf"] = flag(
        "auto", "auto: sglang where installed, else vllm, else hf", "--engine"
    )
    port: int | None = flag(None, "of the server, on loopback; default: a free one", ge=1, le=65535)
    target_dtype: Dtype = flag("auto", "auto: as stored", "--dtype")
    startup_minutes: float = flag(20.0, "how long a server may take to start", gt=0)


class DraftedEngineSection(EngineSection):
    """The target, its draft and the engine that runs them."""

    draft_model_path: str | None = Field(None, description="exported draft", json_schema_extra=DRAFT_FLAGS)


class PromptSection(Section):
    """What is asked."""

    benchmark_list: tuple[str, ...] = flag(
        DEFAULT_BENCHMARKS,
        "mtbench, gsm8k, humaneval, math500, mbpp, aime, livecodebench, alpaca, or a file of prompts (with"
        " `category`, if you like); NAME:COUNT",
    )
    data_dir: Path | None = flag(None, "local copies of the benchmarks' files")
    from_hub: bool = flag(False, "fetch benchmarks through `datasets` rather than from the package")
    num_shots: int = flag(0, "worked examples before each gsm8k question", ge=0, le=5)
    max_new_tokens: int = Field(1024, ge=1, json_schema_extra={"flags": ["--max-tokens"]})
    temperature: tuple[Annotated[float, Field(ge=0)], ...] = flag((0.0,), "one or more", min_length=1)
    draft_sampling: tuple[Literal["greedy", "sampled"], ...] = flag(
        ("greedy", "sampled"), "above temperature 0: the draft's most probable tokens, or drawn from it", min_length=1
    )
    system_prompt: str | None = flag(None, "added to prompts that have none")
    chat_template_kwargs: str | None = flag(None, 'JSON for the template: {"enable_thinking": false}')
    raw_prompts: bool = flag(False, "no chat template (base models)")
    seed: int = flag(0, "of sampling with --backend hf")
    output: Path = flag(Path("outputs/speedup/results.jsonl"), "JSON lines")


class WorkSection(PromptSection):
    """What is asked, and how often at a time."""

    config_list: tuple[str, ...] = flag(("1,3,1,4",), "B,STEPS,TOPK,VERIFY; STEPS 0: no draft")


class BenchmarkConfig(Section):
    """Speed-up of a draft on benchmark prompts."""

    engine: DraftedEngineSection
    work: WorkSection = WorkSection()


class DraftsSection(PromptSection):
    """The drafts, how they are served, and for what one is chosen."""

    drafts: tuple[str, ...] = flag(..., "exported drafts, checkpoints step_N, or runs (all checkpoints)", min_length=1)
    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = flag((1, 8, 32), "requests in flight", min_length=1)
    temperature: tuple[Annotated[float, Field(ge=0)], ...] = flag((0.0, 0.7, 1.0), "one or more", min_length=1)
    steps: tuple[Annotated[int, Field(ge=1)], ...] = flag(
        (2, 3, 5, 7), "drafted tokens of a pass; a block draft has its own", min_length=1
    )
    workload: tuple[str, ...] = flag((), "CONCURRENCY/TEMPERATURE:WEIGHT; default: all that is measured, equal shares")
    benchmark_list: tuple[str, ...] = flag(("mtbench:40",), "as in bench_model_speedup.py")
    max_new_tokens: int = Field(256, ge=1, json_schema_extra={"flags": ["--max-tokens"]})
    output: Path = flag(Path("outputs/acceptance/results.jsonl"), "JSON lines")


class AcceptanceConfig(Section):
    """Serve drafts and choose the best for a workload."""

    engine: EngineSection
    work: DraftsSection


def main() -> None:
    config = parse_config(BenchmarkConfig, description=__doc__ or "")
    from specforge_lite.benchmark.configs import BenchConfig

    engine, work = config.engine, config.work
    configs = [BenchConfig.parse(text) for text in work.config_list]
    options = options_of(engine, work)
    drafted = any(not each.speculation.is_baseline for each in configs)
    if drafted and engine.draft_model_path is None:
        raise ConfigError("config_list: drafting needs --speculative-draft-model-path (STEPS 0 does without)")
    paths = [engine.draft_model_path] if drafted and engine.draft_model_path else []
    rows, _ = _measure(options, work, paths, lambda _: configs)
    _report(config, work, options, rows)


def acceptance() -> None:
    config = parse_config(AcceptanceConfig, description=ACCEPTANCE_HELP, positional="--drafts")
    from specforge_lite.benchmark.choice import rank
    from specforge_lite.checkpoints.training_run import checkpoints
    from specforge_lite.evaluation.checkpoints import find_checkpoints
    from specforge_lite.report.speedup import ranking_table
    from specforge_lite.report.tables import print_table

    work, options = config.work, options_of(config.engine, config.work)
    points = workload_of(work)
    paths: list[str | Path] = []
    for draft in work.drafts:
        paths += [found.path for found in find_checkpoints(Path(draft))] if checkpoints(Path(draft)) else [draft]
    rows, drafts = measure_served(options, work, paths)
    ranking = rank(rows, points)
    _report(config, work, options, rows, ranking)
    print_table(ranking_table(ranking, points))
    _launch(ranking[0], drafts, points, options, work.output.parent)


def workload_of(work: DraftsSection) -> list[Point]:
    """The points to choose for. Raises ConfigError for one that is not measured."""
    from specforge_lite.benchmark.choice import Point

    points = [Point.parse(text) for text in work.workload]
    for point in points:
        if point.batch_size not in work.concurrency or point.temperature not in work.temperature:
            measured = f"--concurrency {_joined(work.concurrency)} --temperature {_joined(work.temperature)}"
            raise ConfigError(f"workload: '{point}' is not measured; expected one of {measured}")
    return points or [Point(size, t) for size in work.concurrency for t in work.temperature]


def measure_served(
    options: ServingOptions, work: DraftsSection, paths: Sequence[str | Path]
) -> tuple[list[SpeedupRow], list[ServedDraft]]:
    """Rows of all drafts, with every concurrency, temperature, number of steps and way of drafting."""
    from specforge_lite.benchmark.configs import BenchConfig, Speculation
    from specforge_lite.serving.engine import block_length

    def configs(draft: ServedDraft) -> list[BenchConfig]:
        own = block_length(draft.config)
        chains = [Speculation(steps, 1, steps + 1) for steps in ([own] if own else work.steps)]
        return [BenchConfig(size, chain) for size in work.concurrency for chain in chains]

    return _measure(options, work, paths, configs)


def _joined(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def options_of(engine: EngineSection, work: PromptSection) -> ServingOptions:
    """Options of the servers; `auto` is resolved."""
    from specforge_lite.benchmark.engines import choose_backend

    return serving_options(
        choose_backend(engine.backend),
        engine,
        None,
        port=engine.port,
        startup_minutes=engine.startup_minutes,
        log_dir=work.output.parent / "logs",
    )


def _measure(
    options: ServingOptions,
    work: PromptSection,
    paths: Sequence[str | Path],
    configs: Callable[[Any], list[BenchConfig]],
) -> tuple[list[SpeedupRow], list[ServedDraft]]:
    """Check everything, then measure. configs: of a draft; of None where there are no `paths`."""
    from specforge_lite.benchmark.configs import spread
    from specforge_lite.benchmark.engines import check_options, configs_of, measure_drafts, read_drafts
    from specforge_lite.benchmark.prompts import BenchmarkRequest, load_prompts
    from specforge_lite.benchmark.rows import ResultFile
    from specforge_lite.benchmark.run import Workload
    from specforge_lite.data.prompts import ChatEncoder

    requests = [BenchmarkRequest.parse(text) for text in work.benchmark_list]
    temperatures = list(dict.fromkeys(work.temperature))
    check_options(options, temperatures, bool(paths))
    chat = ChatEncoder.of_model(
        options.model_path,
        options.trust_remote_code,
        template_kwargs=_template_kwargs(work.chat_template_kwargs),
        system_prompt=work.system_prompt,
        raw=work.raw_prompts,
        raw_flag="--raw-prompts",
    )
    drafts = read_drafts(paths, options)
    modes = list(dict.fromkeys(work.draft_sampling))
    plans = [(draft, configs_of(draft, configs(draft), temperatures, modes, options)) for draft in drafts]
    prompts = {r.label: load_prompts(r, work.data_dir, work.num_shots, work.from_hub) for r in requests}
    if len(prompts) < len(requests):
        raise ConfigError("benchmark_list: two entries have the same name")
    results = ResultFile(work.output, _settings_of(work, options))
    workload = Workload(prompts, chat, work.max_new_tokens)
    return measure_drafts(
        plans or [(None, spread(configs(None), temperatures))], workload, results, options, work.seed
    ), drafts


def _report(
    config: BenchmarkConfig | AcceptanceConfig,
    work: PromptSection,
    options: ServingOptions,
    rows: Sequence[SpeedupRow],
    ranking: Sequence[Candidate] = (),
) -> None:
    """Table, chart and page."""
    from specforge_lite.core.hub import load_config
    from specforge_lite.report import write_report
    from specforge_lite.report.speedup import print_speedup, save_chart

    dtype = options.dtype
    if dtype == "auto":  # as stored
        dtype = str(load_config(options.model_path, options.trust_remote_code).dtype or "float32")
    found = [row.to_dict() for row in rows]
    print_speedup(found, dtype.removeprefix("torch."))
    save_chart(found, work.output.with_suffix(".png"))
    page = write_report(
        work.output.with_suffix(".html"),
        title=f"Speed-up on {options.backend}: {Path(options.model_path).name}",
        speedup_rows=found,
        ranking=ranking,
        provenance=collect_provenance(config.model_dump(mode="json")),
    )
    info(f"wrote {work.output}, {work.output.with_suffix('.png').name}, {page.name}")


def _launch(
    best: Candidate, drafts: Sequence[ServedDraft], points: Sequence[Point], options: ServingOptions, folder: Path
) -> None:
    """Say what is best, and write launch.sh with the engine's command (a checkpoint is exported beside it)."""
    from dataclasses import replace

    from specforge_lite.benchmark.engines import export_dtype, shaped
    from specforge_lite.capture.base import num_positions
    from specforge_lite.checkpoints.export import export_checkpoint
    from specforge_lite.checkpoints.training_run import TRAINING_CONFIG
    from specforge_lite.core.hub import load_config
    from specforge_lite.serving.launch import launch_script

    spec, place = best.speculation, " ".join(f"{point}:{point.weight:g}" for point in points)
    draft = next((found.path for found in drafts if found.facts == best.draft), None)
    what = "no draft" if draft is None else f"{best.draft.name}, {spec.steps} drafted tokens"
    what += ", sampled" if spec.draft_sampling == "sampled" else ""
    info(f"best for {place}: {what}: {best.tokens_per_second:.1f} tokens/s, speed-up {best.speedup:.2f}")
    if options.backend == "hf":
        info("an engine's command is written by --backend sglang and vllm")
        return
    if draft is not None and (Path(draft) / TRAINING_CONFIG).exists():
        draft = str(export_checkpoint(draft, folder / "best_draft", dtype=export_dtype(options), overwrite=True))
    limit = num_positions(load_config(options.model_path, options.trust_remote_code))
    size = max(point.batch_size for point in points)
    model = str(Path(options.model_path).resolve()) if Path(options.model_path).is_dir() else options.model_path
    serving = replace(shaped(options, draft, spec), model_path=model, port=options.port or 30000, concurrency=size)
    write_atomically(folder / "launch.sh", launch_script(replace(serving, max_length=limit or serving.max_length)))
    info(f"wrote {folder / 'launch.sh'}: sh {folder / 'launch.sh'}")


def _template_kwargs(text: str | None) -> dict[str, Any]:
    """--chat-template-kwargs as a mapping."""
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f"chat_template_kwargs: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"chat_template_kwargs: expected a JSON object, found {type(value).__name__}")
    return value


def _settings_of(work: PromptSection, options: ServingOptions) -> dict[str, Any]:
    """What rows of one file must share."""
    names = {"max_new_tokens", "system_prompt", "raw_prompts", "num_shots", "seed"}
    return {
        "backend": options.backend,
        "model_path": options.model_path,
        "dtype": options.dtype,
        "tp_size": options.tp_size,
        "engine_arg": list(options.engine_args),
        "chat_template_kwargs": _template_kwargs(work.chat_template_kwargs),
        **work.model_dump(include=names),
    }
