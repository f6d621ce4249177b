"""Which draft, how many steps, which way of drafting: the fastest for a stated workload, from measured rows.

    best = rank(rows, [Point.parse("8/0.7")])[0]

A workload is points CONCURRENCY/TEMPERATURE:WEIGHT; weights are shares of the tokens that are generated there. Its
speed is all tokens / all seconds, its acceptance length all tokens / all verification passes; benchmarks count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from specforge_lite.benchmark.configs import BASELINE, BenchConfig, Speculation
from specforge_lite.benchmark.rows import Drafter, RowKey, SpeedupRow
from specforge_lite.core.errors import ConfigError, DataError


@dataclass(frozen=True)
class Point:
    """Requests in flight, their temperature, and the share of the tokens that is generated so."""

    batch_size: int
    temperature: float
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Point:
        """`8/0.7`, `8/0.7:3`. Raises ConfigError."""
        place, _, weight = text.partition(":")
        size, _, temperature = place.partition("/")
        try:
            point = cls(int(size), float(temperature), float(weight or 1))
        except ValueError:
            point = cls(0, 0, 0)
        if point.batch_size < 1 or not 0 <= point.temperature < 100 or not 0 < point.weight < 1e9:
            raise ConfigError(f"workload: '{text}': expected CONCURRENCY/TEMPERATURE or with :WEIGHT, such as 8/0.7:3")
        return point

    def __str__(self) -> str:
        return f"{self.batch_size}/{self.temperature:g}"


@dataclass(frozen=True)
class Candidate:
    """One way to serve. acc_length: None without a draft. speedup: over serving without a draft. interval: of the
    speed-up, where one row is all that counts."""

    draft: Drafter
    speculation: Speculation
    tokens_per_second: float
    speedup: float
    acc_length: float | None
    interval: tuple[float, float] | None = None


def rank(rows: Sequence[SpeedupRow], workload: Sequence[Point]) -> list[Candidate]:
    """Every way that was measured at all points of the workload, no draft included, the fastest first. Raises DataError
    where the rows without a draft do not cover it."""
    known = {row.key: row for row in rows}
    ways = dict.fromkeys((row.key.draft, row.speculation) for row in rows)
    if not any(point.temperature for point in workload):  # greedy requests are drafted greedily
        ways = dict.fromkeys((draft, spec) for draft, spec in ways if spec.draft_sampling == "greedy")
    plain = _rows_of(known, workload, Drafter(), BASELINE)
    if plain is None:
        raise DataError(f"workload {' '.join(map(str, workload))}: not all of it was measured without a draft")
    found = []
    for draft, speculation in ways:
        if (mine := _rows_of(known, workload, draft, speculation)) is None:
            continue
        passes = [row.verification_passes or 0 for _, row in mine]
        speed = _speed(mine)
        found.append(
            Candidate(
                draft, speculation, speed, speed / _speed(plain),
                sum(row.completion_tokens for _, row in mine) / sum(passes) if all(passes) else None,
                mine[0][1].speedup_interval if len(mine) == 1 else None,
            )
        )  # fmt: skip
    return sorted(found, key=lambda candidate: -candidate.tokens_per_second)


def _rows_of(
    known: Mapping[RowKey, SpeedupRow], workload: Sequence[Point], draft: Drafter, speculation: Speculation
) -> list[tuple[float, SpeedupRow]] | None:
    """(weight, row) of every point and benchmark; None where one is missing."""
    found = []
    for point in workload:
        way = speculation if point.temperature else replace(speculation, draft_sampling="greedy")
        config = BenchConfig(point.batch_size, way, point.temperature)
        for name, count in dict.fromkeys((key.benchmark, key.num_prompts) for key in known):
            row = known.get(RowKey(name, count, config, draft))
            if row is None:
                return None
            found.append((point.weight, row))
    return found


def _speed(rows: Sequence[tuple[float, SpeedupRow]]) -> float:
    return sum(weight for weight, _ in rows) / sum(weight / row.throughput for weight, row in rows)
