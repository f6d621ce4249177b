"""Stages of benchmarks/real_target.py that use trained drafts: decode, time, engines.

decode(config, out)       # OUTPUT_DIR/decoded/CELL.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_inference import one_layer_assistant
from benchmarks.compare_eagle1_eagle3 import ROOT, call
from benchmarks.real_prompts import benchmark_texts
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import lock_directory, write_json
from specforge_lite.core.log import progress
from specforge_lite.data.prompts import ChatEncoder
from specforge_lite.inference import GenerationSettings, SpeculativeModel, TreeShape
from specforge_lite.inference.block_drafter import BlockDrafter
from specforge_lite.inference.output import DecodeStats

CHAIN = 5  # drafted tokens per pass of the chain
SHAPES = {"chain": TreeShape.chain(CHAIN), "tree": TreeShape(24, 5, 6)}
SUMMED = ("num_tokens", "num_prompts", "verification_passes", "target_forwards", "target_seconds", "draft_seconds")
TIMED_SHAPES: dict[str, TreeShape | None] = {
    "plain": None, "chain of 2": TreeShape.chain(2), "chain of 3": TreeShape.chain(3), **SHAPES
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- decode


@contextmanager
def taken(out: Path, work: str) -> Iterator[bool]:
    """Whether another process does this piece of work; if none does, it is this one's meanwhile."""
    try:
        lock = lock_directory(out / "locks" / work, "output_dir")
    except ConfigError:
        yield True
        return
    with lock:
        yield False


def encoded_prompts(config: Any) -> dict[str, list[list[int]]]:
    chat = ChatEncoder.of_model(str(config.target_model_path))
    return {
        name: [chat.encode([{"role": "user", "content": text}]) for text in texts[: config.decoded_prompts]]
        for name, texts in benchmark_texts(config.benchmark_list, config.data_dir).items()
    }


def decode(config: Any, out: Path) -> None:
    """OUTPUT_DIR/decoded/CELL.json: per benchmark, shape and temperature the decoder's counts."""
    todo = [cell for cell in config.cells if cell.size == config.largest and cell.seed == config.seeds[0]]
    todo = [cell for cell in todo if (out / "drafts" / f"{cell.name}.json").exists()]
    prompts = encoded_prompts(config)
    (out / "decoded").mkdir(exist_ok=True)
    with progress(len(todo) * len(prompts), "decode", "benchmark") as bar:
        for cell in todo:
            with taken(out, f"decode-{cell.name}") as is_taken:
                if is_taken or (out / "decoded" / f"{cell.name}.json").exists():
                    bar.update(len(prompts))
                    continue
                model = SpeculativeModel.from_pretrained(
                    str(config.target_model_path), out / "drafts" / cell.name, dtype="float32"
                )
                found: dict[str, Any] = {}
                for name, ids in prompts.items():
                    found[name] = decode_benchmark(config, model, ids, plain_answers(config, out, model, name, ids))
                    bar.update(1)
                write_json(out / "decoded" / f"{cell.name}.json", found)


def plain_answers(
    config: Any, out: Path, model: SpeculativeModel, name: str, prompts: list[list[int]]
) -> list[list[int]]:
    """The target's own greedy answers, decoded once for all drafts."""
    path = out / "decoded" / f"plain_{name}_{len(prompts)}_{config.max_new_tokens}.json"
    if not path.exists():
        output = model.run(prompts, GenerationSettings(config.max_new_tokens), speculative=False)
        write_json(path, output.new_tokens)
    answers: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
    return answers


