"""Training step: tokens per CPU-second against the plain reference and against the floor of the needed operations.

    python benchmarks/bench_training.py                     # shape small on one CPU thread, every figure of the table
    python benchmarks/bench_training.py --variants fp32-75  # one row of it
    python benchmarks/bench_training.py --draft dspark --variants fp32-75 bf16-75
    python benchmarks/bench_training.py --shape 8b --device cuda --variants bf16-100   # MFU on a GPU

One step is forward + backward + AdamW on precomputed hidden states. Variants run in turn inside one process
(reference, A, B, reference, A, B, ...), so that a machine whose speed drifts cannot favour one; figures are medians,
ratios are taken round by round. Memory is measured in a fresh process per variant. Needs torch only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.block_step import block_gemms, make_block_step
from specforge_lite.model.device import usable_dtype
from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.eagle3_reference import ReferenceConfig, reference_loss
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.row_plan import plan_rows, predictable_tokens
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch


@dataclass(frozen=True)
class Shape:
    """hidden = draft width; batch documents of `length` tokens."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    draft_vocab: int
    batch: int
    length: int
    num_steps: int = 7


SHAPES = {
    "small": Shape(256, 4, 2, 1024, 32000, 8000, 1, 512),
    "long": Shape(256, 4, 2, 1024, 32000, 8000, 1, 16384),
    "wide": Shape(1024, 16, 8, 4096, 128256, 32000, 1, 2048),
    "8b": Shape(4096, 32, 8, 14336, 128256, 32000, 4, 2048),
    "test": Shape(32, 4, 2, 64, 500, 200, 1, 48, 3),
}
IN_VOCAB = 0.97  # share of teacher tokens inside the draft vocabulary, as a vocabulary map of real data covers


@dataclass(frozen=True)
class Variant:
    """`name` is `DTYPE-PERCENT[-BACKEND][-compile]`: fp32-75, bf16-75-compile, bf16-100-eager, reference-75."""

    kind: str
    supervised: float
    backend: str
    compile: bool

    @classmethod
    def parse(cls, name: str) -> Variant:
        kind, percent, *options = name.split("-")
        backend = [option for option in options if option != "compile"]
        if kind not in ("fp32", "bf16", "reference"):
            raise SystemExit(f"error: variant {name}: expected fp32, bf16 or reference first")
        return cls(kind, float(percent) / 100, backend[0] if backend else "auto", "compile" in options)


def make_inputs(shape: Shape, supervised: float, device: str) -> tuple[DraftBatch, TargetHead, Tensor, Tensor]:
    """One supervised span at the end of each document; IN_VOCAB of the teachers' tokens are in the draft vocabulary."""
    generator = torch.Generator().manual_seed(0)
    total = shape.batch * shape.length
    rand = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    draft_ids = torch.randperm(shape.vocab, generator=generator)[: shape.draft_vocab].sort().values
    t2d = torch.zeros(shape.vocab, dtype=torch.bool)
    t2d[draft_ids] = True
    embed, lm_head = rand(shape.vocab, shape.hidden), rand(shape.vocab, shape.hidden) / shape.hidden**0.5
    next_token = draft_ids[torch.randint(shape.draft_vocab, (total,), generator=generator)]
    outside = torch.rand(total, generator=generator) > IN_VOCAB
    next_token[outside] = (~t2d).nonzero().squeeze(1)[: int(outside.sum())]
    last = lm_head[next_token] * 8 + 0.2 * rand(total, shape.hidden)
    mask = torch.zeros(shape.batch, shape.length, dtype=torch.bool)
    mask[:, shape.length - round(shape.length * supervised) :] = True
    batch = DraftBatch(
        input_ids_N=torch.randint(shape.vocab, (total,), generator=generator),
        loss_mask_N=mask.flatten(),
        doc_offsets=list(range(0, total + 1, shape.length)),
        aux_NG=rand(total, 3 * shape.hidden),
        last_NH=last,
    )
    head = TargetHead(embed, lm_head, torch.ones(shape.hidden), 1e-5)
    return batch.to(device), head.to(device), draft_ids - torch.arange(len(draft_ids)), t2d


def make_draft(shape: Shape, d2t: Tensor, t2d: Tensor) -> Draft:
    config = DraftConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, draft_vocab_size=shape.draft_vocab,
    )  # fmt: skip
    draft = build_draft(config, d2t, t2d)
    init_random(draft)
    return draft


