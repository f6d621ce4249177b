"""Peak memory per rank, term by term, time per step and MFU, and disk for offline mode: before anything starts.

    python scripts/plan_memory.py --draft-model-config configs/llama-3.1-8b-eagle3.json --max-length 4096 \\
        --batch-size 2 --num-gpus 8 --sharding fsdp2 --memory-gb 80
    python scripts/plan_memory.py ... --json
    python scripts/plan_memory.py --tables           # hardware and training time by target size, as markdown

The flags are those of the training script. The weights of an in-process target (--target-in-process) come on top.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import atomic_file, user_errors
from specforge_lite.core.log import format_bytes, info, warn
from specforge_lite.core.settings import Section, parse_config

if TYPE_CHECKING:
    from specforge_lite.benchmark.configs import Speculation
    from specforge_lite.benchmark.planner import Plan, Prediction
    from specforge_lite.training.estimate import MemoryPlan, Workload

GIB = 2**30
SPECULATION_HELP = """\
Recommend STEPS,TOPK,VERIFY for every batch size, with the predicted speed-up, from one benchmark run.

    python benchmarks/bench_model_speedup.py ... --config-list 1,1,1,2 1,5,1,6 1,7,10,60 --output speedup.jsonl
    python scripts/plan_speculation.py --results speedup.jsonl

Measure at least one short and one long chain per batch size (and a tree, if trees are wanted). The formulas are in
specforge_lite/benchmark/planner.py.
"""


class PlanMemoryConfig(Section):
    """What the training run would be started with."""

    draft_model_config: Path | None = Field(None, description="config.json of the draft")
    tables: bool = Field(False, description="print the tables of hardware and training time by target size instead")
    target_in_process: bool = Field(False, description="the hf engine: captured states wait on the trainer's GPU")
    flex_attention: bool = Field(False, description="the draft trains with flex_attention: block masks are counted")
    max_length: int = Field(2048, ge=8, description="tokens of the longest sample")
    batch_size: int = Field(1, ge=1, description="samples per micro batch and rank")
    max_tokens_per_batch: int | None = Field(None, ge=8, description="packing budget, instead of --batch-size")
    num_gpus: int = Field(1, ge=1, description="ranks of the trainer")
    ttt_length: int = Field(7, ge=1, le=32, description="K, steps of the training-time test")
    num_anchors: int = Field(512, ge=1, description="dspark, dflash: blocks of a sample and step")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="compute dtype")
    sharding: Literal["ddp", "fsdp2"] = Field("ddp", description="as in training")
    cpu_offload: bool = Field(False, description="with fsdp2: parameters and AdamW state in CPU memory")
    sp_size: int = Field(1, ge=1, description="ranks that share a batch")
    optim: Literal["adamw", "adamw_8bit"] = Field("adamw", description="as in training")
    activation_checkpointing: bool = Field(False, description="as in training")
    supervised_share: float = Field(1.0, gt=0, le=1, description="share of supervised tokens (default: the worst case)")
    device: Literal["cuda", "cpu"] = Field("cuda", description="where the draft trains")
    prefetch_depth: int = Field(2, ge=0, description="micro batches of hidden states captured ahead")
    states_dtype: Literal["bf16", "fp32"] = Field("bf16", description="of captured hidden states")
    tied_head: bool = Field(False, description="the target's head is its embedding table")
    num_tokens: int | None = Field(None, ge=1, description="tokens of the data set, for the disk of offline mode")
    memory_gb: float | None = Field(None, gt=0, description="memory of one device in GiB; more than it has is an error")
    peak_tflops: float | None = Field(
        None, gt=0, description="of one device (default: 989, Hopper in bf16; one CPU core: 0.13)"
    )
    as_json: bool = Field(False, description="print JSON", json_schema_extra={"flags": ["--json"]})


def memory() -> None:
    config = parse_config(PlanMemoryConfig, description=__doc__ or "")
    from specforge_lite.training.estimate import plan_memory

    if config.tables:
        print(hardware_tables())
        return
    if config.draft_model_config is None:
        raise ConfigError("draft_model_config: required (flag --draft-model-config), unless --tables is given")
    load = _workload_of(config)
    plan = plan_memory(load)
    report = _report_of(config, load, plan)
    if config.as_json:
        print(json.dumps(report, indent=1))
    else:
        _show_memory(plan, report)
    if config.memory_gb is not None and plan.peak > config.memory_gb * GIB:
        raise ConfigError(
            f"memory_gb {config.memory_gb:g}: the peak is {plan.peak / GIB:.1f} GiB; try --activation-checkpointing,"
            " --sharding fsdp2, a smaller batch, --sp-size or --optim adamw_8bit"
        )


def _workload_of(config: PlanMemoryConfig) -> Workload:
    """The planner's view of the flags."""
    from specforge_lite.training.estimate import Workload
    from specforge_lite.training.wiring import read_draft_config

    draft = read_draft_config(cast(Path, config.draft_model_config), None)
    if draft.algorithm == "eagle1":
        raise ConfigError(f"{config.draft_model_config}: an EAGLE-1 draft; the plan knows eagle3, dspark and dflash")
    return Workload(
        draft=draft,
        tokens=config.max_tokens_per_batch or config.batch_size * config.max_length,
        num_steps=config.ttt_length,
        num_anchors=config.num_anchors,
        precision=config.precision,
        device=config.device,
        supervised=config.supervised_share,
        world_size=config.num_gpus,
        sp_size=config.sp_size,
        sharding=config.sharding,
        cpu_offload=config.cpu_offload,
        optim=config.optim,
        activation_checkpointing=config.activation_checkpointing,
        captured_ahead=config.prefetch_depth,
        states_bytes=4 if config.states_dtype == "fp32" else 2,
        tied_head=config.tied_head,
        sample_length=config.max_length,
        target_in_process=config.target_in_process,
        flex=config.flex_attention,
    )


