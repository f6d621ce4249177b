"""The benchmark itself: start the engine once per way of speculation; answer every benchmark at every batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from specforge_lite.benchmark.configs import BASELINE, BenchConfig, Speculation, plan
from specforge_lite.benchmark.measure import Session, measure
from specforge_lite.benchmark.rows import ResultFile, RowKey, SpeedupRow, make_row
from specforge_lite.benchmark.statistics import Record
from specforge_lite.core.log import info, progress
from specforge_lite.data.prompts import ChatEncoder, Prompt

OpenSession = Callable[[Speculation, int], Session]


@dataclass(frozen=True)
class Workload:
    """What is asked: prompts by benchmark, and how."""

    prompts: Mapping[str, Sequence[Prompt]]
    chat: ChatEncoder
    max_new_tokens: int
    greedy: bool


def run_benchmark(
    configs: Sequence[BenchConfig], work: Workload, results: ResultFile, open_session: OpenSession
) -> list[SpeedupRow]:
    """Measure everything that `results` does not hold yet; return the rows asked for, in the order of the plan.

    open_session(speculation, largest batch size) starts an engine; it is called once per way of speculation that has
    something left to do, and the session is closed before the next one starts.
    """
    wanted: list[RowKey] = []
    for speculation, batch_sizes in plan(list(configs)):
        keys = [
            RowKey(name, len(prompts), BenchConfig(size, speculation))
            for size in batch_sizes
            for name, prompts in work.prompts.items()
        ]
        wanted += keys
        todo = [key for key in keys if results.find(key) is None]
        if len(todo) < len(keys):
            info(f"{_named(speculation)}: {len(keys) - len(todo)} of {len(keys)} rows are in {results.path} already")
        if not todo:
            continue
        session = open_session(speculation, max(key.config.batch_size for key in todo))
        try:
            for key in todo:
                _measure_one(key, work, results, session)
        finally:
            session.close()
    return [row for key in wanted if (row := results.find(key)) is not None]


def _measure_one(key: RowKey, work: Workload, results: ResultFile, session: Session) -> None:
    prompts = work.prompts[key.benchmark]
    title = f"{key.benchmark}, batch {key.config.batch_size}, {_named(key.config.speculation)}"
    with progress(len(prompts), title, unit="prompt") as bar:
        measured = measure(session, prompts, key.config.batch_size, work.chat, work.max_new_tokens, bar.update)
    row = make_row(key, measured, results.settings, work.greedy, _baseline(key, results))
    results.add(row, measured.records)
    gained = f", speed-up {row.speedup:.2f}" if row.steps and row.speedup else ""
    info(f"{title}: {row.throughput:.1f} tokens/s, {row.acc_length:.2f} tokens per pass{gained}")


def _baseline(key: RowKey, results: ResultFile) -> tuple[SpeedupRow, list[Record]] | None:
    """Row and answers of the same prompts without a draft (measured before anything else): at the same batch size, or
    for a row without a draft at the smallest."""
    size = key.config.batch_size
    if key.config.speculation.is_baseline:
        others = [r.key for r in results.rows if not r.steps]
        same = [k for k in others if (k.benchmark, k.num_prompts) == (key.benchmark, key.num_prompts)]
        size = min((k.config.batch_size for k in same), default=size)
    base = RowKey(key.benchmark, key.num_prompts, BenchConfig(size, BASELINE))
    row = results.find(base)
    return None if row is None else (row, results.records(base) or [])


def _named(speculation: Speculation) -> str:
    return "no draft" if speculation.is_baseline else f"steps,top-k,verified {speculation}"