def make_step(variant: Variant, shape: Shape, device: str, draft_kind: str = "eagle3") -> Callable[[], float]:
    """Return a function that runs one training step and returns the loss per counted position of step 0."""
    if draft_kind == "dspark":
        half = usable_dtype(torch.bfloat16, device) if variant.kind == "bf16" else None
        return make_block_step(variant.kind, variant.supervised, variant.backend, half, shape, device)
    batch, head, d2t, t2d = make_inputs(shape, variant.supervised, device)
    draft = make_draft(shape, d2t, t2d).to(device)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4, fused=True)  # as the trainer
    dtype = usable_dtype(torch.bfloat16, device) if variant.kind == "bf16" else None
    if dtype is not None:
        batch, head = batch.to(device, dtype), head.to(device, dtype)
    settings = TTTSettings(
        num_steps=shape.num_steps, attention_backend=variant.backend, compute_dtype=dtype, compile=variant.compile
    )

    def reference() -> tuple[Tensor, Tensor]:
        config = ReferenceConfig(
            shape.heads, shape.kv_heads, draft.config.head_dim, draft.config.rms_norm_eps, draft.config.rope_theta
        )
        weights = dict(draft.named_parameters())
        loss, _, counted_K, _ = reference_loss(
            weights, config, batch.input_ids_N, batch.loss_mask_N, batch.aux_NG, batch.last_NH,
            head.embed_VH, head.lm_head_VH, draft.d2t, draft.t2d, shape.num_steps,
        )  # fmt: skip
        return loss, counted_K[0].float()

    def ours() -> tuple[Tensor, Tensor]:
        output = draft(batch, head, settings)
        return output.loss, output.counted_K[0]

    forward = reference if variant.kind == "reference" else ours

    def step() -> float:
        loss, count = forward()
        loss.backward()
        optimizer.grad_scale = count  # the fused kernel divides by it, as the trainer has it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach() / count) if device == "cpu" else 0.0

    return step


# ---------------------------------------------------------------------------------------------------------------- floor


def needed_gemms(shape: Shape, supervised: float) -> list[tuple[str, int, int, int, int]]:
    """(name, rows, inner, columns, passes) of every matrix product the step cannot avoid; 3 passes are fwd + 2 bwd."""
    batch, head, _, t2d = make_inputs(shape, supervised, "cpu")
    predictable = predictable_tokens(batch.loss_mask_N, batch.doc_offsets)
    tokens = predictable.nonzero().squeeze(1)
    in_vocab = t2d[(head.logits(batch.last_NH[tokens - 1])).argmax(-1)]
    counted = torch.zeros_like(predictable)
    counted[tokens[in_vocab]] = True
    plan = plan_rows(counted, batch.doc_offsets, shape.num_steps, spare_share=0)
    width, keys = shape.hidden, len(plan.key_tokens)
    head_dim = width // shape.heads
    kv, qkv = 2 * shape.kv_heads * head_dim, width + 2 * shape.kv_heads * head_dim
    gemms = [
        ("fc", keys, 3 * width, width, 2),  # aux states need no gradient
        ("embedding half of qkv", len(plan.embed_tokens), width, qkv, 3),
        ("state half of kv, step 0", keys, width, kv, 3),
        ("teacher", len(tokens), width, shape.vocab, 1),
        ("head, all steps", int((plan.head_places_MK >= 0).sum()), width, shape.draft_vocab, 3),
    ]
    for k, rows in enumerate(plan.steps):
        count = len(rows.row_tokens)
        pairs = int((rows.position_ids - k + 1).sum())  # (row, step-0 key) pairs
        gemms += [
            (f"state half of {'q' if k == 0 else 'qkv'}, step {k}", count, width, width if k == 0 else qkv, 3),
            (f"o, step {k}", count, width, width, 3),
            (f"gate and up, step {k}", count, width, 2 * shape.ffn, 3),
            (f"down, step {k}", count, shape.ffn, width, 3),
            # scores and values forward (2), and scores again + 4 gradients backward (5), per head
            (f"attention, step {k}", count, head_dim, max(1, pairs // max(count, 1)) * shape.heads, 7),
        ]
    return [g for g in gemms if g[1]]


def floor_seconds(gemms: list[tuple[str, int, int, int, int]], dtype: torch.dtype) -> tuple[float, float]:
    """-> (CPU seconds if every product ran at the rate of its own shape, alone and warm; total floating-point ops)."""
    rates: dict[tuple[int, int, int], float] = {}
    seconds = operations = 0.0
    for name, rows, inner, columns, passes in gemms:
        rows_timed = min(rows, 512)
        key = (rows_timed, inner, columns)
        if key not in rates:
            rates[key] = _gemm_rate(*key, dtype)
        work = 2.0 * rows * inner * columns * passes
        operations += work
        seconds += work / rates[key]
        del name
    return seconds, operations


def _gemm_rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """Operations per CPU-second of x @ w^T at this shape, best of a few."""
    x, w = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    best = float("inf")
    for _ in range(4):
        repeats = max(1, int(4e8 / (2 * rows * inner * columns)))
        start = time.process_time()
        for _ in range(repeats):
            x @ w.T
        best = min(best, (time.process_time() - start) / repeats)
    return 2 * rows * inner * columns / best


# ---------------------------------------------------------------------------------------------------------- measurement


def time_variants(
    names: list[str], shape: Shape, device: str, rounds: int, draft_kind: str = "eagle3"
) -> dict[str, list[float]]:
    """CPU-seconds (GPU: wall seconds) of one step per variant, `rounds` times in turn after one warm-up each."""
    steps = {name: make_step(Variant.parse(name), shape, device, draft_kind) for name in names}
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            if device != "cpu":
                torch.cuda.synchronize()
            start = clock()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return times


def memory_of(name: str, shape: Shape, device: str, draft_kind: str = "eagle3") -> dict[str, float]:
    """MB of this process: after import, with inputs and weights, at the peak of three steps."""
    imported = _resident_mb("VmRSS")
    step = make_step(Variant.parse(name), shape, device, draft_kind)
    with_inputs = _resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
    for _ in range(3):
        step()
    peak = _resident_mb("VmHWM")
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"import": imported, "inputs": with_inputs, "peak": peak}


def _resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"error: no {field} in /proc/self/status")


