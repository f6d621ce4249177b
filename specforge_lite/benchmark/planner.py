"""Which STEPS,TOPK,VERIFY to serve a draft with, from one run of bench_model_speedup.py.

The rows of a run say how often the draft is right and what a pass costs; the planner fits both and predicts every
configuration inside what was measured (it does not extrapolate).

Acceptance. a_k is the chance that drafted token k is the target's when all before it were: the pooled shares of the
chain rows, accepted_k / accepted_{k-1} (a_0 = accepted_0); where trees go deeper than the chains that were measured,
the last one is repeated. A chain of S steps yields

    tau = 1 + a_0 + a_0 a_1 + ... + a_0 ... a_{S-1}    tokens per pass.

For trees, choice r = 1, 2, ... of step k is the target's token with chance q_{k,1} = a_k and

    q_{k,r+1} = s r^-0.75 (1 - q_{k,1} - ... - q_{k,r}):

every further choice catches a share of what the earlier ones missed, a smaller one each time. (A draft of the shipped
target, 24 prompts: 0.28, 0.21, 0.12, 0.12, 0.08, 0.07, 0.07 for r = 1..7; the formula with s = 0.28 gives 0.28, 0.17,
0.12, 0.10, 0.08, 0.07, 0.07.) The tree is EAGLE-2's with these averages for the draft's own probabilities: the TOPK
best nodes of each level are expanded, the VERIFY - 1 best of all are kept; tau = 1 + the sum over its nodes of the
product of q along the path. The one number s is fitted to the measured tree rows. Real trees adapt to each context; s
absorbs that.

Cost. Seconds of a pass at batch size B (time in flight after the first token / passes) are fitted, with coefficients
that are not negative and relative residuals, by

    verify   v0 + v1 (VERIFY - 1) + v2 [TOPK > 1]          draft   d0 STEPS + d1 STEPS (TOPK - 1)

(v2: a tree has to be built, masked and compacted; a chain has not), each by itself where the engine reports the draft's
share (hf), else their sum, where the run without a draft is the point STEPS 0, VERIFY 1. A dspark or dflash draft
fills its block in one pass, whatever STEPS is: its draft term is d0; it is planned with the chains that were measured,
since engines serve the length of its block only.

Correction. Costs are not quite linear and contexts not all alike, so the predicted rate tau / t is multiplied by what
the measured configurations of this batch size had over their own predictions: the geometric mean of those ratios with
weights 1/d^2, d the sum of the distances in log STEPS, log TOPK and log VERIFY. At a measured configuration d is 0: it
gets its measured rate.

Speed-up. For answers of n tokens after a first token that takes f seconds, as measured:

    (f_without + n t_without) / (f_with + n t(B, STEPS, TOPK, VERIFY) / (tau c)),    c the correction
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from specforge_lite.benchmark.configs import BASELINE, Speculation
from specforge_lite.benchmark.rows import SpeedupRow
from specforge_lite.core.errors import DataError

MAX_SHARE = 0.95
RANK_DECAY = 0.75
TREE_WIDTHS = (2, 3, 4, 6, 8, 10, 12, 16)
TREE_SIZES = (4, 6, 8, 12, 16, 24, 32, 48, 60, 64, 96, 128)


# ---------------------------------------------------------------------------------------------------------- acceptance


@dataclass(frozen=True)
class AcceptanceModel:
    """conditional[k]: a_k; catch_share: s, None where no tree was measured (then only chains can be predicted)."""

    conditional: tuple[float, ...]
    catch_share: float | None = None

    def tokens_per_pass(self, speculation: Speculation) -> float:
        """tau, the target's own token included."""
        if speculation.is_baseline:
            return 1.0
        if speculation.is_chain:
            return 1.0 + float(np.cumprod(self.conditional[: speculation.steps]).sum())
        if self.catch_share is None:
            raise DataError("a tree cannot be predicted: no tree was measured")
        return 1.0 + tree_gain(self.conditional, self.catch_share, speculation)


def rank_chances(first: float, catch_share: float, count: int) -> list[float]:
    """q_1 .. q_count of one step.

    >>> rank_chances(0.5, 0.5, 2)
    [0.5, 0.25]
    """
    chances, missed = [first], 1.0 - first
    for rank in range(1, count):
        chances.append(catch_share * rank**-RANK_DECAY * missed)
        missed -= chances[-1]
    return chances


