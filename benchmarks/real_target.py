"""A real language model from prompts to tables: acceptance, wall clock, EAGLE-3 against EAGLE-1, more data.

    make real-target                                                     # once: SmolLM2-135M-Instruct, 540 MB
    python benchmarks/real_target.py --train-prompts gsm8k_train.jsonl alpaca.json      # a night on two cores
    python benchmarks/real_target.py --num-prompts 200 --drafts eagle3 eagle1 --sizes 1 --benchmark-list gsm8k:12

Stages, one after the other; `--stages` picks some of them. What is done lies in OUTPUT_DIR and is not done again, and a
stage that was killed goes on where it was:

    answers   the target answers the prompts, part of them greedily, part of them sampled
    states    its hidden states on these answers, with every layer that a draft reads
    train     one draft per name, data size and seed
    decode    each draft on prompts not trained on: chain and tree, greedy and at temperature 1
    time      our decoder against transformers' generate and assisted generation; systems take turns
    engines   the same draft served by vLLM and SGLang, with and without it
    report    real_target.md and .png from what there is
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from pydantic import Field

from benchmarks.bench_inference import one_layer_assistant
from benchmarks.compare_eagle1_eagle3 import call
from benchmarks.real_report import write_results
from benchmarks.smollm2 import default_directory
from specforge_lite.benchmark.prompts import BenchmarkRequest, load_prompts
from specforge_lite.capture.base import default_aux_layer_ids
from specforge_lite.capture.offline import OfflinePart
from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.core.files import atomic_directory, lock_directory, write_atomically, write_json
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import info, progress, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.data.prompts import ChatEncoder
from specforge_lite.data.store import StoreWriter, TokenizedDataset
from specforge_lite.inference import GenerationSettings, SpeculativeModel, TreeShape
from specforge_lite.inference.block_drafter import BlockDrafter
from specforge_lite.serving.session import ServingOptions, ServingSession
from specforge_lite.training.block import DsparkConfig
from specforge_lite.training.distributed import open_world
from specforge_lite.training.eagle1 import Eagle1Config
from specforge_lite.training.loop import Trainer
from specforge_lite.training.reporting import catch_signals, open_reporter
from specforge_lite.training.settings import TrainConfig
from specforge_lite.training.wiring import RunData, load_data, load_models, open_target

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("answers", "states", "train", "decode", "time", "engines", "report")
SHAPES = {"chain": TreeShape.chain(5), "tree": TreeShape(24, 5, 6)}
# What differs from the plain EAGLE-3 draft: settings of the trainer, by section. `aux`: a rule of `aux_layers`.
DRAFTS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3 aux high": {"aux": "high"},
    "eagle3 aux spread": {"aux": "spread"},
    "eagle3 random init": {"draft": {"init": "random"}},
    "eagle3 K3": {"training": {"ttt_length": 3}},
    "eagle3 K7": {"training": {"ttt_length": 7}},
    "eagle3 lk": {"training": {"loss": "lk"}},
    "eagle3 lk_alpha": {"training": {"loss": "lk_alpha"}},
    "eagle3 lr 2e-4": {"optimizer": {"learning_rate": 2e-4}},
    "eagle3 lr 1e-3": {"optimizer": {"learning_rate": 1e-3}},
    "eagle3.1": {"draft": {"norm_output": True, "fc_norm": True}},
    "eagle1": {"kind": "eagle1"},
    "eagle1 lr 2e-4": {"kind": "eagle1", "optimizer": {"learning_rate": 2e-4}},
    "eagle1 lr 1e-3": {"kind": "eagle1", "optimizer": {"learning_rate": 1e-3}},
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
    num_prompts: int = Field(6000, ge=8, description="prompts to answer, drawn from all files")
    temperatures: tuple[float, ...] = Field((0.0, 0.8), description="of the answers; each prompt gets one of them")
    max_tokens: int = Field(320, ge=8, description="tokens of one answer at most")
    answer_with: Literal["hf", "vllm", "sglang"] = "hf"
    answer_dtype: Literal["float32", "bfloat16"] = "float32"
    answer_batch: int = Field(32, ge=1, description="prompts answered together")
    drafts: tuple[str, ...] = Field(tuple(DRAFTS), description=", ".join(DRAFTS))
    sizes: tuple[float, ...] = Field(
        (0.0625, 0.125, 0.25, 0.5, 1.0), description="shares of the data; of eagle3, eagle1"
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), description="of eagle3 and eagle1; the other drafts take the first")
    num_epochs: int = Field(6, ge=1)
    batch_size: int = Field(2, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    draft_vocab_size: int = Field(8000, ge=8)
    benchmark_list: tuple[str, ...] = ("gsm8k:40", "humaneval:20", "math500:20", "mtbench:20")
    data_dir: Path | None = Field(None, description="local files of benchmarks the package does not ship, as alpaca")
    max_new_tokens: int = Field(128, ge=2, description="tokens decoded for each prompt")
    timed_draft: str = Field("eagle3", description="the draft of the stages time and engines, largest size, first seed")
    timed_prompts: int = Field(6, ge=1)
    timed_dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    timed_batches: tuple[int, ...] = (1, 4)

    @property
    def cells(self) -> list[Cell]:
        """Whole rows first: every draft with all data and one seed, then more seeds, then smaller sizes."""
        largest, first = max(self.sizes), self.seeds[0]
        curve = [name for name in self.drafts if name in ("eagle3", "eagle1")]
        cells = [Cell(name, largest, first) for name in self.drafts]
        cells += [Cell(name, largest, seed) for seed in self.seeds[1:] for name in curve]
        smaller = [size for size in self.sizes if size != largest]
        return cells + [Cell(name, size, seed) for seed in self.seeds for size in smaller for name in curve]


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
    with lock_directory(out, "output_dir"):
        for name in STAGES:
            if name in config.stages:
                info(f"== {name}")
                stages[name](config, out)


def check(config: RealConfig) -> None:
    if not (config.target_model_path / "config.json").is_file():
        raise ConfigError(
            f"target_model_path {config.target_model_path}: no model there; `make real-target` fetches one"
        )
    for flag, given, known in (("stages", config.stages, STAGES), ("drafts", config.drafts, DRAFTS)):
        for name in given:
            if name not in known:
                raise ConfigError(f"{flag}: unknown '{name}'{suggest(name, known)}")


# ----------------------------------------------------------------------------------------------------------------- data


def answer(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/train.jsonl: prompts, answered by the target."""
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