def _report_of(config: PlanMemoryConfig, load: Workload, plan: MemoryPlan) -> dict[str, Any]:
    """JSON: bytes by term, the peak, and the rest."""
    from specforge_lite.training.estimate import disk_bytes, num_parameters, step_time, tokens_per_second

    time = step_time(load, config.peak_tflops)
    return {
        "parameters": num_parameters(load.draft),
        "peak_bytes": plan.peak,
        "peak_moment": plan.peak_moment,
        "terms": plan.peak_terms,
        "host_terms": plan.host,
        "tokens_per_second": tokens_per_second(load, config.peak_tflops),
        "step_seconds": time.seconds,
        "step_parts": {name: getattr(time, name) for name in ("products", "passes", "update", "reduce")},
        "mfu": time.mfu,
        "offline_bytes_per_token": disk_bytes(load, 1),
        "offline_bytes": None if config.num_tokens is None else disk_bytes(load, config.num_tokens),
    }


def _show_memory(plan: MemoryPlan, report: dict[str, Any]) -> None:
    """Terms, largest first; then one line each for speed and disk."""
    table = Table(caption=f"one rank at its peak: {plan.peak_moment}")
    table.add_column("term")
    table.add_column("memory", justify="right")
    table.add_column("share", justify="right")
    for name, size in sorted(plan.peak_terms.items(), key=lambda item: -item[1]):
        if size >= 0.001 * plan.peak:
            table.add_row(name, format_bytes(size), f"{size / plan.peak:.1%}")
    table.add_section()
    table.add_row("peak", format_bytes(plan.peak), "")
    for name, size in plan.host.items():
        table.add_row(f"host: {name}", format_bytes(size), "")
    Console(width=max(Console().width, 80)).print(table)
    info(f"{report['parameters']:,} trained parameters; speed class {report['tokens_per_second']:,.0f} tokens/s in all")
    info(f"predicted: {report['step_seconds']:.3g} s per micro batch, MFU {report['mfu']:.0%} (a model, not measured)")
    per_token = format_bytes(report["offline_bytes_per_token"])
    total = report["offline_bytes"]
    info(f"offline mode: {per_token} per token" + ("" if total is None else f", {format_bytes(total)} in all"))


