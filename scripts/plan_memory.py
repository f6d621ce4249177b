"""Peak memory per rank, term by term, speed class, and disk for offline mode: before anything starts.

    python scripts/plan_memory.py --draft-model-config configs/llama-3.1-8b-eagle3.json --max-length 4096 \\
        --batch-size 2 --num-gpus 8 --sharding fsdp2 --memory-gb 80
    python scripts/plan_memory.py ... --json

The flags are those of the training script. An in-process target (--target-backend hf) comes on top.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import format_bytes, info, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.training.estimate import (
    MemoryPlan,
    Workload,
    disk_bytes,
    num_parameters,
    plan_memory,
    tokens_per_second,
)
from specforge_lite.training.wiring import read_draft_config

GIB = 2**30
# Peak of one rank in TFLOP/s, and what share of it training reaches, where nothing else is said.
PEAK_TFLOPS = {"cuda": 989.0, "cpu": 0.13}
EFFICIENCY = {"cuda": 0.4, "cpu": 0.6}


class PlanMemoryConfig(Section):
    """What the training run would be started with."""

    draft_model_config: Path = Field(description="config.json of the draft")
    max_length: int = Field(2048, ge=8, description="tokens of the longest sample")
    batch_size: int = Field(1, ge=1, description="samples per micro batch and rank")
    max_tokens_per_batch: int | None = Field(None, ge=8, description="packing budget, instead of --batch-size")
    num_gpus: int = Field(1, ge=1, description="ranks of the trainer")
    ttt_length: int = Field(7, ge=1, le=32, description="K, steps of the training-time test")
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


def main() -> None:
    config = parse_config(PlanMemoryConfig, description=__doc__ or "")
    load = workload_of(config)
    plan = plan_memory(load)
    report = report_of(config, load, plan)
    if config.as_json:
        print(json.dumps(report, indent=1))
    else:
        show(plan, report)
    if config.memory_gb is not None and plan.peak > config.memory_gb * GIB:
        raise ConfigError(
            f"memory_gb {config.memory_gb:g}: the peak is {plan.peak / GIB:.1f} GiB; try --activation-checkpointing,"
            " --sharding fsdp2, a smaller batch, --sp-size or --optim adamw_8bit"
        )


def workload_of(config: PlanMemoryConfig) -> Workload:
    """The planner's view of the flags."""
    return Workload(
        draft=read_draft_config(config.draft_model_config, "eagle3"),
        tokens=config.max_tokens_per_batch or config.batch_size * config.max_length,
        num_steps=config.ttt_length,
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
    )


def report_of(config: PlanMemoryConfig, load: Workload, plan: MemoryPlan) -> dict[str, Any]:
    """JSON: bytes by term, the peak, and the rest."""
    peak_tflops = config.peak_tflops or PEAK_TFLOPS[config.device]
    return {
        "parameters": num_parameters(load.draft),
        "peak_bytes": plan.peak,
        "peak_moment": plan.peak_moment,
        "terms": plan.peak_terms,
        "host_terms": plan.host,
        "tokens_per_second": tokens_per_second(load, peak_tflops, EFFICIENCY[config.device]),
        "offline_bytes_per_token": disk_bytes(load, 1),
        "offline_bytes": None if config.num_tokens is None else disk_bytes(load, config.num_tokens),
    }


def show(plan: MemoryPlan, report: dict[str, Any]) -> None:
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
    per_token = format_bytes(report["offline_bytes_per_token"])
    total = report["offline_bytes"]
    info(f"offline mode: {per_token} per token" + ("" if total is None else f", {format_bytes(total)} in all"))


if __name__ == "__main__":
    run_script(main)
