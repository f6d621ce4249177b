"""A real language model from prompts to tables: acceptance, wall clock, EAGLE-3 against EAGLE-1, more data.

    make real-target                                                     # once: SmolLM2-135M-Instruct, 540 MB
    python benchmarks/real_target.py --train-prompts gsm8k_train.jsonl alpaca.json      # a night on two cores
    python benchmarks/real_target.py --num-prompts 64 --drafts eagle3 eagle1 --sizes 0.5 1 --variant-size 1 --seeds 0 \\
      --benchmark-list gsm8k:8 --max-new-tokens 48                                      # a try, half an hour

Stages, one after the other; `--stages` picks some of them. What is done lies in OUTPUT_DIR and is not done again, and a
stage that was killed goes on where it was. The same command may be started once per core: the processes share the
drafts that are left to train and to decode.

    answers   the target answers the prompts, some greedily, some sampled, and those of the benchmarks greedily
    states    its hidden states on these answers, with every layer that a draft reads
    train     one draft per name, data size and seed; its acceptance on the benchmarks' answers is estimated (the walk)
    decode    the drafts trained on most data, on the benchmarks' prompts: chain and tree, greedy and at temperature 1
    time      our decoder against transformers' generate and assisted generation; systems take turns
    engines   the same draft served by vLLM and SGLang, with and without it; engines take turns
    report    real_target.md and .png from what there is
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from pydantic import Field

from benchmarks.compare_eagle1_eagle3 import call
from benchmarks.real_decode import CHAIN, decode, measure_engines, measure_time, taken
from benchmarks.real_prompts import benchmark_texts, training_prompts
from benchmarks.real_report import write_results
from benchmarks.smollm2 import default_directory
from specforge_lite.capture.base import default_aux_layer_ids
from specforge_lite.capture.offline import OfflineEngine, OfflinePart
from specforge_lite.checkpoints.export import exported_config
from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.core.files import atomic_directory, lock_directory, write_atomically, write_json
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import info, progress, run_script
from specforge_lite.core.sections import TargetSection
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.data.store import StoreWriter, TokenizedDataset
from specforge_lite.evaluation.run import open_target_files
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.serving.session import ServingOptions, ServingSession
from specforge_lite.training.block import DsparkConfig
from specforge_lite.training.dataloader import BatchMaker
from specforge_lite.training.distributed import open_world
from specforge_lite.training.eagle1 import Eagle1Config
from specforge_lite.training.evaluate import evaluate
from specforge_lite.training.loop import Trainer
from specforge_lite.training.reporting import catch_signals, open_reporter
from specforge_lite.training.settings import TrainConfig
from specforge_lite.training.wiring import RunData, load_data, load_models, open_target
from specforge_lite.types import TokenizedSample

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("answers", "states", "train", "decode", "time", "engines", "report")
ESTIMATES = ("num_tokens", "num_passes", "tau_walk", "tau_sampling", "accuracy")
# What differs from the plain EAGLE-3 draft: settings of the trainer, by section. `aux`: a rule of `aux_layers`; `rate`:
# the kind's learning rate times this; `shape`: keys of the draft's config, derived from the target but for these;
# `answers`: trained only on those with this one of `--temperatures`.
DRAFTS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle1": {"kind": "eagle1"},
    "eagle3 lr x0.5": {"rate": 0.5},
    "eagle3 lr x2": {"rate": 2.0},
    "eagle3 lr x4": {"rate": 4.0},
    "eagle1 lr x0.5": {"kind": "eagle1", "rate": 0.5},
    "eagle1 lr x2": {"kind": "eagle1", "rate": 2.0},
    "eagle1 lr x4": {"kind": "eagle1", "rate": 4.0},
    "eagle3 aux high": {"aux": "high"},
    "eagle3 aux spread": {"aux": "spread"},
    "eagle3 random init": {"draft": {"init": "random"}},
    "eagle3 K3": {"training": {"ttt_length": 3}},
    "eagle3 K7": {"training": {"ttt_length": 7}},
    "eagle3 lk": {"training": {"loss": "lk"}},
    "eagle3 lk_alpha": {"training": {"loss": "lk_alpha"}},
    "eagle3 step decay 0.6": {"training": {"step_decay": 0.6}},
    "eagle3 2 epochs": {"training": {"num_epochs": 2}},
    "eagle3 3 epochs": {"training": {"num_epochs": 3}},
    "eagle3 4 epochs": {"training": {"num_epochs": 4}},
    "eagle1 4 epochs": {"kind": "eagle1", "training": {"num_epochs": 4}},
    "eagle3 batch 1": {"training": {"batch_size": 1}},
    "eagle3 greedy answers": {"answers": 0},
    "eagle3 sampled answers": {"answers": -1},
    "eagle3 wide": {"shape": {"intermediate_size": 3072}},
    "eagle3 18 heads": {"shape": {"num_attention_heads": 18, "num_key_value_heads": 6}},
    "eagle3.1": {"draft": {"norm_output": True, "fc_norm": True}},
    "dspark": {"kind": "dspark", "draft": {"num_draft_layers": 2}},
}
CONFIGS: dict[str, type[TrainConfig]] = {"eagle3": TrainConfig, "eagle1": Eagle1Config, "dspark": DsparkConfig}


class RealConfig(Section):
    """Measure drafts of one real target."""

    target_model_path: Path = Field(
        default_factory=default_directory, description="default: what `make real-target` got"
    )
    output_dir: Path = Path("outputs/real_target")
    stages: tuple[str, ...] = Field(STAGES, description=", ".join(STAGES))
    train_prompts: tuple[Path, ...] = Field((), description="jsonl or json of prompts; default: the package's GSM8K")
    code_prompts: int = Field(3000, ge=0, description="functions of the standard library to write, beside the files")
    num_prompts: int = Field(2600, ge=8, description="prompts to answer, drawn from all files")
    temperatures: tuple[float, ...] = Field((0.0, 0.8), description="of the answers; each prompt gets one of them")
    max_tokens: int = Field(256, ge=8, description="tokens of one answer at most")
    answer_with: Literal["hf", "vllm", "sglang"] = "hf"
    answer_dtype: Literal["float32", "bfloat16"] = "float32"
    answer_batch: int = Field(32, ge=1, description="prompts answered together")
    drafts: tuple[str, ...] = Field(tuple(DRAFTS), description=", ".join(DRAFTS))
    sizes: tuple[float, ...] = Field(
        (0.03125, 0.0625, 0.125, 0.25, 1.0), description="shares of the data; of eagle3, eagle1"
    )
    variant_size: float = Field(0.125, gt=0, le=1, description="share of the data for the other drafts")
    seeds: tuple[int, ...] = Field(
        (0, 1, 2), description="of eagle3 and eagle1, each size; other drafts take the first"
    )
    on_all_data: tuple[str, ...] = Field(("eagle3 3 epochs",), description="trained on all data as well, one seed")
    num_epochs: int = Field(1, ge=1)
    batch_size: int = Field(2, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    eagle1_learning_rate: float = Field(2e-3, gt=0)
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of the training")
    states_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the target that is captured")
    draft_vocab_size: int = Field(8000, ge=8)
    benchmark_list: tuple[str, ...] = ("gsm8k:40", "humaneval:24", "math500:24", "mtbench:24")
    data_dir: Path | None = Field(None, description="local files of benchmarks the package does not ship, as alpaca")
    estimated_prompts: int = Field(16, ge=1, description="prompts of each benchmark to estimate acceptance on")
    decoded_prompts: int = Field(12, ge=1, description="prompts of each benchmark to decode")
    max_new_tokens: int = Field(128, ge=2, description="tokens decoded for each prompt")
    timed_draft: str = Field("eagle3 3 epochs", description="that of the stages time and engines: all data, first seed")
    timed_prompts: int = Field(6, ge=1)
    timed_dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    timed_batches: tuple[int, ...] = (1, 4)
    engine_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    engine_steps: tuple[int, ...] = Field((2, 5), description="drafted tokens of a pass in the engines")
    engine_rounds: int = Field(3, ge=1, description="runs of each engine, in turns")

    @property
    def cells(self) -> list[Cell]:
        """First the drafts at `variant_size`, one seed; then sizes and seeds of eagle3 and eagle1; then all data."""
        curve = [name for name in self.drafts if name in ("eagle3", "eagle1")]
        cells = [Cell(name, self.variant_size, self.seeds[0]) for name in self.drafts]
        cells += [Cell(name, size, seed) for size in sorted(self.sizes) for seed in self.seeds for name in curve]
        return list(dict.fromkeys(cells + [Cell(name, self.largest, self.seeds[0]) for name in self.on_all_data]))

    @property
    def largest(self) -> float:
        """The share of the data that the decoded drafts were trained on."""
        return max(*self.sizes, self.variant_size)

    @property
    def timed_cell(self) -> Cell:
        return Cell(self.timed_draft, self.largest, self.seeds[0])


@dataclass(frozen=True)
class Cell:
    """One training: a draft of DRAFTS, on the first `size` of the samples."""

    draft: str
    size: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.draft.replace(' ', '_')}-{self.size:g}-{self.seed}"


def main() -> None:
    config = parse_config(RealConfig, description=__doc__ or "")
    check(config)
    out = config.output_dir.absolute()
    out.mkdir(parents=True, exist_ok=True)
    stages = {"answers": answer, "states": capture, "train": train, "decode": decode, "time": measure_time,
              "engines": measure_engines, "report": write_results}  # fmt: skip
    for name in STAGES:
        if name in config.stages:
            info(f"== {name}")
            with nullcontext() if name in ("train", "decode") else lock_directory(out, "output_dir"):
                stages[name](config, out)


def check(config: RealConfig) -> None:
    if not (config.target_model_path / "config.json").is_file():
        raise ConfigError(
            f"target_model_path {config.target_model_path}: no model there; `make real-target` fetches one"
        )
    for flag, given, known in (("stages", config.stages, STAGES), ("drafts", config.drafts, DRAFTS),
                               ("on_all_data", config.on_all_data, DRAFTS)):  # fmt: skip
        for name in given:
            if name not in known:
                raise ConfigError(f"{flag}: unknown '{name}'{suggest(name, known)}")
    trained = [cell.draft for cell in config.cells if cell.size == config.largest]
    if {"time", "engines"} & set(config.stages) and config.timed_draft not in trained:
        raise ConfigError(f"timed_draft: '{config.timed_draft}' is not trained on all data; expected one of {trained}")


# ----------------------------------------------------------------------------------------------------------------- data


def answer(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/train.jsonl and eval.jsonl: prompts of the training and of the benchmarks, answered by the target."""
    answer_benchmarks(config, out)
    if (out / "train.jsonl").exists():
        return
    if not (out / "prompts.jsonl").exists():
        write_atomically(out / "prompts.jsonl", "".join(f"{json.dumps(row)}\n" for row in choose_prompts(config)))
    words = ["--raw-data-file", str(out / "prompts.jsonl"), "--output-dir", str(out / "answers"), "--output-file",
             str(out / "train.jsonl"), "--max-tokens", str(config.max_tokens), "--num-per-shard", "512",
             "--temperature", *map(str, config.temperatures)]  # fmt: skip
    started = time.monotonic()
    with answering_server(config, out) as flags:
        call("scripts/generate_data_by_target.py", *words, *flags)
    write_json(out / "answers.json", {"minutes": (time.monotonic() - started) / 60})