# Target: name, draft's (hidden, feed-forward, heads, kv heads, head width, vocabulary), billions of parameters in all
# and per token.
TARGET_SIZES = (
    ("1B", (2048, 8192, 32, 8, 64, 128256), 1.2, 1.2),
    ("8B", (4096, 14336, 32, 8, 128, 128256), 8.0, 8.0),
    ("14B", (5120, 17408, 40, 8, 128, 151936), 14.8, 14.8),
    ("30B-A3B", (2048, 6144, 32, 4, 128, 151936), 30.5, 3.3),
    ("32B", (5120, 25600, 64, 8, 128, 151936), 32.8, 32.8),
    ("70B", (8192, 28672, 64, 8, 128, 128256), 70.6, 70.6),
)
TABLE_SAMPLES, TABLE_TOKENS, TABLE_EPOCHS = 100_000, 1500, 4


def hardware_tables() -> str:
    """Markdown: what each target size needs, and how long it trains, all computed from the cost model."""
    from specforge_lite.model.draft import DraftConfig
    from specforge_lite.training.estimate import MACHINES, Workload, disk_bytes, num_parameters, plan_memory, step_time

    peak, share, _, _ = MACHINES["cuda"]
    tokens = TABLE_SAMPLES * TABLE_TOKENS
    needs = [
        "| target | draft | trainer, GPU peak | target, bf16 weights | host RAM | disk, offline states |",
        "|" + "---|" * 6,
    ]
    counts = (1, 2, 4, 8, 16)
    times = ["| target | " + " | ".join(f"{n} GPU" for n in counts) + " |", "|" + "---|" * (1 + len(counts))]
    for name, (hidden, inner, heads, kv_heads, width, vocab), total, active in TARGET_SIZES:
        draft = DraftConfig(hidden, inner, heads, kv_heads, vocab, 32000, head_dim=width)
        load = Workload(draft, tokens=4096, sample_length=2048, activation_checkpointing=hidden >= 8192)
        plan = plan_memory(load)
        needs.append(
            f"| {name} | {num_parameters(draft) / 1e9:.2f}B | {plan.peak / GIB:.0f} GB | {2 * total:.0f} GB |"
            f" {(sum(plan.host.values()) + 2e9 * total) / GIB + 8:.0f} GB | {disk_bytes(load, tokens) / 1e12:.1f} TB |"
        )
        train = step_time(load).seconds / load.tokens
        capture = 2 * active * 1e9 / (peak * share * 1e12)
        hours = TABLE_EPOCHS * tokens * (train + capture) / 3600
        cells = []
        for count in counts:
            fits = count * 80 * GIB > 2.2e9 * total + plan.peak
            cells.append(f"{hours / count:.0f} h" if fits and hours / count >= 1 else "< 1 h" if fits else "-")
        times.append(f"| {name} | " + " | ".join(cells) + " |")
    return (
        f"Computed by `specforge-lite plan --tables`, not measured: H100 80 GB, bf16, K 7, micro batches of 2 x 2,048"
        f" tokens, every token supervised. Offline states and times are for {TABLE_SAMPLES:,} samples of"
        f" {TABLE_TOKENS:,} tokens; times for {TABLE_EPOCHS} epochs, target and trainer sharing the GPUs evenly.\n\n"
        + "\n".join(needs) + "\n\n" + "\n".join(times)
    )  # fmt: skip


class PlanConfig(Section):
    """Recommend STEPS,TOPK,VERIFY from one benchmark run."""

    results: Path = Field(description="--output of bench_model_speedup.py")
    benchmark: str | None = Field(None, description="use the rows of this benchmark only (default: of all)")
    candidates: tuple[str, ...] = Field(
        (), description="STEPS,TOPK,VERIFY to choose from (default: all inside what was measured)"
    )
    num_shown: int = Field(5, ge=1, description="configurations shown per batch size")
    output: Path | None = Field(None, description="write all predictions as json")


