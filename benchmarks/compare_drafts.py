"""DSpark, DFlash, EAGLE-3, EAGLE-1 on one target: the same data and the same floating-point operations of training.

    python benchmarks/compare_drafts.py                                   # the shipped target; figures in results/
    python benchmarks/compare_drafts.py --kinds eagle1 eagle3 --equal steps
    python benchmarks/compare_drafts.py --target-model-path MODEL --train-data-path FILE --eval-data-path FILE

Without data, prompts that ship with the package are answered by the target itself first. The operations of a step are
counted while a few steps run; EAGLE-3 trains for --total-steps, the others for as many steps as cost the same. Every
draft decodes chains of --chain tokens (the length of a block), greedily and at temperature 1, --decode-batch prompts at
a time; what is timed (--timed-prompts) one at a time. Times are CPU seconds of one thread. Stages that are done are not
run again; OUTPUT_DIR/comparison.md is the table.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compare_eagle1_eagle3 import DraftsConfig, call, capture_states, make_data
from specforge_lite.capture.base import default_aux_layer_ids
from specforge_lite.core.files import atomic_file
from specforge_lite.core.log import run_script
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.core.settings import parse_config
from specforge_lite.evaluation.run import engine_for, evaluate_draft, open_eval_data, open_target_files
from specforge_lite.evaluation.settings import MeasureSection
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.training.block import DflashConfig, DsparkConfig, spread_aux_layers
from specforge_lite.training.eagle1 import Eagle1Config
from specforge_lite.training.evaluate import answers_of
from specforge_lite.training.loop import run_training
from specforge_lite.training.settings import TrainConfig
from specforge_lite.types import TokenizedSample

SETTINGS: dict[str, type[TrainConfig]] = {
    "dspark": DsparkConfig, "dflash": DflashConfig, "eagle3": TrainConfig, "eagle1": Eagle1Config,
}  # fmt: skip
Kind = Literal["dspark", "dflash", "eagle3", "eagle1"]
PROBE_STEPS = 12


class CompareConfig(DraftsConfig):
    """Train every kind of draft and decode with it."""

    output_dir: Path = Path("outputs/compare_drafts")
    kinds: tuple[Kind, ...] = ("dspark", "dflash", "eagle3", "eagle1")
    seeds: tuple[int, ...] = (0,)
    equal: Literal["flops", "steps"] = Field("flops", description="what all kinds get as much of; steps of EAGLE-3")
    block_learning_rate: float = Field(2e-3, gt=0, description="of DSpark and DFlash")
    chain: int = Field(7, ge=2, description="drafted tokens per pass; DFlash blocks have one slot more")
    num_draft_layers: int = Field(2, ge=1, description="layers of DSpark and DFlash")
    markov_rank: int = Field(64, ge=1, description="of DSpark")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the training")
    draft_vocab_size: int | None = Field(None, ge=8, description="of EAGLE-3; default: the target's")
    seed_of_answers: int = Field(0, ge=0, description="seed of sampled decoding")
    decode_batch: int = Field(1, ge=1, description="prompts decoded together where acceptance is counted")
    timed_prompts: int = Field(24, ge=1, description="prompts decoded one at a time where time is measured")


@dataclass(frozen=True)
class Row:
    """One trained draft. Lengths are tokens per pass of the target: estimated (the walk), decoded greedily, decoded at
    temperature 1 with drafts that are the most probable tokens and with drawn ones. reproduced: share of the target's
    own greedy answers that came out. draft_ms: CPU time of drafting one chain, reading the accepted tokens included.
    speed*: tokens per CPU second; plain*: without a draft."""

    kind: str
    seed: int
    parameters: int
    steps: int
    flops: float
    cpu_seconds: float
    estimated: float
    decoded: float
    reproduced: float
    sampled_greedy_drafts: float
    sampled_drawn_drafts: float
    draft_ms: float
    speed: float
    speed_sampled: float
    plain: float


def main() -> None:
    config = parse_config(CompareConfig, description=__doc__ or "")
    torch.set_num_threads(1)
    out = config.output_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    train, evaluation = make_data(config, out)
    samples = eval_samples(config, out, evaluation)
    rows = []
    for seed, kind in product(config.seeds, config.kinds):
        file = out / f"{kind}-{config.equal}-{seed}.json"
        if not file.exists():
            row = measure(config, kind, seed, out, train, evaluation, samples)
            with atomic_file(file) as stream:
                json.dump(asdict(row), stream, indent=2)
        rows.append(Row(**json.loads(file.read_text())))
    table = table_of(rows, config)
    with atomic_file(out / "comparison.md") as stream:
        stream.write(table)
    print(table)


def sections_of(config: CompareConfig, out: Path, evaluation: Path) -> tuple[TargetSection, DataSection]:
    target = TargetSection(target_model_path=config.target_model_path, target_backend="hf", target_dtype="float32")
    return target, DataSection(eval_data_path=str(evaluation), cache_dir=out / "cache", max_length=config.max_length)


def eval_samples(config: CompareConfig, out: Path, evaluation: Path) -> list[TokenizedSample]:
    dataset = open_eval_data(*sections_of(config, out, evaluation))
    return [dataset[i] for i in range(min(len(dataset), config.num_eval))]


# ------------------------------------------------------------------------------------------------------------ training


def training_words(config: CompareConfig, kind: str, out: Path, train: Path) -> list[str]:
    """Flags of the training command; captures the states that any kind reads, once."""
    is_block = kind in ("dspark", "dflash")
    target = open_target_files(sections_of(config, out, train)[0], "cpu")
    num_layers = int(target.config.get_text_config().num_hidden_layers)
    eagle, block = default_aux_layer_ids(num_layers)[0], spread_aux_layers(num_layers)
    states = out / "states"
    capture_states(config, train, states, "--aux-layer-ids", *map(str, sorted({*eagle, *block})))
    own = {
        "dspark": ["--block-size", str(config.chain), "--markov-rank", str(config.markov_rank)],
        "dflash": ["--block-size", str(config.chain + 1)],
        "eagle3": ["--ttt-length", str(config.chain)],
        "eagle1": ["--schedule-steps", "none"],  # its own default is made for 800,000 steps
    }[kind]
    if is_block:
        own += ["--num-draft-layers", str(config.num_draft_layers)]
    if kind == "eagle3" and config.draft_vocab_size is not None:
        own += ["--draft-vocab-size", str(config.draft_vocab_size)]
    if kind != "eagle1":
        own += ["--aux-layer-ids", *map(str, block if is_block else eagle)]
    rate = config.block_learning_rate if is_block else config.learning_rate
    return [
        "--target-model-path", config.target_model_path, "--offline-dir", str(states), "--cache-dir",
        str(out / "cache"), "--batch-size", str(config.batch_size), "--learning-rate", str(rate), "--warmup-ratio",
        "0.05", "--lr-schedule", "cosine", "--max-grad-norm", "0.5", "--eval-interval", "0", "--save-interval", "250",
        "--save-total-limit", "1", "--log-interval", "100", "--precision", config.precision, *own,
    ]  # fmt: skip


def flops_of_step(config: CompareConfig, kind: str, out: Path, train: Path) -> float:
    """Operations of the matrix products of a training step, counted over the first few."""
    file = out / f"{kind}-flops.json"
    if not file.exists():
        words = [*training_words(config, kind, out, train), "--output-dir", str(out / f"{kind}-probe")]
        with FlopCounterMode(display=False) as counter:
            run_training(parse_config(SETTINGS[kind], [*words, "--total-steps", str(PROBE_STEPS)]))
        file.write_text(json.dumps(counter.get_total_flops() / PROBE_STEPS))
    return float(json.loads(file.read_text()))


def train_draft(config: CompareConfig, kind: str, seed: int, out: Path, train: Path) -> tuple[Path, int, float, float]:
    """-> (draft directory, steps, operations, CPU seconds)."""
    per_step = flops_of_step(config, kind, out, train)
    steps = config.total_steps
    if config.equal == "flops":
        steps = round(steps * flops_of_step(config, "eagle3", out, train) / per_step)
    run, draft = (out / f"{kind}-{config.equal}-{seed}{end}" for end in ("", "-draft"))
    seconds = run / "cpu_seconds.json"
    if not (draft / "config.json").exists():
        words = [*training_words(config, kind, out, train), "--output-dir", str(run), "--seed", str(seed)]
        start = time.process_time()
        run_training(parse_config(SETTINGS[kind], [*words, "--total-steps", str(steps)]))
        seconds.write_text(json.dumps(time.process_time() - start))
        call("scripts/export_draft.py", "--checkpoint", str(run), "--output-dir", str(draft), "--dtype", "float32")
    return draft, steps, steps * per_step, float(json.loads(seconds.read_text()))


# ------------------------------------------------------------------------------------------------------------- decoding


def measure(
    config: CompareConfig,
    kind: str,
    seed: int,
    out: Path,
    train: Path,
    evaluation: Path,
    samples: list[TokenizedSample],
) -> Row:
    """Train a draft, estimate its acceptance, and decode the answers of `samples` with it."""
    path, steps, flops, cpu_seconds = train_draft(config, kind, seed, out, train)
    target, data = sections_of(config, out, evaluation)
    files = open_target_files(target, "cpu")
    draft = files.load_draft(path)
    options = MeasureSection(ttt_length=config.chain, chain_length=config.chain, eval_max_samples=len(samples))
    with engine_for(draft, target, data, files.device) as engine:
        estimated = evaluate_draft(draft, files, open_eval_data(target, data), engine, options).tau_walk
    model = SpeculativeModel.from_pretrained(config.target_model_path, path, dtype="float32", device="cpu")
    assert model.drafter is not None
    model.target.clock = model.drafter.clock = time.process_time
    decoded = decode(model, samples, config, 0.0, "auto", batch=config.decode_batch)
    sampled = {
        mode: decode(model, samples, config, 1.0, mode, batch=config.decode_batch) for mode in ("greedy", "sampled")
    }
    best = max(sampled, key=lambda mode: sampled[mode].tokens_per_pass)
    timed = samples[: config.timed_prompts]
    greedy, plain = (decode(model, timed, config, 0.0, "auto", speculative) for speculative in (True, False))
    timed_sampled = decode(model, timed, config, 1.0, best)
    return Row(
        kind=kind,
        seed=seed,
        parameters=sum(p.numel() for p in model.drafter.draft.parameters()),
        steps=steps,
        flops=flops,
        cpu_seconds=cpu_seconds,
        estimated=estimated,
        decoded=decoded.tokens_per_pass,
        reproduced=decoded.reproduced / decoded.file_tokens,
        sampled_greedy_drafts=sampled["greedy"].tokens_per_pass,
        sampled_drawn_drafts=sampled["sampled"].tokens_per_pass,
        draft_ms=1000 * greedy.draft_seconds / greedy.passes,
        speed=greedy.speed,
        speed_sampled=timed_sampled.speed,
        plain=plain.speed,
    )


@dataclass
class Totals:
    """Sums over prompts; the first token of each answer comes from its prompt's pass and is left out. reproduced:
    tokens of the file's answers, file_tokens, that came out before the first difference."""

    tokens: int = 0
    passes: int = 0
    reproduced: int = 0
    file_tokens: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(self.passes, 1)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def decode(
    model: SpeculativeModel,
    samples: list[TokenizedSample],
    config: CompareConfig,
    temperature: float,
    draft_sampling: str,
    speculative: bool = True,
    batch: int = 1,
) -> Totals:
    """Answer the first turn of every sample; those that are decoded together are as long as the longest in the file."""
    totals = Totals()
    jobs = [(sample.input_ids_L.tolist(), *answers_of(sample.loss_mask_L.tolist())[0]) for sample in samples]
    jobs.sort(key=lambda job: job[2] - job[1])
    for at in range(0, len(jobs), batch):
        group = jobs[at : at + batch]
        settings = GenerationSettings(
            max_new_tokens=max(end - first for _, first, end in group),
            temperature=temperature,
            seed=config.seed_of_answers + at,
            shape=TreeShape.chain(config.chain),
            draft_sampling=draft_sampling,
        )
        output = model.run([ids[:first] for ids, first, _ in group], settings, speculative)
        stats = output.stats
        totals.tokens += stats.num_tokens - stats.num_prompts
        totals.passes += stats.verification_passes
        totals.seconds += stats.seconds
        totals.draft_seconds += stats.draft_seconds
        for (ids, first, end), found in zip(group, output.new_tokens, strict=True):
            pairs = list(zip(found, ids[first:end]))
            totals.reproduced += next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            totals.file_tokens += end - first
    return totals


