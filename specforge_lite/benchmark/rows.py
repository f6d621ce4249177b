"""Result rows (JSON lines) and the answers behind them: what a resumed run finds finished and compares with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from specforge_lite.benchmark.configs import BASELINE, BenchConfig, Speculation
from specforge_lite.benchmark.statistics import (
    Measurement,
    Record,
    acceptance_length,
    agreement,
    bootstrap_ratio,
    quantile,
    scaled,
    share_per_position,
    sums_by_prompt,
)
from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import atomic_file, quick_fingerprint, user_errors
from specforge_lite.core.jsonl import read_jsonl
from specforge_lite.core.log import warn

Interval = tuple[float, float]


@dataclass(frozen=True)
class Drafter:
    """A draft: a hash of its files, which is what makes it another one; its name; and dspark or dflash, if it is."""

    fingerprint: str | None = None
    name: str = field(default="", compare=False)
    kind: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RowKey:
    """What makes a row: a benchmark, how many of its prompts, one configuration, and the draft, where there is one."""

    benchmark: str
    num_prompts: int
    config: BenchConfig
    draft: Drafter = Drafter()

    @property
    def file_name(self) -> str:
        """Of the answers, below the directory of answers."""
        config, spec = self.config, self.config.speculation
        what = f"s{spec.steps}-k{spec.topk}-v{spec.num_draft_tokens}-{spec.draft_sampling}"
        place = f"{self.benchmark}-{self.num_prompts}-b{config.batch_size}-t{config.temperature:g}"
        return "-".join([place, what, *filter(None, [self.draft.fingerprint])]).replace("/", "_") + ".jsonl"

    @property
    def baseline(self) -> RowKey:
        """The same without a draft."""
        return replace(self, config=replace(self.config, speculation=BASELINE), draft=Drafter())


@dataclass(frozen=True)
class SpeedupRow:
    """One line of results; `specforge_lite.benchmark.statistics` defines every figure.

    draft: its name. draft_sampling: above temperature 0, `greedy` (its most probable tokens) or `sampled`.
    Times are in seconds or (with _ms) milliseconds, throughput in tokens per second, intervals 95%. seconds_per_pass:
    time in flight after the first token / passes (without a draft: / tokens); draft_share: part of the networks' time
    that is the draft's, where the engine reports it (hf). identical_share, num_differing, tokens_before_difference:
    greedy answers against those without a draft (without a draft: against those at the smallest batch size).
    """

    benchmark: str
    batch_size: int
    steps: int
    topk: int
    num_draft_tokens: int
    acc_length: float
    throughput: float
    completion_tokens: int
    duration: float
    num_prompts: int
    num_requests: int
    temperature: float = 0.0
    draft_sampling: str = "greedy"
    draft: str = ""
    draft_fingerprint: str | None = None
    draft_kind: str | None = None
    speedup: float | None = None
    acc_length_interval: Interval | None = None
    throughput_interval: Interval | None = None
    speedup_interval: Interval | None = None
    verification_passes: int | None = None
    acceptance_per_position: list[float] = field(default_factory=list)
    per_category: dict[str, dict[str, Any]] = field(default_factory=dict)
    latency_per_token_ms: float | None = None
    latency_per_token_p95_ms: float | None = None
    time_to_first_token_ms: float | None = None
    time_to_first_token_p95_ms: float | None = None
    identical_share: float | None = None
    num_differing: int | None = None
    tokens_before_difference: float | None = None
    num_left_out: int = 0
    seconds_per_pass: float | None = None
    mean_first_token_seconds: float | None = None
    draft_share: float | None = None
    backend: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def speculation(self) -> Speculation:
        return Speculation(self.steps, self.topk, self.num_draft_tokens, self.draft_sampling)

    @property
    def key(self) -> RowKey:
        draft = Drafter(self.draft_fingerprint, self.draft, self.draft_kind)
        config = BenchConfig(self.batch_size, self.speculation, self.temperature)
        return RowKey(self.benchmark, self.num_prompts, config, draft)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def make_row(
    key: RowKey,
    measured: Measurement,
    settings: dict[str, Any],
    baseline: tuple[SpeedupRow, Sequence[Record]] | None = None,
) -> SpeedupRow:
    """Statistics of one measurement. baseline: row and records of the same prompts without a draft, at the same batch
    size; for a row without a draft those at the smallest batch size, to compare the answers with."""
    records, counted = measured.records, measured.counters
    # Passes of single requests count only where they add up to the engine's own count over all of them.
    passes = sum(record.passes or 0 for record in records)
    known = counted.passes in (None, passes) and all(record.passes is not None for record in records)
    passes = passes if counted.passes is None else counted.passes
    accepted_at = [record.accepted_at for record in records] if known else [counted.accepted_at]
    categories: dict[str, list[Record]] = {}
    for record in records:
        categories.setdefault(record.category, []).append(record)
    tokens, _, seconds = sums_by_prompt(records)
    throughput = tokens.sum() / measured.duration
    in_flight = bootstrap_ratio([tokens], [seconds])
    first = [record.first_token_seconds for record in records]
    row = SpeedupRow(
        **vars(key.config.speculation),
        **_summary(records, known, passes),
        benchmark=key.benchmark,
        batch_size=key.config.batch_size,
        temperature=key.config.temperature,
        draft=key.draft.name,
        draft_fingerprint=key.draft.fingerprint,
        draft_kind=key.draft.kind,
        throughput=float(throughput),
        throughput_interval=scaled(in_flight, float(throughput / (tokens.sum() / seconds.sum()))),
        duration=measured.duration,
        num_prompts=key.num_prompts,
        verification_passes=passes or None,
        acceptance_per_position=share_per_position(accepted_at, passes),
        per_category={name: _summary(c, known) for name, c in categories.items()} if len(categories) > 1 else {},
        latency_per_token_p95_ms=_ms(quantile(_latencies(records), 0.95)),
        time_to_first_token_ms=_ms(quantile(first, 0.5)),
        time_to_first_token_p95_ms=_ms(quantile(first, 0.95)),
        num_left_out=measured.num_left_out,
        seconds_per_pass=_seconds_per_pass(records, passes, key.config.speculation),
        mean_first_token_seconds=fmean(first),
        draft_share=counted.draft_share,
        backend=str(settings.get("backend", "")),
        settings=settings,
    )
    if not key.config.temperature and baseline is not None and (found := agreement(records, baseline[1])) is not None:
        differing = found.num_prompts - found.num_identical
        row = replace(row, identical_share=found.identical_share, num_differing=differing)
        row = replace(row, tokens_before_difference=found.tokens_before)
    if key.config.speculation.is_baseline:
        return replace(row, speedup=1.0)
    if baseline is None:
        return row
    speedup = row.throughput / baseline[0].throughput
    return replace(row, speedup=speedup, speedup_interval=_speedup_interval(speedup, records, baseline[1]))


def _summary(records: Sequence[Record], known: bool, passes: int | None = None) -> dict[str, Any]:
    """Figures of all requests, or of those of a category. known: each record's passes are; passes: of them all."""
    tokens, by_prompt, _ = sums_by_prompt(records)
    num_tokens = int(tokens.sum())
    length = acceptance_length(records) if known else None
    return {
        "acc_length": length if passes is None else num_tokens / passes if passes else 1.0,
        "acc_length_interval": bootstrap_ratio([tokens], [by_prompt]) if known else None,
        "completion_tokens": num_tokens,
        "num_requests": len(records),
        "latency_per_token_ms": _ms(quantile(_latencies(records), 0.5)),
    }


