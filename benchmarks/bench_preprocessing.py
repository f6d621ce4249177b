"""How fast and in how much memory conversations become tokens: `python benchmarks/bench_preprocessing.py`.

Prints, for one process and one thread: tokens per CPU-second of tokenization with masks alone and of a whole cache
build (reading, recognising, tokenizing, writing, hashing), the growth of memory from few to many conversations, and
CPU-seconds of a vocabulary map of 128,256 / 32,000. Data are made up: multi-turn chats of common words.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pydantic import Field

from specforge_lite.core.log import info, run_script
from specforge_lite.core.settings import Section, parse_config

COMMON = (
    "the of and to in is that for it as with was on be by this are from or have an they which one you were all we more"
    " number total each how many price left buys sells hours minutes apples twice half then 12 3 45 7 100 = + $"
)
WORDS = COMMON.split()


class BenchConfig(Section):
    """What to measure on."""

    target_model_path: Path | None = Field(None, description="tokenizer; default: the shipped tiny target")
    num_conversations: int = Field(100_000, ge=100, description="of the large build; the small one has a tenth")
    num_turns: int = Field(6, ge=2, description="turns per conversation")
    words_per_turn: int = Field(20, ge=1, description="words per turn")
    json_path: Path | None = Field(None, description="also write the figures here")


def main() -> None:
    config = parse_config(BenchConfig, description=__doc__ or "")
    model = config.target_model_path or Path(str(resources.files("specforge_lite.assets") / "tiny_target"))
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "large.jsonl"
        write_chats(data, config.num_conversations, config)
        write_chats(data.with_name("small.jsonl"), config.num_conversations // 10, config)
        figures: dict[str, Any] = {"tokenize_tokens_per_cpu_second": tokenization_speed(data, model)}
        small = in_fresh_process(data.with_name("small.jsonl"), model)
        large = in_fresh_process(data, model)
        figures |= {
            "build_tokens_per_cpu_second": round(large["tokens"] / large["cpu_seconds"]),
            "conversations": config.num_conversations,
            "tokens": large["tokens"],
            "peak_mb_tenth": round(small["peak_mb"], 1),
            "peak_mb": round(large["peak_mb"], 1),
            "growth_bytes_per_conversation": round(
                (large["peak_mb"] - small["peak_mb"]) * 2**20 / (0.9 * config.num_conversations)
            ),
            "vocab_map_cpu_seconds": round(vocabulary_seconds(), 3),
        }
    for name, value in figures.items():
        info(f"{name:32} {value:,}")
    if config.json_path is not None:
        config.json_path.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def write_chats(path: Path, count: int, config: BenchConfig) -> None:
    """Seeded multi-turn conversations in the normal form."""
    chooser = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            turns = [
                {
                    "role": ("user", "assistant")[turn % 2],
                    "content": " ".join(chooser.choices(WORDS, k=config.words_per_turn)),
                }
                for turn in range(config.num_turns)
            ]
            file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")


def tokenization_speed(data: Path, model: Path, count: int = 2000) -> int:
    """Tokens per CPU-second of template, tokenization and mask, on parsed conversations."""
    from specforge_lite.core.hub import load_tokenizer
    from specforge_lite.data.conversations import to_conversation
    from specforge_lite.data.encoding import TokenizerSpec
    from specforge_lite.data.tokenize import ConversationTokenizer, TokenizeOptions

    tokenizer = ConversationTokenizer(TokenizerSpec.from_tokenizer(load_tokenizer(str(model))), TokenizeOptions())
    with open(data, encoding="utf-8") as file:
        conversations = [to_conversation(json.loads(line)) for line, _ in zip(file, range(count))]
    tokenizer(conversations[0])
    start = time.process_time()
    tokens = sum(len(tokenizer(conversation).input_ids) for conversation in conversations)
    return round(tokens / (time.process_time() - start))


def in_fresh_process(data: Path, model: Path) -> dict[str, Any]:
    """Build a cache in a process of its own, so that the peak is this build's alone."""
    command = [sys.executable, __file__, "--build", str(data), str(model)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def build(data: Path, model: Path) -> None:
    """The body of that process."""
    from specforge_lite.core.hub import load_tokenizer
    from specforge_lite.core.sections import DataSection
    from specforge_lite.data.cache import open_or_build_dataset

    tokenizer = load_tokenizer(str(model))
    start = time.process_time()
    dataset = open_or_build_dataset(data, tokenizer, DataSection(cache_dir=data.parent / f"cache-{data.stem}"))
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens": dataset.stats.num_tokens, "cpu_seconds": seconds, "peak_mb": peak}))


def vocabulary_seconds() -> float:
    """CPU-seconds from counts to d2t and t2d, V 128,256, Vd 32,000; the better of two."""
    import numpy as np

    from specforge_lite.data.vocab import build_vocab_map

    counts = np.random.default_rng(0).zipf(1.3, 128_256) % 1000
    seconds = []
    for _ in range(2):
        start = time.process_time()
        build_vocab_map(counts, 128_256, 32_000, "bench")
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        run_script(main)
