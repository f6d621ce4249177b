"""Benchmark prompts: mtbench, gsm8k, humaneval, math500, mbpp, aime, livecodebench, alpaca, or any file of prompts.

Where the rows come from: `--data-dir` if it has a file of that name; else the package, where the licence lets it ship
them; else `datasets`, by name (also with `--from-hub`). Only the last uses the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError, DataError, suggest
from specforge_lite.core.log import info
from specforge_lite.data.prompts import Prompt, category_of, read_prompt, read_rows, read_turns
from specforge_lite.data.sources import FILE_ENDINGS, HubDataset, Source, shipped_file

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are and how a row becomes a prompt. shipped: file among our assets; file_names: of local
    copies, without their ending."""

    hub: HubDataset
    shipped: str | None
    file_names: tuple[str, ...]
    read: Callable[[Row, str], Prompt]


@dataclass(frozen=True)
class BenchmarkRequest:
    """An entry of `--benchmark-list`: NAME or PATH, and how many prompts (None: all there are)."""

    name: str
    num_prompts: int | None

    @classmethod
    def parse(cls, text: str) -> BenchmarkRequest:
        """`mtbench:80`, `gsm8k`, `my/prompts.jsonl:20`. Raises ConfigError."""
        name, colon, count = text.rpartition(":")
        if not colon:
            name, count = text, ""
        if colon and not (count.isdigit() and int(count) > 0):
            raise ConfigError(f"benchmark_list: '{text}': expected NAME:COUNT with a positive count")
        if name not in BENCHMARKS and not Path(name).exists():
            hint, known = suggest(name, BENCHMARKS), f"; known: {', '.join(BENCHMARKS)}"
            near = hint if hint.startswith("; did you") else ""
            raise ConfigError(f"benchmark_list: '{name}' is no benchmark and no file{near}{known}")
        return cls(name, int(count) if count else None)

    @property
    def label(self) -> str:
        """The benchmark's name in rows and charts: a file goes by its name without ending."""
        return self.name if self.name in BENCHMARKS else Path(self.name).name.split(".")[0]


# ------------------------------------------------------------------------------------------------------------ row forms


def _text_of(row: Row, place: str, *keys: str) -> str:
    """The first text under one of `keys`. Raises DataError."""
    for key in keys:
        if isinstance(text := row.get(key), str) and text.strip():
            return text
    raise DataError(f"{place}: expected a text under '{keys[0]}', found keys {', '.join(row) or 'none'}")


def _reader(form: str, category: str, *keys: str) -> Callable[[Row, str], Prompt]:
    """A reader of rows whose text stands under one of `keys`; EAGLE's copies have `turns`. form: around the text."""

    def read(row: Row, place: str) -> Prompt:
        if isinstance(row.get("turns"), list):
            return read_turns(row, place)
        text = form.replace("TEXT", _text_of(row, place, *keys), 1)
        number = row.get("unique_id", row.get("task_id", place))
        return Prompt(str(number), category_of(row, category), (text,), place=place)

    return read


def read_alpaca(row: Row, place: str) -> Prompt:
    """`instruction` and `input`, or EAGLE's `turns`."""
    extra = row.get("input")
    added = f"\n\n{extra}" if isinstance(extra, str) and extra.strip() else ""
    return _reader(f"TEXT{added}", "all", "instruction")(row, place)


def read_mbpp(row: Row, place: str) -> Prompt:
    """`text` (or `prompt`, in the sanitized set) and `test_list`, asked as the authors do (Austin et al. 2021, 3.1)."""
    tests = row.get("test_list")
    if not isinstance(tests, list):
        raise DataError(f"{place}: expected a text under 'text' and a list under 'test_list'")
    text = "You are an expert Python programmer, and here is your task: "
    text += f"{_text_of(row, place, 'text', 'prompt')} Your code should pass these tests:\n\n"
    return Prompt(str(row.get("task_id", place)), "code", (text + "\n".join(map(str, tests)),), place=place)


def read_livecodebench(row: Row, place: str) -> Prompt:
    """`question_content`, with `starter_code` where there is some; categories are the difficulties."""
    text, starter, level = _text_of(row, place, "question_content"), row.get("starter_code"), row.get("difficulty")
    if isinstance(starter, str) and starter.strip():
        text += f"\n\nUse this starter code:\n\n```python\n{starter}\n```"
    category = level if isinstance(level, str) and level else "code"
    return Prompt(str(row.get("question_id", place)), category, (text,), place=place)


