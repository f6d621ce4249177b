"""Peak memory per rank, term by term, time per step and MFU, and disk for offline mode: before anything starts.

    python scripts/plan_memory.py --draft-model-config configs/llama-3.1-8b-eagle3.json --max-length 4096 \\
        --batch-size 2 --num-gpus 8 --sharding fsdp2 --memory-gb 80
    python scripts/plan_memory.py ... --json
    python scripts/plan_memory.py --tables           # hardware and training time by target size, as markdown

The flags are those of the training script. The weights of an in-process target (--target-in-process) come on top.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import user_errors, write_json
from specforge_lite.core.log import format_bytes, info, warn
from specforge_lite.core.settings import Section, flag, parse_config

if TYPE_CHECKING:
    from specforge_lite.benchmark.configs import Speculation
    from specforge_lite.benchmark.planner import Prediction
    from specforge_lite.benchmark.rows import SpeedupRow
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

    draft_model_config: Path | None = flag(None, "config.json of the draft")
    tables: bool = flag(False, "print the tables of hardware and training time by target size instead")
    target_in_process: bool = flag(False, "the hf engine: captured states wait on the trainer's GPU")
    flex_attention: bool = flag(False, "the draft trains with flex_attention: block masks are counted")
    max_length: int = flag(2048, "tokens of the longest sample", ge=8)
    batch_size: int = flag(1, "samples per micro batch and rank", ge=1)
    max_tokens_per_batch: int | None = flag(None, "packing budget, instead of --batch-size", ge=8)
    num_gpus: int = flag(1, "ranks of the trainer", ge=1)
    ttt_length: int = flag(7, "K, steps of the training-time test", ge=1, le=32)
    num_anchors: int = flag(512, "dspark, dflash: blocks of a sample and step", ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = flag("bf16", "compute dtype")
    sharding: Literal["ddp", "fsdp2"] = flag("ddp", "as in training")
    cpu_offload: bool = flag(False, "with fsdp2: parameters and AdamW state in CPU memory")
    sp_size: int = flag(1, "ranks that share a batch", ge=1)
    optim: Literal["adamw", "adamw_8bit"] = flag("adamw", "as in training")
    activation_checkpointing: bool = flag(False, "as in training")
    supervised_share: float = flag(1.0, "share of supervised tokens (default: the worst case)", gt=0, le=1)
    device: Literal["cuda", "cpu"] = flag("cuda", "where the draft trains")
    prefetch_depth: int = flag(2, "micro batches of hidden states captured ahead", ge=0)
    states_dtype: Literal["bf16", "fp32"] = flag("bf16", "of captured hidden states")
    tied_head: bool = flag(False, "the target's head is its embedding table")
    num_tokens: int | None = flag(None, "tokens of the data set, for the disk of offline mode", ge=1)
    memory_gb: float | None = flag(None, "memory of one device in GiB; more than it has is an error", gt=0)
    peak_tflops: float | None = flag(None, "of one device (default: 989, Hopper in bf16; one CPU core: 0.13)", gt=0)
    as_json: bool = flag(False, "print JSON", "--json")


def memory() -> None:
    config = parse_config(PlanMemoryConfig, description=__doc__ or "")
    from specforge_lite.report.tables import memory_table, print_table
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
        print_table(memory_table(plan), 80)
        speed = f"{report['tokens_per_second']:,.0f} tokens/s in all"
        info(f"{report['parameters']:,} trained parameters; speed class {speed}")
        seconds, total = report["step_seconds"], report["offline_bytes"]
        info(f"predicted: {seconds:.3g} s per micro batch, MFU {report['mfu']:.0%} (a model, not measured)")
        in_all = "" if total is None else f", {format_bytes(total)} in all"
        info(f"offline mode: {format_bytes(report['offline_bytes_per_token'])} per token{in_all}")
    if config.memory_gb is not None and plan.peak > config.memory_gb * GIB:
        raise ConfigError(
            f"memory_gb {config.memory_gb:g}: the peak is {plan.peak / GIB:.1f} GiB; try --activation-checkpointing,"
            " --sharding fsdp2, a smaller batch, --sp-size or --optim adamw_8bit"
        )


def _workload_of(config: PlanMemoryConfig) -> Workload:
    """The planner's view of the flags."""
    from specforge_lite.checkpoints.draft_files import read_draft_config
    from specforge_lite.training.estimate import Workload

    draft = read_draft_config(cast(Path, config.draft_model_config), None)
    if draft.algorithm == "eagle1":
        raise ConfigError(f"{config.draft_model_config}: an EAGLE-1 draft; the plan knows eagle3, dspark and dflash")
    same = {"precision", "device", "sp_size", "sharding", "cpu_offload", "optim", "activation_checkpointing"}
    return Workload(
        draft=draft,
        tokens=config.max_tokens_per_batch or config.batch_size * config.max_length,
        num_steps=config.ttt_length,
        num_anchors=config.num_anchors,
        supervised=config.supervised_share,
        world_size=config.num_gpus,
        captured_ahead=config.prefetch_depth,
        states_bytes=4 if config.states_dtype == "fp32" else 2,
        sample_length=config.max_length,
        flex=config.flex_attention,
        **config.model_dump(include={*same, "tied_head", "target_in_process"}),
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
    from specforge_lite.report.tables import Table
    from specforge_lite.training.estimate import MACHINES, Workload, disk_bytes, num_parameters, plan_memory, step_time

    peak, share, _, _ = MACHINES["cuda"]
    tokens = TABLE_SAMPLES * TABLE_TOKENS
    needs: list[list[str]] = []
    times: list[list[str]] = []
    counts = (1, 2, 4, 8, 16)
    for name, (hidden, inner, heads, kv_heads, width, vocab), total, active in TARGET_SIZES:
        draft = DraftConfig(hidden, inner, heads, kv_heads, vocab, 32000, head_dim=width)
        load = Workload(draft, tokens=4096, sample_length=2048, activation_checkpointing=hidden >= 8192)
        plan = plan_memory(load)
        host = (sum(plan.host.values()) + 2e9 * total) / GIB + 8
        memory = (f"{plan.peak / GIB:.0f} GB", f"{2 * total:.0f} GB", f"{host:.0f} GB")
        needs.append(
            [name, f"{num_parameters(draft) / 1e9:.2f}B", *memory, f"{disk_bytes(load, tokens) / 1e12:.1f} TB"]
        )
        train = step_time(load).seconds / load.tokens
        capture = 2 * active * 1e9 / (peak * share * 1e12)
        hours = TABLE_EPOCHS * tokens * (train + capture) / 3600
        cells = []
        for count in counts:
            fits = count * 80 * GIB > 2.2e9 * total + plan.peak
            cells.append(f"{hours / count:.0f} h" if fits and hours / count >= 1 else "< 1 h" if fits else "-")
        times.append([name, *cells])
    header = ["target", "draft", "trainer, GPU peak", "target, bf16 weights", "host RAM", "disk, offline states"]
    return (
        f"Computed by `specforge-lite plan --tables`, not measured: H100 80 GB, bf16, K 7, micro batches of 2 x 2,048"
        f" tokens, every token supervised. Offline states and times are for {TABLE_SAMPLES:,} samples of"
        f" {TABLE_TOKENS:,} tokens; times for {TABLE_EPOCHS} epochs, target and trainer sharing the GPUs evenly.\n\n"
        f"{Table('', header, needs).markdown()}\n\n"
        f"{Table('', ['target', *(f'{n} GPU' for n in counts)], times).markdown()}"
    )


class PlanConfig(Section):
    """Recommend STEPS,TOPK,VERIFY from one benchmark run."""

    results: Path = flag(..., "--output of bench_model_speedup.py")
    benchmark: str | None = flag(None, "use the rows of this benchmark only (default: of all)")
    draft: str | None = flag(None, "of this draft, where there are several")
    temperature: float | None = flag(None, "of this temperature, where there are several")
    draft_sampling: str | None = flag(None, "greedy or sampled, where both were measured")
    candidates: tuple[str, ...] = flag((), "STEPS,TOPK,VERIFY to choose from (default: all inside what was measured)")
    num_shown: int = flag(5, "configurations shown per batch size", ge=1)
    output: Path | None = flag(None, "write all predictions as json")


def speculation() -> None:
    config = parse_config(PlanConfig, description=SPECULATION_HELP)
    from specforge_lite.benchmark.planner import make_plan
    from specforge_lite.benchmark.rows import read_rows
    from specforge_lite.report.tables import print_table, speculation_table

    rows = read_rows(config.results)
    if config.benchmark is not None:
        known = sorted({row.benchmark for row in rows})
        rows = [row for row in rows if row.benchmark == config.benchmark]
        if not rows:
            raise ConfigError(f"benchmark '{config.benchmark}': {config.results} has {', '.join(known) or 'no rows'}")
    for name in ("draft", "temperature", "draft_sampling"):
        rows = _of_one(rows, name, getattr(config, name), config.results)
    if not rows:
        raise DataError(f"{config.results}: no rows")
    rows = [replace(row, draft_sampling="greedy") for row in rows]  # the shape alone is planned
    plan = make_plan(rows, [_parse_speculation(text) for text in config.candidates] or None)
    kind = next((row.draft_kind for row in rows if row.draft_kind), None)
    for size in plan.predictions:
        measured = {row.speculation for row in rows if row.batch_size == size and row.steps}
        if len(measured) < 2 and not kind:
            warn(f"batch size {size}: one configuration with a draft was measured; costs need at least two")
    print_table(speculation_table(plan, config.num_shown), 100)
    for size in plan.predictions:
        info(_recommendation(plan.best(size), kind))
        if (verdict := plan.verdict_on_trees(size)) is not None:
            info(f"batch size {size}: {verdict}")
    if config.output is not None:
        with user_errors(config.output):
            write_json(config.output, asdict(plan))
        info(f"wrote {config.output}")


def _of_one(rows: list[SpeedupRow], name: str, wanted: Any, source: Path) -> list[SpeedupRow]:
    """Rows with that value of a field (drafted rows; those without a draft are of every draft). Raises ConfigError."""
    known = sorted({getattr(row, name) for row in rows if row.steps})
    if (len(known) > 1 and wanted is None) or (known and wanted not in (None, *known)):
        found = f"'{wanted}': " if wanted is not None else ""
        raise ConfigError(f"{name}: {found}{source} has {', '.join(map(str, known))}; choose one")
    chosen = known[:1] if wanted is None else [wanted]
    return [row for row in rows if getattr(row, name) in chosen or (not row.steps and name != "temperature")]


def _parse_speculation(text: str) -> Speculation:
    """`3,1,4`; raises ConfigError."""
    from specforge_lite.benchmark.configs import BenchConfig

    try:
        return BenchConfig.parse(f"1,{text}").speculation
    except ConfigError as error:
        raise ConfigError(str(error).replace("config_list: '1,", "candidates: '").replace("B,STEPS", "STEPS")) from None


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
