"""Statistics of answered requests, each with one definition.

    acceptance length   completion tokens / verification passes, over all requests (what SGLang reports). The first
                        token of an answer comes from the prompt's own pass and counts as a token. Without a draft: 1.
    per position        share of the passes that accepted drafted token k and all before it, k = 0, 1, ...
    latency per token   of a request: (last token - first) / (tokens after those that came with the first); median and
                        95th percentile over requests
    time to first token from sending a request to its first token
    throughput          completion tokens of all requests / wall time of the whole run
    speed-up            throughput / throughput without a draft, same engine, prompts and batch size

Intervals are 95% percentile bootstrap intervals over prompts (conversations), which are what one would draw again.
With B requests in flight throughput is B x tokens / time in flight, so its interval comes from each prompt's tokens and
seconds in flight, scaled to the measured value; that of the speed-up resamples the same prompts on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from specforge_lite.serving.engine import Generation

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Record(Generation):
    """An answered request. prompt: index of the conversation."""

    prompt: int = 0
    turn: int = 0
    category: str = "all"
    num_prompt_tokens: int = 0


@dataclass(frozen=True)
class Counters:
    """What an engine counted over all requests of a run. draft_share: part of the decoding time spent in the draft;
    None where it is not known."""

    passes: int | None = None
    accepted_at: tuple[int, ...] = ()
    draft_share: float | None = None


@dataclass(frozen=True)
class Measurement:
    """All requests of one run. num_left_out: turns that did not fit the context."""

    records: list[Record]
    duration: float
    counters: Counters
    num_left_out: int


def acceptance_length(records: Sequence[Record]) -> float | None:
    """Completion tokens / passes; None where no passes are known."""
    passes = sum(record.passes or 0 for record in records)
    return sum(record.num_tokens for record in records) / passes if passes else None


def share_per_position(accepted_at: Iterable[Sequence[int]], passes: int) -> list[float]:
    """Sums of `accepted_at` over requests / passes."""
    columns = zip_longest(*accepted_at, fillvalue=0)
    return [sum(column) / passes for column in columns] if passes else []


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear interpolation between order statistics; None of nothing."""
    return float(np.quantile(values, share)) if values else None


def sums_by_prompt(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, passes and seconds in flight of each prompt, all its turns together: float64 [P] each, in the order of
    prompt index."""
    prompts, place = np.unique([record.prompt for record in records], return_inverse=True)

    def summed(values: list[float]) -> np.ndarray:
        return np.bincount(place, values, len(prompts))

    tokens, passes = summed([r.num_tokens for r in records]), summed([r.passes or 0 for r in records])
    return tokens, passes, summed([r.seconds for r in records])


def bootstrap_ratio(
    numerators: Sequence[np.ndarray], denominators: Sequence[np.ndarray], seed: int = 0
) -> tuple[float, float] | None:
    """95% interval of the product of sum(numerators[i]) / sum(denominators[i]), resampling prompts.

    All arrays are [P] in the same order of prompts; every resample draws the same prompts for all of them. None for
    fewer than two prompts.
    """
    count = len(numerators[0])
    if count < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, count, (NUM_RESAMPLES, count))
    values = np.ones(NUM_RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        for numerator, denominator in zip(numerators, denominators):
            values = values * numerator[draws].sum(1) / denominator[draws].sum(1)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def scaled(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    """Both ends times `factor`."""
    return (interval[0] * factor, interval[1] * factor) if interval is not None else None


@dataclass(frozen=True)
class Agreement:
    """Greedy answers of the same prompts, twice. tokens_before: median over the differing prompts of the tokens before
    their first difference."""

    num_prompts: int
    num_identical: int
    tokens_before: float | None

    @property
    def identical_share(self) -> float:
        return self.num_identical / self.num_prompts


def agreement(records: Sequence[Record], baseline: Sequence[Record]) -> Agreement | None:
    """Compare the prompts that both have answered, token for token in every turn; None without such a prompt."""
    mine, theirs = _answers(records), _answers(baseline)
    both = mine.keys() & theirs.keys()
    differing = [_tokens_before(mine[p], theirs[p]) for p in both if mine[p] != theirs[p]]
    return Agreement(len(both), len(both) - len(differing), quantile(differing, 0.5)) if both else None


def _answers(records: Sequence[Record]) -> dict[int, list[tuple[int, ...]]]:
    answers: dict[int, list[tuple[int, ...]]] = {}
    for record in sorted(records, key=lambda r: (r.prompt, r.turn)):
        answers.setdefault(record.prompt, []).append(record.token_ids)
    return answers


def _tokens_before(mine: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> int:
    """Tokens of equal turns, and of the first other turn up to the difference."""
    count = 0
    for a, b in zip(mine, theirs):
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        count += same
        if a != b:
            break
    return count