def table_of(rows: list[Row], config: CompareConfig) -> str:
    """Markdown: the means over seeds; lengths with their range."""
    lines = [
        f"chains of {config.chain}, {config.num_eval} prompts not trained on, batches of {config.batch_size}, seeds"
        f" {', '.join(map(str, config.seeds))}; learning rate {config.learning_rate:g}, of blocks"
        f" {config.block_learning_rate:g}\n",
        "| draft | parameters | steps | TFLOP | training, CPU s | T=0 estimated | T=0 decoded | T=1 likeliest drafts |"
        " T=1 drawn drafts | draft, ms a pass | tokens/CPU s T=0 | T=1 | no draft |",
        "|" + "---|" * 13,
    ]
    for kind in config.kinds:
        columns = [asdict(row) for row in rows if row.kind == kind]
        mean = {name: statistics.fmean(c[name] for c in columns) for name in columns[0] if name != "kind"}
        spread = {name: max(c[name] for c in columns) - min(c[name] for c in columns) for name in mean}
        lengths = [
            f"{mean[name]:.3f}" + f" ± {spread[name] / 2:.3f}" * (len(columns) > 1)
            for name in ("estimated", "decoded", "sampled_greedy_drafts", "sampled_drawn_drafts")
        ]
        counts = [f"{mean['parameters']:,.0f}", f"{mean['steps']:,.0f}", f"{mean['flops'] / 1e12:.1f}"]
        speeds = [f"{mean[name]:.0f}" for name in ("speed", "speed_sampled", "plain")]
        cells = [kind, *counts, f"{mean['cpu_seconds']:.0f}", *lengths, f"{mean['draft_ms']:.2f}", *speeds]
        lines.append(f"| {' | '.join(cells)} |")
    reproduced = min(row.reproduced for row in rows)
    lines.append(f"\nGreedy output is the target's own in {reproduced:.1%} of the tokens at least.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