def speculation() -> None:
    config = parse_config(PlanConfig, description=SPECULATION_HELP)
    from specforge_lite.benchmark.planner import make_plan
    from specforge_lite.benchmark.rows import read_rows

    rows = read_rows(config.results)
    if config.benchmark is not None:
        known = sorted({row.benchmark for row in rows})
        rows = [row for row in rows if row.benchmark == config.benchmark]
        if not rows:
            raise ConfigError(f"benchmark '{config.benchmark}': {config.results} has {', '.join(known) or 'no rows'}")
    if not rows:
        raise DataError(f"{config.results}: no rows")
    plan = make_plan(rows, [_parse_speculation(text) for text in config.candidates] or None)
    for size in plan.predictions:
        measured = {row.key.config.speculation for row in rows if row.batch_size == size and row.steps}
        if len(measured) < 2 and not rows[0].block_kind:
            warn(f"batch size {size}: one configuration with a draft was measured; costs need at least two")
    _show_speculation(plan, config.num_shown, rows[0].block_kind)
    if config.output is not None:
        with user_errors(config.output), atomic_file(config.output) as file:
            json.dump(_to_json(plan), file, indent=2)
        info(f"wrote {config.output}")


def _parse_speculation(text: str) -> Speculation:
    """`3,1,4`; raises ConfigError."""
    from specforge_lite.benchmark.configs import BenchConfig

    try:
        return BenchConfig.parse(f"1,{text}").speculation
    except ConfigError as error:
        raise ConfigError(str(error).replace("config_list: '1,", "candidates: '").replace("B,STEPS", "STEPS")) from None


def _show_speculation(plan: Plan, num_shown: int, block_kind: str | None) -> None:
    table = Table(caption="predicted inside what was measured; measured where the run holds the configuration")
    for name in ("batch", "STEPS,TOPK,VERIFY", "tokens/pass", "ms/pass", "predicted speed-up", "measured"):
        table.add_column(name, justify="right" if name != "batch" else "left")
    for size, predictions in plan.predictions.items():
        for prediction in predictions[:num_shown]:
            table.add_row(str(size), *_cells(prediction))
        table.add_section()
    Console(width=max(Console().width, 100)).print(table)
    for size in plan.predictions:
        info(_recommendation(plan.best(size), block_kind))
        if (verdict := plan.verdict_on_trees(size)) is not None:
            info(f"batch size {size}: {verdict}")


def _cells(prediction: Prediction) -> list[str]:
    return [
        "no draft" if prediction.speculation.is_baseline else str(prediction.speculation),
        f"{prediction.tokens_per_pass:.2f}",
        f"{1000 * prediction.seconds_per_pass:.2f}",
        f"{prediction.speedup:.2f}",
        "-" if prediction.measured_speedup is None else f"{prediction.measured_speedup:.2f}",
    ]


def _recommendation(best: Prediction, block_kind: str | None = None) -> str:
    """One line, with the flags of both engines."""
    spec = best.speculation
    if spec.is_baseline:
        return f"batch size {best.batch_size}: no draft; nothing is predicted to be faster"
    flags = (
        f"--speculative-num-steps {spec.steps} --speculative-eagle-topk {spec.topk}"
        f" --speculative-num-draft-tokens {spec.num_draft_tokens}"
    )
    if block_kind is not None:
        name = "--speculative-dflash-block-size" if block_kind == "dflash" else "--speculative-num-draft-tokens"
        flags = f"--speculative-algorithm {block_kind.upper()} {name} {spec.num_draft_tokens}"
    vllm = f'; vLLM: "num_speculative_tokens": {spec.steps}' if spec.is_chain else ""
    return f"batch size {best.batch_size}: {spec}, predicted speed-up {best.speedup:.2f}; SGLang: {flags}{vllm}"


def _to_json(plan: Plan) -> dict[str, object]:
    return {
        "acceptance": asdict(plan.acceptance),
        "costs": {size: asdict(cost) for size, cost in plan.costs.items()},
        "predictions": {size: [asdict(p) for p in found] for size, found in plan.predictions.items()},
    }