def tree_gain(conditional: Sequence[float], catch_share: float, speculation: Speculation) -> float:
    """Expected accepted tokens of EAGLE-2's tree under the rank model."""
    topk = speculation.topk
    frontier, pool = [1.0], []
    for step in range(min(speculation.steps, len(conditional))):
        # A node's own draft ranks its children; under the model a later choice that scores higher is drafted first.
        chances = sorted(rank_chances(conditional[step], catch_share, topk), reverse=True)
        level = sorted((path * chance for path in frontier for chance in chances), reverse=True)
        pool += level
        frontier = level[:topk]
    return sum(sorted(pool, reverse=True)[: speculation.num_draft_tokens - 1])


def fit_acceptance(rows: Sequence[SpeedupRow]) -> AcceptanceModel:
    """From the rows of any batch sizes and benchmarks, weighted by their passes. Raises DataError without a chain."""
    drafted = [row for row in rows if row.steps and row.verification_passes]
    chains, trees = [r for r in drafted if r.topk == 1], [r for r in drafted if r.topk > 1]
    if not chains:
        raise DataError(
            "no row of a chain (TOPK 1) with its acceptance; run bench_model_speedup.py with one, as 1,5,1,6"
        )
    conditional = _conditional(chains)
    if not trees:
        return AcceptanceModel(conditional)
    conditional += conditional[-1:] * (max(row.steps for row in trees) - len(conditional))
    grid = np.linspace(0, MAX_SHARE, 191)
    errors = [sum(_tau_error(AcceptanceModel(conditional, float(s)), row) for row in trees) for s in grid]
    return AcceptanceModel(conditional, float(grid[int(np.argmin(errors))]))


def _tau_error(model: AcceptanceModel, row: SpeedupRow) -> float:
    predicted = model.tokens_per_pass(row.speculation)
    return (row.verification_passes or 0) * (predicted / measured_tokens_per_pass(row) - 1) ** 2


def _conditional(rows: Sequence[SpeedupRow]) -> tuple[float, ...]:
    """Pooled accepted_k / accepted_{k-1} over the rows that draft so deep."""
    found = []
    for k in range(max(row.steps for row in rows)):
        deep = [row for row in rows if row.steps > k]
        reached = sum(_accepted(row, k - 1) for row in deep)
        if not reached:
            break
        found.append(sum(_accepted(row, k) for row in deep) / reached)
    return tuple(found) or (0.0,)


def _accepted(row: SpeedupRow, k: int) -> float:
    """Passes that accepted token k; all of them for k = -1."""
    passes, shares = row.verification_passes or 0, row.acceptance_per_position
    return passes if k < 0 else passes * shares[k] if k < len(shares) else 0.0


def measured_tokens_per_pass(row: SpeedupRow) -> float:
    """1 + accepted / passes: what a pass yields, without the first tokens that `acc_length` counts."""
    return 1.0 + sum(row.acceptance_per_position)


# ---------------------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class CostModel:
    """Seconds of one pass at one batch size; f and n of the formula above. one_pass: a block draft's."""

    batch_size: int
    verify: tuple[float, float, float]
    draft: tuple[float, float]
    seconds_per_token_without: float
    first_token_seconds: float
    first_token_seconds_without: float
    tokens_after_first: float
    one_pass: bool = False

    def seconds_per_pass(self, speculation: Speculation) -> float:
        """t(STEPS, TOPK, VERIFY)."""
        if speculation.is_baseline:
            return self.seconds_per_token_without
        return float(_terms(speculation, self.one_pass) @ np.array([*self.verify, *self.draft]))

    def speedup(self, speculation: Speculation, tokens_per_pass: float) -> float:
        """Of whole answers."""
        if speculation.is_baseline:
            return 1.0
        without = self.first_token_seconds_without + self.tokens_after_first * self.seconds_per_token_without
        per_token = self.seconds_per_pass(speculation) / tokens_per_pass
        return without / (self.first_token_seconds + self.tokens_after_first * per_token)