def answer_benchmarks(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/eval.jsonl: greedy fp32 answers, in this process; ids are BENCHMARK-NUMBER."""
    if (out / "eval.jsonl").exists():
        return
    rows = [
        {"id": f"{name}-{number}", "conversations": [{"role": "user", "content": text}]}
        for name, texts in benchmark_texts(config.benchmark_list, config.data_dir).items()
        for number, text in enumerate(texts)
    ]
    write_atomically(out / "eval_prompts.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    call(
        "scripts/generate_data_by_target.py", "--raw-data-file", str(out / "eval_prompts.jsonl"), "--output-dir",
        str(out / "eval_answers"), "--output-file", str(out / "eval.jsonl"), "--max-tokens", str(config.max_new_tokens),
        "--temperature", "0", "--target-backend", "hf", "--model-name", str(config.target_model_path),
        "--target-dtype", "float32", "--batch-size", str(config.answer_batch),
    )  # fmt: skip


def choose_prompts(config: RealConfig) -> list[dict[str, Any]]:
    """Rows of one user turn each, in random order, without any prompt that is decoded later."""
    evaluated = {text for texts in benchmark_texts(config.benchmark_list, config.data_dir).values() for text in texts}
    texts = training_prompts(config.train_prompts, config.code_prompts)
    kept = [text for text in texts if text not in evaluated]
    random.Random(0).shuffle(kept)
    info(f"{len(kept[: config.num_prompts]):,} of {len(texts):,} prompts; {len(texts) - len(kept)} are evaluated")
    return [{"conversations": [{"role": "user", "content": text}]} for text in kept[: config.num_prompts]]


@contextmanager
def answering_server(config: RealConfig, out: Path) -> Iterator[list[str]]:
    """Flags that say who answers; a server is there for as long as it is asked."""
    target = str(config.target_model_path)
    if config.answer_with == "hf":
        flags = ["--target-backend", "hf", "--model-name", target, "--target-dtype", config.answer_dtype]
        yield [*flags, "--batch-size", str(config.answer_batch)]
        return
    options = ServingOptions(
        config.answer_with, target, dtype=config.answer_dtype, max_length=2048, concurrency=config.answer_batch,
        log_dir=out / "logs",
    )  # fmt: skip
    with ServingSession(options) as session:
        yield ["--server-address-port", session.url, "--max-concurrency", str(config.answer_batch)]


def aux_layers(config: RealConfig, rule: str) -> tuple[int, ...]:
    """default: that of the package; high: its last one near the top; spread: first, middle and last possible one."""
    num_layers = int(load_config(config.target_model_path).get_text_config().num_hidden_layers)
    default = default_aux_layer_ids(num_layers)[0]
    last = num_layers - 2
    return {"default": default, "high": (*default[:-1], last), "spread": (0, last // 2, last)}[rule]


def capture(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/states: bf16, every layer that an EAGLE-3 draft of `--drafts` reads; and the parts of the data."""
    if not (out / "states" / "eval" / "manifest.json").exists():
        capture_answers(config, out)
    for cell in config.cells:
        first_samples(config, out, cell)


def capture_answers(config: RealConfig, out: Path) -> None:
    rules = {DRAFTS[name].get("aux", "default") for name in (*config.drafts, *config.on_all_data)}
    union = sorted({layer for rule in rules for layer in aux_layers(config, rule)})
    call(
        "scripts/capture_hidden_states.py", "--target-model-path", str(config.target_model_path), "--train-data-path",
        str(out / "train.jsonl"), "--eval-data-path", str(out / "eval.jsonl"), "--offline-dir", str(out / "states"),
        "--cache-dir", str(out / "cache"), "--target-backend", "hf", "--target-dtype", config.states_dtype,
        "--max-length", "1024", "--shard-mb", "128", "--aux-layer-ids", *map(str, union),
    )  # fmt: skip


def first_samples(config: RealConfig, out: Path, cell: Cell) -> TokenizedDataset:
    """The first of the captured samples, those that the cell is trained on, as a dataset of its own."""
    whole = OfflinePart(out / "states" / "train").dataset
    count, indices, kind = max(1, round(cell.size * len(whole))), list(range(len(whole))), ""
    if (place := DRAFTS[cell.draft].get("answers")) is not None:
        temperature = config.temperatures[place]
        with (out / "train.jsonl").open(encoding="utf-8") as file:
            chosen = {row["id"] for row in map(json.loads, file) if row["temperature"] == temperature}
        indices, kind = [index for index in indices if whole.sample_id(index) in chosen], f"_t{temperature:g}"
    directory = out / "cache" / f"first_{count}{kind}_{whole.fingerprint[:12]}"
    if not directory.exists():
        with atomic_directory(directory) as temporary:
            writer = StoreWriter(temporary)
            for index in indices[:count]:
                sample = whole[index]
                ids, mask = sample.input_ids_L.numpy(), sample.loss_mask_L.numpy()
                writer.add(sample.sample_id, whole.line(index), ids, mask)
            writer.finish({**whole.key, "first_samples": f"{count}{kind}"})
    return TokenizedDataset.open(directory)


# ---------------------------------------------------------------------------------------------------------------- train


def train(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/drafts/CELL: an exported draft; OUTPUT_DIR/drafts/CELL.json: what it was trained on."""
    with progress(len(config.cells), "train", "draft") as bar:
        for cell in config.cells:
            with taken(out, cell.name) as is_taken:
                if not is_taken and not (out / "drafts" / f"{cell.name}.json").exists():
                    train_cell(config, out, cell)
            bar.update(1)


def train_cell(config: RealConfig, out: Path, cell: Cell) -> None:
    info(f"\n-- {cell.name}")
    samples = first_samples(config, out, cell)
    run = out / "runs" / cell.name
    settings = train_config(config, out, cell, run)
    started = time.process_time()
    with open_world(settings.distributed) as world, open_reporter(settings, world) as reporter, catch_signals() as stop:
        data = RunData(samples, None, load_data(settings).states)
        with open_target(settings, world, data) as engine:
            models = load_models(settings, engine.info, data, world)
            steps = Trainer(settings, world, data, engine, models, reporter, stop).train().step
    if stop:
        raise KeyboardInterrupt
    minutes = (time.process_time() - started) / 60
    facts = {
        "draft": cell.draft, "size": cell.size, "seed": cell.seed, "samples": len(samples),
        "supervised_tokens": int(samples.supervised_counts.sum()), "steps": steps, "cpu_minutes": minutes,
        "learning_rate": settings.optimizer.learning_rate,
        "aux_layers": engine.info.aux_layer_ids, "parameters": sum(p.numel() for p in models.draft.parameters()),
    }  # fmt: skip
    last = max(run.glob("step_*"), key=lambda path: int(path.name[5:]))
    draft = out / "drafts" / cell.name
    shutil.rmtree(draft, ignore_errors=True)
    call("scripts/export_draft.py", "--checkpoint", str(last), "--output-dir", str(draft), "--dtype", "float32")
    facts["estimated"] = estimate(config, out, draft, engine.info.aux_layer_ids)
    write_json(out / "drafts" / f"{cell.name}.json", facts)
    shutil.rmtree(run)


def estimate(config: RealConfig, out: Path, path: Path, aux_layer_ids: tuple[int, ...]) -> dict[str, Any]:
    """Per benchmark, the walk over the target's own greedy answers in chains of 5: what a greedy chain will decode."""
    files = open_target_files(TargetSection(target_model_path=str(config.target_model_path)), "cpu")
    part, draft = OfflinePart(out / "states" / "eval"), files.load_draft(path)
    engine = OfflineEngine([part], aux_layer_ids)
    to_batch = BatchMaker(files.head, len(aux_layer_ids), files.device, torch.float32)
    num_steps = draft.num_training_steps(CHAIN)
    settings = TTTSettings(num_steps=num_steps, collect_rows=True)
    groups: dict[str, list[TokenizedSample]] = {}
    for index in range(len(part.dataset)):
        sample = part.dataset[index]
        groups.setdefault(sample.sample_id.rsplit("-", 1)[0], []).append(sample)
    found: dict[str, Any] = {}
    for name, all_samples in groups.items():
        samples = all_samples[: config.estimated_prompts]
        result = evaluate(
            lambda batch: draft(batch, files.head, settings), samples, engine, to_batch, num_steps, CHAIN, batch_size=4
        )
        found[name] = {key: getattr(result, key) for key in ESTIMATES}
    return found


def train_config(config: RealConfig, out: Path, cell: Cell, run: Path) -> TrainConfig:
    """The settings of a cell, as the training scripts would read them."""
    changes = DRAFTS[cell.draft]
    kind = changes.get("kind", "eagle3")
    rate = config.eagle1_learning_rate if kind == "eagle1" else config.learning_rate
    sections: dict[str, dict[str, Any]] = {
        "target": {"target_model_path": str(config.target_model_path), "target_backend": "hf"},
        "data": {"cache_dir": out / "cache"},
        "draft": {},
        "training": {
            "offline_dir": out / "states", "num_epochs": config.num_epochs, "batch_size": config.batch_size,
            "seed": cell.seed, "eval_interval": 0, "precision": config.precision,
        },
        "optimizer": {"learning_rate": rate * changes.get("rate", 1.0), "warmup_ratio": 0.05, "lr_schedule": "cosine",
                      "max_grad_norm": 0.5},
        "checkpoint": {"output_dir": run, "save_interval": 200, "save_total_limit": 1},
        "logging": {"log_interval": 50},
    }  # fmt: skip
    if kind == "eagle3":
        sections["target"]["aux_layer_ids"] = aux_layers(config, changes.get("aux", "default"))
        sections["draft"]["draft_vocab_size"] = config.draft_vocab_size
        if "shape" in changes:
            derived = DraftConfig.from_target(load_config(config.target_model_path))
            shape = sections["draft"]["draft_model_config"] = run.with_name(f"{run.name}.json")
            write_json(shape, exported_config(derived.replace(**changes["shape"]), "float32"))
        sections["training"]["ttt_length"] = CHAIN
    if kind == "eagle1":
        sections["training"]["eval_epochs"] = None
        sections["optimizer"]["schedule_steps"] = None
    for name in ("draft", "training", "optimizer"):
        sections[name] |= changes.get(name, {})
    return CONFIGS[kind].model_validate(sections)


if __name__ == "__main__":
    run_script(main)