def read_file_row(row: Row, place: str) -> Prompt:
    """A row of a user's file: of a benchmark above that no conversation looks like, else of any form."""
    if "question_content" in row:
        return read_livecodebench(row, place)
    return read_mbpp(row, place) if "test_list" in row else read_prompt(row, place)


_MATH = "TEXT\nPlease reason step by step, and put your final answer within \\boxed{}."
_AIME_FILES = ("aime", "aime24", "aime_2024", "aime25", "aime_2025")
BENCHMARKS = {
    name: Benchmark(hub, shipped, file_names, read)
    for name, hub, shipped, file_names, read in (
        ("mtbench", HubDataset("HuggingFaceH4/mt_bench_prompts"), "mtbench.jsonl",
         ("mtbench", "mt_bench", "question"), read_turns),
        ("gsm8k", HubDataset("openai/gsm8k", split="test", configuration="main"), "gsm8k_test.jsonl",
         ("gsm8k", "gsm8k_test", "test"), _reader("TEXT", "math", "question")),
        ("humaneval", HubDataset("openai/openai_humaneval", split="test"), "humaneval.jsonl",
         ("humaneval", "HumanEval"), _reader("Complete the code I provided.\n\nTEXT", "code", "prompt")),
        ("math500", HubDataset("HuggingFaceH4/MATH-500", split="test"), "math500.jsonl",
         ("math500", "MATH-500", "test"), _reader(_MATH, "math", "problem")),
        ("mbpp", HubDataset("google-research-datasets/mbpp", split="test"), None,
         ("mbpp", "sanitized-mbpp"), read_mbpp),
        ("aime", HubDataset("HuggingFaceH4/aime_2024"), None,
         _AIME_FILES, _reader(_MATH, "math", "problem", "question", "Problem")),
        ("livecodebench", HubDataset("livecodebench/code_generation_lite", split="test"), None,
         ("livecodebench", "test6", "test5", "test"), read_livecodebench),
        ("alpaca", HubDataset("tatsu-lab/alpaca"), None, ("alpaca", "alpaca80", "alpaca_data"), read_alpaca),
    )
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- loading


def load_prompts(
    request: BenchmarkRequest, data_dir: Path | None = None, num_shots: int = 0, from_hub: bool = False
) -> list[Prompt]:
    """The first prompts of a benchmark, in the order of its file; all of them where it has fewer than asked for.

    num_shots: worked examples put before each gsm8k question (0 to 5). from_hub: not from the package. Raises DataError
    where the rows cannot be had or read, ConfigError for num_shots.
    """
    bench = BENCHMARKS.get(request.name)
    source = _source(request, bench, data_dir, from_hub)
    prompts = read_rows(source, request.num_prompts, bench.read if bench else read_file_row)
    if request.num_prompts is not None and len(prompts) < request.num_prompts:
        info(f"{request.label}: all of its {len(prompts)} prompts ({request.num_prompts} asked for)")
    if request.name == "gsm8k" and num_shots:
        shots = _gsm8k_shots(num_shots)
        prompts = [replace(p, turns=(f"{shots}Question: {p.turns[0]}\nAnswer:",)) for p in prompts]
    return prompts


def _source(request: BenchmarkRequest, bench: Benchmark | None, data_dir: Path | None, from_hub: bool) -> Source:
    if bench is None:
        return Source(request.label, path=Path(request.name))
    if data_dir is not None:
        if not data_dir.is_dir():
            raise DataError(f"data_dir {data_dir}: no such directory")
        for name, ending in product(bench.file_names, FILE_ENDINGS):
            if (data_dir / f"{name}{ending}").exists():
                return Source(request.name, path=data_dir / f"{name}{ending}")
    if bench.shipped is not None and not from_hub:
        return Source(request.name, path=shipped_file(bench.shipped))
    info(
        f"{request.name}: reading {bench.hub.repository} through `datasets` (--data-dir DIR reads a local copy instead)"
    )
    return Source(request.name, hub=bench.hub)


def _gsm8k_shots(count: int) -> str:
    rows = [json.loads(line) for line in shipped_file("gsm8k_shots.jsonl").read_text(encoding="utf-8").splitlines()]
    if count > len(rows):
        raise ConfigError(f"num_shots: expected 0..{len(rows)}, found {count}")
    return "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:count])