def _speedup_interval(speedup: float, records: Sequence[Record], baseline: Sequence[Record]) -> Interval | None:
    """From the prompts that both sides answered, paired."""
    both = {record.prompt for record in records} & {record.prompt for record in baseline}
    if len(both) < 2:
        return None
    tokens, _, seconds = sums_by_prompt([record for record in records if record.prompt in both])
    base_tokens, _, base_seconds = sums_by_prompt([record for record in baseline if record.prompt in both])
    point = (tokens.sum() / seconds.sum()) / (base_tokens.sum() / base_seconds.sum())
    return scaled(bootstrap_ratio([tokens, base_seconds], [seconds, base_tokens]), speedup / point)


def _latencies(records: Sequence[Record]) -> list[float]:
    return [value for record in records if (value := record.latency_per_token) is not None]


def _seconds_per_pass(records: Sequence[Record], passes: int, speculation: Speculation) -> float | None:
    """Decoding time / passes. What came with the first token is counted at the rate of what came after it."""
    timed = [(record, rate) for record in records if (rate := record.latency_per_token) is not None]
    decoding = sum(rate * (record.num_tokens - 1) for record, rate in timed)
    tokens = sum(record.num_tokens - 1 for record, _ in timed)
    if not tokens:
        return None
    if speculation.is_baseline:
        return decoding / tokens
    every = sum(record.num_tokens - 1 for record in records)
    return decoding / tokens * every / passes if passes else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


