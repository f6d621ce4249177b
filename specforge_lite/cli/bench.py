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

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info
from specforge_lite.core.provenance import collect_provenance
from specforge_lite.core.sections import DRAFT_FLAGS, Dtype, EngineFlags, TargetPathSection
from specforge_lite.core.settings import Section, parse_config

if TYPE_CHECKING:
    from specforge_lite.serving.session import ServingOptions

DEFAULT_BENCHMARKS = ("mtbench:80", "gsm8k:200", "humaneval:200", "math500:200")


class EngineSection(TargetPathSection, EngineFlags):
    """The target, its draft and the engine that runs them."""

    draft_model_path: str | None = Field(None, description="exported draft", json_schema_extra=DRAFT_FLAGS)
    backend: Literal["auto", "sglang", "vllm", "hf"] = Field(
        "auto",
        description="auto: sglang where installed, else vllm, else hf",
        json_schema_extra={"flags": ["--engine"]},
    )
    port: int | None = Field(None, ge=1, le=65535, description="of the server, on loopback; default: a free one")
    target_dtype: Dtype = Field("auto", description="auto: as stored", json_schema_extra={"flags": ["--dtype"]})
    startup_minutes: float = Field(20.0, gt=0, description="how long a server may take to start")


class WorkSection(Section):
    """What is asked, and how often at a time."""

    config_list: tuple[str, ...] = Field(("1,3,1,4",), description="B,STEPS,TOPK,VERIFY; STEPS 0: no draft")
    benchmark_list: tuple[str, ...] = Field(
        DEFAULT_BENCHMARKS,
        description="mtbench, gsm8k, humaneval, math500, mbpp, aime, livecodebench, alpaca, or a file of prompts (with"
        " `category`, if you like); NAME:COUNT",
    )
    data_dir: Path | None = Field(None, description="local copies of the benchmarks' files")
    from_hub: bool = Field(False, description="fetch benchmarks through `datasets` rather than from the package")
    num_shots: int = Field(0, ge=0, le=5, description="worked examples before each gsm8k question")
    max_new_tokens: int = Field(1024, ge=1, json_schema_extra={"flags": ["--max-tokens"]})
    temperature: float = Field(0.0, ge=0)
    system_prompt: str | None = Field(None, description="added to prompts that have none")
    chat_template_kwargs: str | None = Field(None, description='JSON for the template: {"enable_thinking": false}')
    raw_prompts: bool = Field(False, description="no chat template (base models)")
    seed: int = Field(0, description="of sampling with --backend hf")
    output: Path = Field(Path("outputs/speedup/results.jsonl"), description="JSON lines")


class BenchmarkConfig(Section):
    """Speed-up of a draft on benchmark prompts."""

    engine: EngineSection
    work: WorkSection = WorkSection()


def main() -> None:
    config = parse_config(BenchmarkConfig, description=__doc__ or "")
    from specforge_lite.benchmark.configs import BenchConfig, check_backend
    from specforge_lite.benchmark.engines import check_options, exported_draft, session_opener
    from specforge_lite.benchmark.present import print_table
    from specforge_lite.benchmark.prompts import BenchmarkRequest, load_prompts
    from specforge_lite.benchmark.rows import ResultFile
    from specforge_lite.benchmark.run import Workload, run_benchmark
    from specforge_lite.core.hub import load_config
    from specforge_lite.data.prompts import ChatEncoder
    from specforge_lite.report import write_report
    from specforge_lite.report.speedup import save_chart

    configs = [BenchConfig.parse(text) for text in config.work.config_list]
    requests = [BenchmarkRequest.parse(text) for text in config.work.benchmark_list]
    options = _serving_options(config)
    check_backend(configs, options.backend)
    check_options(options, any(not c.speculation.is_baseline for c in configs))

    chat = ChatEncoder.of_model(
        options.model_path,
        options.trust_remote_code,
        template_kwargs=_template_kwargs(config.work.chat_template_kwargs),
        system_prompt=config.work.system_prompt,
        raw=config.work.raw_prompts,
        raw_flag="--raw-prompts",
    )
    work = config.work
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
    print_table(rows, dtype.removeprefix("torch."), greedy=work.temperature == 0)
    found = [row.to_dict() for row in rows]
    save_chart(found, work.output.with_suffix(".png"))
    page = write_report(
        work.output.with_suffix(".html"),
        title=f"Speed-up on {options.backend}: {Path(options.model_path).name}",
        speedup_rows=found,
        provenance=collect_provenance(config.model_dump(mode="json")),
    )
    info(f"wrote {work.output}, {work.output.with_suffix('.png').name}, {page.name}")


def _serving_options(config: BenchmarkConfig) -> ServingOptions:
    from specforge_lite.benchmark.engines import choose_backend, resolve_draft
    from specforge_lite.serving.session import ServingOptions

    engine = config.engine
    return ServingOptions(
        backend=choose_backend(engine.backend),
        model_path=engine.target_model_path,
        draft_path=resolve_draft(engine.draft_model_path),
        dtype=engine.target_dtype,
        tp_size=engine.tp_size,
        port=engine.port,
        mem_frac=engine.mem_frac,
        engine_python=engine.engine_python,
        engine_args=engine.engine_arg,
        engine_devices=engine.engine_devices,
        startup_minutes=engine.startup_minutes,
        trust_remote_code=engine.trust_remote_code,
        log_dir=config.work.output.parent / "logs",
    )


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
    from specforge_lite.model.block_config import block_kind_of

    engine, work = config.engine, config.work
    file = Path(options.draft_path or "") / "config.json"
    kind = block_kind_of(read_config(file)) if file.is_file() else None
    return {
        **({} if kind is None else {"draft_kind": kind}),
        "backend": options.backend,
        "model_path": options.model_path,
        "draft": fingerprint(options.draft_path),
        "dtype": options.dtype,
        "tp_size": options.tp_size,
        "engine_arg": list(engine.engine_arg),
        "temperature": work.temperature,
        "max_new_tokens": work.max_new_tokens,
        "system_prompt": work.system_prompt,
        "chat_template_kwargs": _template_kwargs(work.chat_template_kwargs),
        "raw_prompts": work.raw_prompts,
        "num_shots": work.num_shots,
        "seed": work.seed,
    }
