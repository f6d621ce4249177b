"""The benchmark itself: start the engine once per way of speculation; answer every benchmark at every batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from specforge_lite.benchmark.configs import BenchConfig, Speculation, plan
from specforge_lite.benchmark.measure import Session, measure
from specforge_lite.benchmark.rows import Drafter, ResultFile, RowKey, SpeedupRow, make_row
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


def keys_of(configs: Sequence[BenchConfig], work: Workload, draft: Drafter) -> dict[Speculation, list[RowKey]]:
    """The rows to measure, by engine start, in the order of the plan."""
    return {
        speculation: [
            RowKey(name, len(prompts), config, Drafter() if speculation.is_baseline else draft)
            for config in found
            for name, prompts in work.prompts.items()
        ]
        for speculation, found in plan(configs)
    }


def run_benchmark(
    configs: Sequence[BenchConfig],
    work: Workload,
    results: ResultFile,
    open_session: OpenSession,
    draft: Drafter = Drafter(),  # noqa: B008  (frozen)
) -> list[SpeedupRow]:
    """Measure everything that `results` does not hold yet; return the rows asked for, in the order of the plan.

    open_session(speculation, largest batch size) starts an engine; it is called once per way of speculation that has
    something left to do, and the session is closed before the next one starts.
    """
    wanted = keys_of(configs, work, draft)
    for speculation, keys in wanted.items():
        todo = [key for key in keys if results.find(key) is None]
        if len(todo) < len(keys):
            name = _named(speculation, draft)
            info(f"{name}: {len(keys) - len(todo)} of {len(keys)} rows are in {results.path} already")
        if not todo:
            continue
        session = open_session(speculation, max(key.config.batch_size for key in todo))
        try:
            for key in todo:
                _measure_one(key, work, results, session)
        finally:
            session.close()
    return [row for keys in wanted.values() for key in keys if (row := results.find(key)) is not None]


def _measure_one(key: RowKey, work: Workload, results: ResultFile, session: Session) -> None:
    prompts, config = work.prompts[key.benchmark], key.config
    where = f"{key.benchmark}, batch {config.batch_size}"
    where += f", temperature {config.temperature:g}" if config.temperature else ""
    title = f"{where}, {_named(config.speculation, key.draft)}"
    with progress(len(prompts), title, unit="prompt") as bar:
        measured = measure(
            session, prompts, config.batch_size, work.chat, work.max_new_tokens, bar.update, config.temperature
        )
    row = make_row(key, measured, results.settings, _baseline(key, results))
    results.add(row, measured.records)
    gained = f", speed-up {row.speedup:.2f}" if row.steps and row.speedup else ""
    info(f"{title}: {row.throughput:.1f} tokens/s, {row.acc_length:.2f} tokens per pass{gained}")


def _baseline(key: RowKey, results: ResultFile) -> tuple[SpeedupRow, list[Record]] | None:
    """Row and answers of the same prompts without a draft (measured before anything else): at the same batch size, or
    for a row without a draft at the smallest."""
    base = key.baseline
    if key.config.speculation.is_baseline:
        sizes = {row.batch_size for row in results.rows}
        others = (replace(base, config=replace(base.config, batch_size=size)) for size in sorted(sizes))
        base = next((other for other in others if results.find(other) is not None), base)
    row = results.find(base)
    return None if row is None else (row, results.records(base) or [])


def _named(speculation: Speculation, draft: Drafter) -> str:
    if speculation.is_baseline:
        return "no draft"
    sampled = " (tokens sampled)" if speculation.draft_sampling == "sampled" else ""
    return f"{draft.name or 'draft'}, steps,top-k,verified {speculation}{sampled}"