# --------------------------------------------------------------------------------------------------------------- files


class ResultFile:
    """`--output`: rows as JSON lines, and beside it a directory `<name>_answers` with every request.

    Both appear complete or not at all, whenever the process dies. Rows made with other settings are refused, naming
    the first difference.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.answers_dir = path.with_name(f"{path.name.removesuffix('.jsonl')}_answers")
        self.rows = read_rows(path) if path.exists() else []
        for row in self.rows:
            self._check_settings(row)

    def _check_settings(self, row: SpeedupRow) -> None:
        for name in sorted(self.settings.keys() | row.settings.keys()):
            before, now = row.settings.get(name), self.settings.get(name)
            if before != now:
                raise ConfigError(
                    f"output {self.path}: holds rows made with {name} {before!r}, this run has {now!r};"
                    " choose another --output"
                )

    def find(self, key: RowKey) -> SpeedupRow | None:
        """The finished row of a key."""
        return next((row for row in self.rows if row.key == key), None)

    def add(self, row: SpeedupRow, records: Sequence[Record]) -> None:
        """Write the answers, then the row."""
        with user_errors(self.path):
            with atomic_file(self.answers_dir / row.key.file_name) as file:
                file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
            with atomic_file(self.path) as file:
                file.writelines(json.dumps(r.to_dict(), ensure_ascii=False) + "\n" for r in [*self.rows, row])
        self.rows.append(row)

    def records(self, key: RowKey) -> list[Record] | None:
        """The answers behind a finished row; None, with a warning, where the file is missing."""
        path = self.answers_dir / key.file_name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            return [_record(json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            warn(f"{path}: {error}; outputs cannot be compared with the baseline")
            return None


def _record(values: dict[str, Any]) -> Record:
    return Record(**{**values, "token_ids": tuple(values["token_ids"]), "accepted_at": tuple(values["accepted_at"])})


def read_rows(path: Path) -> list[SpeedupRow]:
    """Rows of a result file. Raises DataError with the line of one that is not ours."""
    rows = []
    for number, values in enumerate(read_jsonl(path), 1):
        try:
            rows.append(SpeedupRow(**values))
        except TypeError as error:
            raise DataError(f"{path}:{number}: not a row of bench_model_speedup.py: {error}") from None
    return rows


def fingerprint(directory: str | None) -> str | None:
    """Short hash of a draft's files, so that rows of a retrained draft are not taken for those of this one. Large
    files count with their size and their first and last MiB; a hub name counts as itself."""
    if directory is None:
        return None
    folder = Path(directory)
    if not folder.is_dir():
        return directory
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{path.name} {quick_fingerprint(path)}\n".encode())
    return digest.hexdigest()[:16]