def choose_prompts(config: RealConfig) -> list[dict[str, Any]]:
    """Rows of one user turn each, in random order, without any prompt that is decoded later."""
    evaluated = {text for texts in benchmark_texts(config).values() for text in texts}
    sources = [BenchmarkRequest(str(path), None) for path in config.train_prompts] or [BenchmarkRequest("gsm8k", None)]
    texts = dict.fromkeys(prompt.turns[0] for source in sources for prompt in load_prompts(source))
    kept = [text for text in texts if text not in evaluated]
    random.Random(0).shuffle(kept)
    info(f"{len(kept[: config.num_prompts]):,} of {len(texts):,} prompts; {len(texts) - len(kept)} are evaluated")
    return [{"conversations": [{"role": "user", "content": text}]} for text in kept[: config.num_prompts]]


def benchmark_texts(config: RealConfig) -> dict[str, list[str]]:
    """First turns of each benchmark's prompts."""
    requests = [BenchmarkRequest.parse(text) for text in config.benchmark_list]
    return {r.label: [prompt.turns[0] for prompt in load_prompts(r, config.data_dir)] for r in requests}


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
    """OUTPUT_DIR/states: bf16, every layer that an EAGLE-3 draft of `--drafts` reads."""
    if (out / "states" / "train" / "manifest.json").exists():
        return
    rules = {DRAFTS[name].get("aux", "default") for name in config.drafts}
    union = sorted({layer for rule in rules for layer in aux_layers(config, rule)})
    call(
        "scripts/capture_hidden_states.py", "--target-model-path", str(config.target_model_path), "--train-data-path",
        str(out / "train.jsonl"), "--offline-dir", str(out / "states"), "--cache-dir", str(out / "cache"),
        "--target-backend", "hf", "--target-dtype", "float32", "--max-length", "1024", "--shard-mb", "128",
        "--aux-layer-ids", *map(str, union),
    )  # fmt: skip