def decode_benchmark(
    config: Any, model: SpeculativeModel, prompts: list[list[int]], plain: list[list[int]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape in ("chain",) if isinstance(model.drafter, BlockDrafter) else SHAPES:
        for temperature in (0.0, 1.0):
            settings = GenerationSettings(config.max_new_tokens, temperature=temperature, seed=0, shape=SHAPES[shape])
            output = model.run(prompts, settings)
            row = {
                "tokens_per_pass": output.stats.tokens_per_pass,
                "per_position": output.stats.acceptance_per_position,
                "passes": output.stats.verification_passes,
            }
            if not temperature:
                row["identical"] = sum(a == b for a, b in zip(output.new_tokens, plain, strict=True))
                row["prompts"] = len(prompts)
            found[f"{shape} T={temperature:g}"] = row
    return found


# ----------------------------------------------------------------------------------------------------------------- time


def timed_draft(config: Any, out: Path) -> Path | None:
    draft: Path = out / "drafts" / config.timed_cell.name
    return draft if draft.exists() else None


def measure_time(config: Any, out: Path) -> None:
    """OUTPUT_DIR/time.json: tokens per second of every system, dtype and batch size, one value per round."""
    draft, path = timed_draft(config, out), out / "time.json"
    if path.exists() or draft is None:
        return
    mixed = [prompt for turn in zip_longest(*encoded_prompts(config).values()) for prompt in turn if prompt]
    prompts = mixed[: config.timed_prompts * max(config.timed_batches)]
    rows = []
    for dtype in config.timed_dtypes:
        model = SpeculativeModel.from_pretrained(str(config.target_model_path), draft, dtype=dtype)
        assert model.drafter is not None
        model.target.clock = model.drafter.clock = time.process_time
        for batch in config.timed_batches:
            groups = [prompts[at : at + batch] for at in range(0, config.timed_prompts * batch, batch)]
            rows += time_systems(config, model, [group for group in groups if len(group) == batch], dtype)
    write_json(path, rows)


def time_systems(
    config: Any, model: SpeculativeModel, groups: list[list[list[int]]], dtype: str
) -> list[dict[str, Any]]:
    """All systems on one group of prompts, then on the next, so that a machine whose speed drifts favours none."""
    network, length = model.target.model, config.max_new_tokens
    totals = {name: DecodeStats() for name in TIMED_SHAPES}
    assistant = one_layer_assistant(network, 5)

    def transformers(group: list[list[int]], helper: Any | None) -> int:
        width = max(map(len, group))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in group])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group])
        output = network.generate(
            ids, attention_mask=mask, max_new_tokens=length, do_sample=False, eos_token_id=[], pad_token_id=0,
            assistant_model=helper,
        )  # fmt: skip
        return int(output.shape[1] - width) * len(group)

    def ours(group: list[list[int]], name: str) -> int:
        shape, total = TIMED_SHAPES[name], totals[name]
        stats = model.run(group, GenerationSettings(length, eos_token_id=[], shape=shape), shape is not None).stats
        for key in SUMMED:
            setattr(total, key, getattr(total, key) + getattr(stats, key))
        return stats.num_tokens

    batch = len(groups[0])
    systems: dict[str, Any] = {"generate": lambda group: transformers(group, None)}
    if batch == 1:  # transformers assists one prompt at a time
        systems["assisted"] = lambda group: transformers(group, assistant)
    systems |= {name: lambda group, name=name: ours(group, name) for name in TIMED_SHAPES}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    with progress(len(groups) * len(systems), f"time {dtype} batch {batch}", "answer") as bar:
        for group in groups:
            for name, run in systems.items():
                wall, cpu = time.perf_counter(), time.process_time()
                tokens = run(group)
                rates[name].append((tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)))
                bar.update(1)
    return [
        {"system": name, "dtype": dtype, "batch": batch, "per_second": [w for w, _ in found],
         "per_cpu_second": [c for _, c in found], "median": statistics.median(w for w, _ in found)}
        | (cost_of_a_pass(totals[name]) if name in totals else {})
        for name, found in rates.items()
    ]  # fmt: skip


def cost_of_a_pass(stats: DecodeStats) -> dict[str, float]:
    """CPU milliseconds of the target and of the draft in one forward of the target, and the tokens it yields; prompts
    count as forwards."""
    forwards = max(1, stats.target_forwards)
    return {
        "tokens_per_pass": stats.tokens_per_pass if stats.verification_passes else 1.0,
        "target_ms": 1000 * stats.target_seconds / forwards, "draft_ms": 1000 * stats.draft_seconds / forwards,
    }  # fmt: skip


def measure_engines(config: Any, out: Path) -> None:
    """OUTPUT_DIR/engines_NAME_ROUND.jsonl: rows of the package's own benchmark; a finished run is not made again."""
    draft = timed_draft(config, out)
    backends = [name for name in ("vllm", "sglang") if (ROOT / f".venv-{name}").exists()]
    shapes = [f"1,{steps},1,{steps + 1}" for steps in config.engine_steps]
    for turn in range(config.engine_rounds if draft is not None else 0):
        for backend in backends:
            call(
                "bench_model_speedup.py", "--model-path", str(config.target_model_path), "--draft-model-path",
                str(draft), "--backend", backend, "--target-dtype", config.engine_dtype, "--config-list", *shapes,
                "--benchmark-list", f"gsm8k:{config.timed_prompts}", "--max-new-tokens", str(config.max_new_tokens),
                "--output", str(out / f"engines_{backend}_{turn}.jsonl"),
            )  # fmt: skip