def _terms(speculation: Speculation, one_pass: bool) -> np.ndarray:
    """What v0, v1, v2, d0 and d1 of the formula are multiplied with."""
    steps, topk, verified = speculation.steps, max(speculation.topk, 1), max(speculation.num_draft_tokens, 1)
    draft = (steps > 0, 0.0) if one_pass else (steps, steps * (topk - 1.0))
    return np.array([1.0, verified - 1.0, topk > 1, *draft])


def fit_cost(rows: Sequence[SpeedupRow], batch_size: int) -> CostModel:
    """From the rows of one batch size. Raises DataError without a run with and one without a draft."""
    mine = [row for row in rows if row.batch_size == batch_size and row.seconds_per_pass]
    without, drafted = [r for r in mine if not r.steps], [r for r in mine if r.steps]
    if not without or not drafted:
        missing = "without" if drafted else "with"
        raise DataError(f"batch size {batch_size}: no timed row {missing} a draft")
    one_pass = any(row.draft_kind for row in drafted)
    shares = [row.draft_share for row in drafted if row.draft_share is not None]
    fitted = drafted if len(shares) == len(drafted) else [*without, *drafted]
    terms = np.array([_terms(row.speculation, one_pass) for row in fitted])
    times = np.array([row.seconds_per_pass for row in fitted])
    if fitted is drafted:
        verify = fit_nonnegative(terms[:, :3], times * (1 - np.array(shares)))
        draft = fit_nonnegative(terms[:, 3:], times * np.array(shares))
    else:
        found = fit_nonnegative(terms, times)
        verify, draft = found[:3], found[3:]
    answered = sum(r.completion_tokens for r in without) / sum(r.num_requests for r in without)
    return CostModel(
        batch_size=batch_size,
        verify=(verify[0], verify[1], verify[2]),
        draft=(draft[0], draft[1]),
        seconds_per_token_without=_mean(r.seconds_per_pass for r in without),
        first_token_seconds=_mean(r.mean_first_token_seconds for r in drafted),
        first_token_seconds_without=_mean(r.mean_first_token_seconds for r in without),
        tokens_after_first=max(1.0, answered - 1),
        one_pass=one_pass,
    )


def fit_nonnegative(terms: Sequence[np.ndarray] | np.ndarray, values: Sequence[float] | np.ndarray) -> list[float]:
    """Least squares of terms @ x = values in relative residuals, x >= 0; of equally good solutions the one with the
    fewest and earliest terms. Exact: tries every set of terms (there are at most five)."""
    scale = np.maximum(np.array(values), 1e-9)
    design = np.array(terms) / scale[:, None]
    ones = np.array(values) / scale
    best, best_error = np.zeros(design.shape[1]), float((ones**2).sum())
    for count in range(1, design.shape[1] + 1):
        for columns in combinations(range(design.shape[1]), count):
            part = design[:, columns]
            solution = np.linalg.lstsq(part, ones, rcond=None)[0]
            error = float(((part @ solution - ones) ** 2).sum())
            if (solution >= 0).all() and error < best_error - 1e-9 * len(values):
                best, best_error = np.zeros(design.shape[1]), error
                best[list(columns)] = solution
    return [float(x) for x in best]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


# ---------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Prediction:
    """One configuration; the measured values where the run holds it."""

    batch_size: int
    speculation: Speculation
    tokens_per_pass: float
    seconds_per_pass: float
    speedup: float
    measured_speedup: float | None = None


@dataclass(frozen=True)
class Plan:
    """All predictions per batch size, the best first."""

    acceptance: AcceptanceModel
    costs: dict[int, CostModel]
    predictions: dict[int, list[Prediction]]

    def best(self, batch_size: int) -> Prediction:
        """The recommendation; no draft (STEPS 0) where nothing is predicted to be faster."""
        return self.predictions[batch_size][0]

    def verdict_on_trees(self, batch_size: int) -> str | None:
        """Why the largest tree does not pay, from the measured cost of a pass over its rows; None where it does, or
        where no tree is among the predictions."""
        trees = [p for p in self.predictions[batch_size] if p.speculation.topk > 1]
        if not trees or self.best(batch_size).speculation.topk > 1:
            return None
        tree = max(trees, key=lambda p: (p.speculation.num_draft_tokens, p.speedup))
        times = tree.seconds_per_pass / self.costs[batch_size].seconds_per_token_without
        return (
            f"trees do not pay: {tree.speculation} yields {tree.tokens_per_pass:.2f} tokens per pass, but a pass over"
            f" {tree.speculation.num_draft_tokens} rows (drafting included) costs {times:.1f} passes without a draft:"
            f" speed-up {tree.speedup:.2f}, the best choice has {self.best(batch_size).speedup:.2f}"
        )


