"""Benchmark prompts: mtbench, gsm8k, humaneval, math500, mbpp, aime, livecodebench, alpaca, or any file of prompts.

Where the rows come from: `--data-dir` if it has a file of that name; else the package, where the licence lets it ship
them; else `datasets`, by name (also with `--from-hub`). Only the last uses the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError, DataError, suggest
from specforge_lite.core.log import info
from specforge_lite.data.prompts import Prompt, category_of, read_prompt, read_rows, read_turns
from specforge_lite.data.sources import FILE_ENDINGS, HubDataset, Source, shipped_file

MATH_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are and how a row becomes a prompt. shipped: file among our assets."""

    name: str
    hub: HubDataset
    shipped: str | None
    file_names: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Prompt]


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
            raise ConfigError(
                f"benchmark_list: '{name}' is no benchmark and no file{suggest(name, BENCHMARKS)}"
                f"{'' if suggest(name, BENCHMARKS).startswith('; known') else '; known: ' + ', '.join(BENCHMARKS)}"
            )
        return cls(name, int(count) if count else None)

    @property
    def label(self) -> str:
        """The benchmark's name in rows and charts: a file goes by its name without ending."""
        return self.name if self.name in BENCHMARKS else Path(self.name).name.split(".")[0]


# ------------------------------------------------------------------------------------------------------------ row forms


def _text_reader(keys: tuple[str, ...], category: str, form: str) -> Callable[[dict[str, Any], str], Prompt]:
    def read(row: dict[str, Any], place: str) -> Prompt:
        if isinstance(row.get("turns"), list):
            return read_turns(row, place)
        text = next((row[key] for key in keys if isinstance(row.get(key), str) and row[key].strip()), None)
        if text is None:
            raise DataError(f"{place}: expected a text under '{keys[0]}', found keys {', '.join(row) or 'none'}")
        number = row.get("unique_id", row.get("task_id", place))
        return Prompt(str(number), category_of(row, category), (form.format(text),), place=place)

    return read


def read_alpaca(row: dict[str, Any], place: str) -> Prompt:
    """`instruction` and `input`, or EAGLE's `turns`."""
    if isinstance(row.get("turns"), list):
        return read_turns(row, place)
    instruction, extra = row.get("instruction"), row.get("input")
    if not isinstance(instruction, str) or not instruction.strip():
        raise DataError(f"{place}: expected a text under 'instruction'")
    text = f"{instruction}\n\n{extra}" if isinstance(extra, str) and extra.strip() else instruction
    return Prompt(place, "all", (text,), place=place)


def read_mbpp(row: dict[str, Any], place: str) -> Prompt:
    """`text` (or `prompt`, in the sanitized set) and `test_list`, asked as the authors do (Austin et al. 2021, 3.1)."""
    text, tests = row.get("text", row.get("prompt")), row.get("test_list")
    if not isinstance(text, str) or not text.strip() or not isinstance(tests, list):
        raise DataError(f"{place}: expected a text under 'text' and a list under 'test_list'")
    form = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}"
    number = row.get("task_id", place)
    return Prompt(str(number), "code", (form.format(text, "\n".join(map(str, tests))),), place=place)


def read_livecodebench(row: dict[str, Any], place: str) -> Prompt:
    """`question_content`, with `starter_code` where there is some; categories are the difficulties."""
    text, starter = row.get("question_content"), row.get("starter_code")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: expected a text under 'question_content'")
    if isinstance(starter, str) and starter.strip():
        text += f"\n\nUse this starter code:\n\n```python\n{starter}\n```"
    number, category = row.get("question_id", place), row.get("difficulty")
    return Prompt(str(number), category if isinstance(category, str) and category else "code", (text,), place=place)


def read_file_row(row: dict[str, Any], place: str) -> Prompt:
    """A row of a user's file: of a benchmark above that no conversation looks like, else of any form."""
    if "question_content" in row:
        return read_livecodebench(row, place)
    return read_mbpp(row, place) if "test_list" in row else read_prompt(row, place)


BENCHMARKS: dict[str, Benchmark] = {
    bench.name: bench
    for bench in (
        Benchmark(
            "mtbench",
            HubDataset("HuggingFaceH4/mt_bench_prompts"),
            "mtbench.jsonl",
            ("mtbench", "mt_bench", "question"),
            read_turns,
        ),
        Benchmark(
            "gsm8k",
            HubDataset("openai/gsm8k", split="test", configuration="main"),
            "gsm8k_test.jsonl",
            ("gsm8k", "gsm8k_test", "test"),
            _text_reader(("question",), "math", "{}"),
        ),
        Benchmark(
            "humaneval",
            HubDataset("openai/openai_humaneval", split="test"),
            "humaneval.jsonl",
            ("humaneval", "HumanEval"),
            _text_reader(("prompt",), "code", "Complete the code I provided.\n\n{}"),
        ),
        Benchmark(
            "math500",
            HubDataset("HuggingFaceH4/MATH-500", split="test"),
            "math500.jsonl",
            ("math500", "MATH-500", "test"),
            _text_reader(("problem",), "math", "{}" + MATH_SUFFIX.replace("{}", "{{}}")),
        ),
        Benchmark(
            "mbpp",
            HubDataset("google-research-datasets/mbpp", split="test"),
            None,
            ("mbpp", "sanitized-mbpp"),
            read_mbpp,
        ),
        Benchmark(
            "aime",
            HubDataset("HuggingFaceH4/aime_2024"),
            None,
            ("aime", "aime24", "aime_2024", "aime25", "aime_2025"),
            _text_reader(("problem", "question", "Problem"), "math", "{}" + MATH_SUFFIX.replace("{}", "{{}}")),
        ),
        Benchmark(
            "livecodebench",
            HubDataset("livecodebench/code_generation_lite", split="test"),
            None,
            ("livecodebench", "test6", "test5", "test"),
            read_livecodebench,
        ),
        Benchmark("alpaca", HubDataset("tatsu-lab/alpaca"), None, ("alpaca", "alpaca80", "alpaca_data"), read_alpaca),
    )
}


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
        for name in bench.file_names:
            for ending in FILE_ENDINGS:
                if (data_dir / f"{name}{ending}").exists():
                    return Source(bench.name, path=data_dir / f"{name}{ending}")
    if bench.shipped is not None and not from_hub:
        return Source(bench.name, path=shipped_file(bench.shipped))
    info(f"{bench.name}: reading {bench.hub.repository} through `datasets` (--data-dir DIR reads a local copy instead)")
    return Source(bench.name, hub=bench.hub)


def _gsm8k_shots(count: int) -> str:
    rows = [json.loads(line) for line in shipped_file("gsm8k_shots.jsonl").read_text(encoding="utf-8").splitlines()]
    if count > len(rows):
        raise ConfigError(f"num_shots: expected 0..{len(rows)}, found {count}")
    return "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:count])