def measure_memory(names: list[str], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    results = {}
    for name in names:
        command = [
            sys.executable,
            __file__,
            "--memory-of",
            name,
            "--shape",
            arguments.shape,
            "--device",
            arguments.device,
            "--draft",
            arguments.draft,
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--draft", choices=("eagle3", "dspark"), default="eagle3")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["fp32-75", "fp32-75-compile", "bf16-75", "bf16-75-compile", "fp32-25", "fp32-5"],
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--no-reference", action="store_true", help="no plain reference (it cannot run at large shapes)"
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="GPU peak for MFU (Hopper bf16: 989)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the figures as json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of, shape, arguments.device, arguments.draft)))
        return

    with_reference = arguments.device == "cpu" and not arguments.no_reference and shape.batch == 1
    names = list(arguments.variants)
    references = {f"reference-{name.split('-')[1]}" for name in names} if with_reference else set()
    times = time_variants([*sorted(references), *names], shape, arguments.device, arguments.rounds, arguments.draft)
    memory = {} if arguments.no_memory else measure_memory([*sorted(references), *names], arguments)
    rows = []
    tokens = shape.batch * shape.length
    for name in [*sorted(references), *names]:
        variant = Variant.parse(name)
        seconds = median(times[name])
        row = {"variant": name, "tokens_per_s": tokens / seconds, "step_ms": seconds * 1e3}
        reference = times.get(f"reference-{name.split('-')[1]}")
        if reference and variant.kind != "reference":
            row["x_reference"] = median(r / t for r, t in zip(reference, times[name]))
        gemms = (needed_gemms if arguments.draft == "eagle3" else block_gemms)(shape, variant.supervised)
        if arguments.device == "cpu":
            floor, operations = floor_seconds(gemms, torch.bfloat16 if variant.kind == "bf16" else torch.float32)
            row["share_of_floor"] = floor / seconds
        else:
            operations = sum(2.0 * r * i * c * p for _, r, i, c, p in gemms)
            row["mfu"] = operations / seconds / (arguments.peak_tflops * 1e12)
        row["needed_gflop"] = operations / 1e9
        if name in memory:
            row["peak_mb_above_inputs"] = memory[name]["peak"] - memory[name]["inputs"]
            row["peak_mb_above_import"] = memory[name]["peak"] - memory[name]["import"]
        rows.append(row)
    print_table(arguments, rows)
    if arguments.output:
        arguments.output.write_text(json.dumps({"argv": sys.argv[1:], "rows": rows, "times": times}, indent=1))


def print_table(arguments: argparse.Namespace, rows: list[dict[str, float | str]]) -> None:
    unit = "CPU-s" if arguments.device == "cpu" else "s"
    last = "share_of_floor" if arguments.device == "cpu" else "mfu"
    shape = f"{arguments.shape}: {SHAPES[arguments.shape]}"
    print(f"{arguments.draft}, shape {shape}, {arguments.device}, torch {torch.__version__}")
    print(f"| variant | tokens/{unit} | step ms | x reference | {last} | GFLOP | MB above inputs | MB above import |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['variant']}", f"{row['tokens_per_s']:.0f}", f"{row['step_ms']:.0f}"]
        for key, form in (("x_reference", ".2f"), (last, ".0%"), ("needed_gflop", ".1f")):
            cells.append(format(row[key], form) if key in row else "")
        cells += [f"{row[k]:.0f}" if k in row else "" for k in ("peak_mb_above_inputs", "peak_mb_above_import")]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