def first_samples(out: Path, size: float) -> TokenizedDataset:
    """The first `size` of the captured samples, as a dataset of its own."""
    whole = OfflinePart(out / "states" / "train").dataset
    count = max(1, round(size * len(whole)))
    directory = out / "cache" / f"first_{count}_{whole.fingerprint[:12]}"
    if not directory.exists():
        with atomic_directory(directory) as temporary:
            writer = StoreWriter(temporary)
            for index in range(count):
                sample = whole[index]
                ids, mask = sample.input_ids_L.numpy(), sample.loss_mask_L.numpy()
                writer.add(sample.sample_id, whole.line(index), ids, mask)
            writer.finish({**whole.key, "first_samples": count})
    return TokenizedDataset.open(directory)


# ---------------------------------------------------------------------------------------------------------------- train


def train(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/drafts/CELL: an exported draft; OUTPUT_DIR/drafts/CELL.json: what it was trained on."""
    with progress(len(config.cells), "train", "draft") as bar:
        for cell in config.cells:
            if not (out / "drafts" / f"{cell.name}.json").exists():
                train_cell(config, out, cell)
            bar.update(1)


def train_cell(config: RealConfig, out: Path, cell: Cell) -> None:
    info(f"\n-- {cell.name}")
    samples = first_samples(out, cell.size)
    run = out / "runs" / cell.name
    settings = train_config(config, out, cell, run)
    started = time.process_time()
    with open_world(settings.distributed) as world, open_reporter(settings, world) as reporter, catch_signals() as stop:
        data = RunData(samples, None, load_data(settings).states)
        with open_target(settings, world, data) as engine:
            models = load_models(settings, engine.info, data, world)
            Trainer(settings, world, data, engine, models, reporter, stop).train()
    if stop:
        raise KeyboardInterrupt
    facts = {
        "draft": cell.draft, "size": cell.size, "seed": cell.seed, "samples": len(samples),
        "supervised_tokens": int(samples.supervised_counts.sum()), "cpu_minutes": (time.process_time() - started) / 60,
        "aux_layers": engine.info.aux_layer_ids, "parameters": sum(p.numel() for p in models.draft.parameters()),
    }  # fmt: skip
    last = max(run.glob("step_*"), key=lambda path: int(path.name[5:]))
    draft = out / "drafts" / cell.name
    shutil.rmtree(draft, ignore_errors=True)
    call("scripts/export_draft.py", "--checkpoint", str(last), "--output-dir", str(draft), "--dtype", "float32")
    write_json(draft.with_suffix(draft.suffix + ".json"), facts)
    shutil.rmtree(run)


def train_config(config: RealConfig, out: Path, cell: Cell, run: Path) -> TrainConfig:
    """The settings of a cell, as the training scripts would read them."""
    changes = DRAFTS[cell.draft]
    kind = changes.get("kind", "eagle3")
    sections: dict[str, dict[str, Any]] = {
        "target": {"target_model_path": str(config.target_model_path), "target_backend": "hf"},
        "data": {"cache_dir": out / "cache"},
        "draft": {},
        "training": {
            "offline_dir": out / "states", "num_epochs": config.num_epochs, "batch_size": config.batch_size,
            "seed": cell.seed, "eval_interval": 0,
        },
        "optimizer": {"learning_rate": config.learning_rate, "warmup_ratio": 0.05, "lr_schedule": "cosine",
                      "max_grad_norm": 0.5},
        "checkpoint": {"output_dir": run, "save_interval": 200, "save_total_limit": 1},
        "logging": {"log_interval": 50},
    }  # fmt: skip
    if kind == "eagle3":
        sections["target"]["aux_layer_ids"] = aux_layers(config, changes.get("aux", "default"))
        sections["draft"]["draft_vocab_size"] = config.draft_vocab_size
        sections["training"]["ttt_length"] = 5
    if kind == "eagle1":
        sections["training"]["eval_epochs"] = None
        sections["optimizer"]["schedule_steps"] = None
    for name in ("draft", "training", "optimizer"):
        sections[name] |= changes.get(name, {})
    return CONFIGS[kind].model_validate(sections)


# --------------------------------------------------------------------------------------------------------------- decode


def encoded_prompts(config: RealConfig) -> dict[str, list[list[int]]]:
    chat = ChatEncoder.of_model(str(config.target_model_path))
    return {
        name: [chat.encode([{"role": "user", "content": text}]) for text in texts]
        for name, texts in benchmark_texts(config).items()
    }


def decode(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/decoded/CELL.json: per benchmark, shape and temperature the decoder's counts."""
    todo = [cell for cell in config.cells if not (out / "decoded" / f"{cell.name}.json").exists()]
    todo = [cell for cell in todo if (out / "drafts" / f"{cell.name}.json").exists()]
    if not todo:
        return
    prompts = encoded_prompts(config)
    (out / "decoded").mkdir(exist_ok=True)
    with progress(len(todo) * len(prompts), "decode", "benchmark") as bar:
        for cell in todo:
            model = SpeculativeModel.from_pretrained(
                str(config.target_model_path), out / "drafts" / cell.name, dtype="float32"
            )
            found: dict[str, Any] = {}
            for name, ids in prompts.items():
                found[name] = decode_benchmark(config, model, ids, plain_answers(config, out, model, name, ids))
                bar.update(1)
            write_json(out / "decoded" / f"{cell.name}.json", found)


def plain_answers(
    config: RealConfig, out: Path, model: SpeculativeModel, name: str, prompts: list[list[int]]
) -> list[list[int]]:
    """The target's own greedy answers, decoded once for all drafts."""
    path = out / "decoded" / f"plain_{name}_{len(prompts)}_{config.max_new_tokens}.json"
    if not path.exists():
        output = model.run(prompts, GenerationSettings(config.max_new_tokens), speculative=False)
        write_json(path, output.new_tokens)
    answers: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
    return answers


def decode_benchmark(
    config: RealConfig, model: SpeculativeModel, prompts: list[list[int]], plain: list[list[int]]
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


def timed_draft(config: RealConfig, out: Path) -> Path | None:
    draft = out / "drafts" / Cell(config.timed_draft, max(config.sizes), config.seeds[0]).name
    return draft if draft.exists() else None


def measure_time(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/time.json: tokens per second of every system, dtype and batch size, one value per round."""
    draft, path = timed_draft(config, out), out / "time.json"
    if path.exists() or draft is None:
        return
    prompts = next(iter(encoded_prompts(config).values()))[: config.timed_prompts * max(config.timed_batches)]
    rows = []
    for dtype in config.timed_dtypes:
        model = SpeculativeModel.from_pretrained(str(config.target_model_path), draft, dtype=dtype)
        for batch in config.timed_batches:
            groups = [prompts[at : at + batch] for at in range(0, config.timed_prompts * batch, batch)]
            rows += time_systems(config, model, [group for group in groups if len(group) == batch], dtype)
    write_json(path, rows)


def time_systems(
    config: RealConfig, model: SpeculativeModel, groups: list[list[list[int]]], dtype: str
) -> list[dict[str, Any]]:
    """All systems on one group of prompts, then on the next, so that a machine whose speed drifts favours none."""
    network, length = model.target.model, config.max_new_tokens
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

    def ours(group: list[list[int]], shape: TreeShape | None) -> int:
        settings = GenerationSettings(length, eos_token_id=[], shape=shape)
        return model.run(group, settings, speculative=shape is not None).stats.num_tokens

    batch = len(groups[0])
    systems: dict[str, Any] = {"generate": lambda group: transformers(group, None)}
    if batch == 1:  # transformers assists one prompt at a time
        systems["assisted"] = lambda group: transformers(group, assistant)
    systems |= {"plain": lambda group: ours(group, None)}
    systems |= {name: lambda group, shape=shape: ours(group, shape) for name, shape in SHAPES.items()}
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
        for name, found in rates.items()
    ]  # fmt: skip


def measure_engines(config: RealConfig, out: Path) -> None:
    """OUTPUT_DIR/engines_NAME.jsonl: rows of the package's own benchmark."""
    draft = timed_draft(config, out)
    for backend in ("vllm", "sglang"):
        if draft is not None and (ROOT / f".venv-{backend}").exists():
            call(
                "bench_model_speedup.py", "--model-path", str(config.target_model_path), "--draft-model-path",
                str(draft), "--backend", backend, "--target-dtype", "float32", "--config-list", "1,5,1,6",
                "--benchmark-list", f"gsm8k:{config.timed_prompts}", "--max-new-tokens", str(config.max_new_tokens),
                "--output", str(out / f"engines_{backend}.jsonl"),
            )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