def make_plan(rows: Sequence[SpeedupRow], candidates: Sequence[Speculation] | None = None) -> Plan:
    """Fit the rows and rank the candidates (default: everything inside what was measured) at every batch size that was
    measured with and without a draft. Raises DataError where the rows do not suffice."""
    acceptance = fit_acceptance(rows)
    sizes = sorted({row.batch_size for row in rows if row.steps})
    costs = {size: fit_cost(rows, size) for size in sizes}
    chosen = list(candidates) if candidates is not None else default_candidates(rows, acceptance)
    if BASELINE not in chosen:
        chosen.append(BASELINE)
    predictions: dict[int, list[Prediction]] = {}
    for size in sizes:
        found = [predict(speculation, acceptance, costs[size], rows) for speculation in chosen]
        predictions[size] = sorted(found, key=lambda p: (-p.speedup, p.speculation))
    return Plan(acceptance, costs, predictions)


def predict(
    speculation: Speculation, acceptance: AcceptanceModel, cost: CostModel, rows: Sequence[SpeedupRow]
) -> Prediction:
    """One configuration at one batch size."""
    mine = [row for row in rows if row.batch_size == cost.batch_size]
    tau = acceptance.tokens_per_pass(speculation)
    same = [row.speedup for row in mine if row.speculation == speculation and row.speedup is not None]
    return Prediction(
        cost.batch_size,
        speculation,
        tau,
        cost.seconds_per_pass(speculation),
        cost.speedup(speculation, tau * correction(speculation, acceptance, cost, mine)),
        sum(same) / len(same) if same else None,
    )


def correction(
    speculation: Speculation, acceptance: AcceptanceModel, cost: CostModel, rows: Sequence[SpeedupRow]
) -> float:
    """c of the formula above, from the drafted rows of one batch size."""
    if speculation.is_baseline:
        return 1.0
    weighted = weights = 0.0
    exact: list[float] = []
    for row in rows:
        if not row.steps or not row.seconds_per_pass:
            continue
        predicted = acceptance.tokens_per_pass(row.speculation) / cost.seconds_per_pass(row.speculation)
        ratio = math.log(measured_tokens_per_pass(row) / row.seconds_per_pass / predicted)
        distance = _distance(row.speculation, speculation)
        if distance == 0:
            exact.append(ratio)
        else:
            weighted, weights = weighted + ratio / distance**2, weights + 1 / distance**2
    if exact:
        return math.exp(sum(exact) / len(exact))
    return math.exp(weighted / weights) if weights else 1.0


def _distance(a: Speculation, b: Speculation) -> float:
    pairs = ((a.steps, b.steps), (a.topk, b.topk), (a.num_draft_tokens, b.num_draft_tokens))
    return sum(abs(math.log(x / y)) for x, y in pairs)


def default_candidates(rows: Sequence[SpeedupRow], acceptance: AcceptanceModel) -> list[Speculation]:
    """What was measured; of an EAGLE draft also chains and trees no deeper, wider or larger than the largest of
    these."""
    deepest = min(max(row.steps for row in rows), len(acceptance.conditional))
    found = {row.speculation for row in rows}
    if any(row.draft_kind for row in rows):
        return sorted(found)
    found |= {Speculation(steps, 1, steps + 1) for steps in range(1, deepest + 1)}
    trees = [row for row in rows if row.topk > 1]
    if trees and acceptance.catch_share is not None:
        widest, largest = max(r.topk for r in trees), max(r.num_draft_tokens for r in trees)
        for steps in range(1, deepest + 1):
            for topk in (w for w in TREE_WIDTHS if w <= widest):
                most = min(largest, 1 + topk + (steps - 1) * topk * topk)
                sizes = {size for size in TREE_SIZES if steps < size <= most} | {most}
                found |= {Speculation(steps, topk, size) for size in sizes}
    return sorted(found)
