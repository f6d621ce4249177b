"""Speed-up of a draft on benchmark prompts, in a real engine, the way users will see it.

    python benchmarks/bench_model_speedup.py --model-path TARGET --speculative-draft-model-path DRAFT \\
        --backend sglang --config-list 1,3,1,4 4,3,1,4 4,7,10,60 --benchmark-list mtbench:80 gsm8k:200

A configuration is B,STEPS,TOPK,VERIFY: requests in flight, draft steps, candidates per step, tokens verified at once
(the root included); STEPS 0 is no draft. The run without a draft is made once per batch size, asked for or not.

Writes --output (JSON lines, one per benchmark and configuration), a table, and beside it a bar chart as .png and a page
as .html. Started again with the same --output it skips what is finished. scripts/plan_speculation.py reads the rows.

The one statistic: acceptance length = completion tokens / verification passes, over all requests
(specforge_lite/benchmark/statistics.py defines all others).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from specforge_lite.cli.options import serving_options
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info
from specforge_lite.core.provenance import collect_provenance
from specforge_lite.core.sections import DRAFT_FLAGS, Dtype, EngineFlags, TargetPathSection
from specforge_lite.core.settings import Section, flag, parse_config

if TYPE_CHECKING:
    from specforge_lite.serving.session import ServingOptions

DEFAULT_BENCHMARKS = ("mtbench:80", "gsm8k:200", "humaneval:200", "math500:200")


class EngineSection(TargetPathSection, EngineFlags):
    """The target, its draft and the engine that runs them."""

    draft_model_path: str | None = Field(None, description="exported draft", json_schema_extra=DRAFT_FLAGS)
    backend: Literal["auto", "sglang", "vllm", "hf"] = flag(
        "auto", "auto: sglang where installed, else vllm, else hf", "--engine"
    )
    port: int | None = flag(None, "of the server, on loopback; default: a free one", ge=1, le=65535)
    target_dtype: Dtype = flag("auto", "auto: as stored", "--dtype")
    startup_minutes: float = flag(20.0, "how long a server may take to start", gt=0)


class WorkSection(Section):
    """What is asked, and how often at a time."""

    config_list: tuple[str, ...] = flag(("1,3,1,4",), "B,STEPS,TOPK,VERIFY; STEPS 0: no draft")
    benchmark_list: tuple[str, ...] = flag(
        DEFAULT_BENCHMARKS,
        "mtbench, gsm8k, humaneval, math500, mbpp, aime, livecodebench, alpaca, or a file of prompts (with"
        " `category`, if you like); NAME:COUNT",
    )
    data_dir: Path | None = flag(None, "local copies of the benchmarks' files")
    from_hub: bool = flag(False, "fetch benchmarks through `datasets` rather than from the package")
    num_shots: int = flag(0, "worked examples before each gsm8k question", ge=0, le=5)
    max_new_tokens: int = Field(1024, ge=1, json_schema_extra={"flags": ["--max-tokens"]})
    temperature: float = Field(0.0, ge=0)
    system_prompt: str | None = flag(None, "added to prompts that have none")
    chat_template_kwargs: str | None = flag(None, 'JSON for the template: {"enable_thinking": false}')
    raw_prompts: bool = flag(False, "no chat template (base models)")
    seed: int = flag(0, "of sampling with --backend hf")
    output: Path = flag(Path("outputs/speedup/results.jsonl"), "JSON lines")


class BenchmarkConfig(Section):
    """Speed-up of a draft on benchmark prompts."""

    engine: EngineSection
    work: WorkSection = WorkSection()


def main() -> None:
    config = parse_config(BenchmarkConfig, description=__doc__ or "")
    from specforge_lite.benchmark.configs import BenchConfig, check_backend
    from specforge_lite.benchmark.engines import (
        check_options,
        choose_backend,
        exported_draft,
        resolve_draft,
        session_opener,
    )
    from specforge_lite.benchmark.prompts import BenchmarkRequest, load_prompts
    from specforge_lite.benchmark.rows import ResultFile
    from specforge_lite.benchmark.run import Workload, run_benchmark
    from specforge_lite.core.hub import load_config
    from specforge_lite.data.prompts import ChatEncoder
    from specforge_lite.report import write_report
    from specforge_lite.report.speedup import print_speedup, save_chart

    engine, work = config.engine, config.work
    configs = [BenchConfig.parse(text) for text in work.config_list]
    requests = [BenchmarkRequest.parse(text) for text in work.benchmark_list]
    options = serving_options(
        choose_backend(engine.backend),
        engine,
        resolve_draft(engine.draft_model_path),
        port=engine.port,
        startup_minutes=engine.startup_minutes,
        log_dir=work.output.parent / "logs",
    )
    check_backend(configs, options.backend)
    check_options(options, any(not c.speculation.is_baseline for c in configs))

    chat = ChatEncoder.of_model(
        options.model_path,
        options.trust_remote_code,
        template_kwargs=_template_kwargs(work.chat_template_kwargs),
        system_prompt=work.system_prompt,
        raw=work.raw_prompts,
        raw_flag="--raw-prompts",
    )
    prompts = {r.label: load_prompts(r, work.data_dir, work.num_shots, work.from_hub) for r in requests}
    if len(prompts) < len(requests):
        raise ConfigError("benchmark_list: two entries have the same name")
    results = ResultFile(work.output, _settings_of(config, options))
    longest = max(chat.longest(some, work.max_new_tokens) for some in prompts.values())
    with exported_draft(options) as served:
        rows = run_benchmark(
            configs,
            Workload(prompts, chat, work.max_new_tokens, greedy=work.temperature == 0),
            results,
            session_opener(served, longest, work.temperature, work.seed),
        )

    dtype = options.dtype
    if dtype == "auto":  # as stored
        dtype = str(load_config(options.model_path, options.trust_remote_code).dtype or "float32")
    found = [row.to_dict() for row in rows]
    print_speedup(found, dtype.removeprefix("torch."), greedy=work.temperature == 0)
    save_chart(found, work.output.with_suffix(".png"))
    page = write_report(
        work.output.with_suffix(".html"),
        title=f"Speed-up on {options.backend}: {Path(options.model_path).name}",
        speedup_rows=found,
        provenance=collect_provenance(config.model_dump(mode="json")),
    )
    info(f"wrote {work.output}, {work.output.with_suffix('.png').name}, {page.name}")


def _template_kwargs(text: str | None) -> dict[str, Any]:
    """--chat-template-kwargs as a mapping."""
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f"chat_template_kwargs: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"chat_template_kwargs: expected a JSON object, found {type(value).__name__}")
    return value


def _settings_of(config: BenchmarkConfig, options: ServingOptions) -> dict[str, Any]:
    """What rows of one file must share."""
    from specforge_lite.benchmark.rows import fingerprint
    from specforge_lite.checkpoints.training_run import read_config
    from specforge_lite.model.config_json import block_kind_of

    work = config.work
    names = {"temperature", "max_new_tokens", "system_prompt", "raw_prompts", "num_shots", "seed"}
    file = Path(options.draft_path or "") / "config.json"
    kind = block_kind_of(read_config(file)) if file.is_file() else None
    return {
        **({} if kind is None else {"draft_kind": kind}),
        "backend": options.backend,
        "model_path": options.model_path,
        "draft": fingerprint(options.draft_path),
        "dtype": options.dtype,
        "tp_size": options.tp_size,
        "engine_arg": list(options.engine_args),
        "chat_template_kwargs": _template_kwargs(work.chat_template_kwargs),
        **work.model_dump(include=names),
    }
