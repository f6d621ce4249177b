"""How good a draft is without decoding: accuracy and loss per step, and three estimates of its acceptance length.

    chain     1 + mean over rows of the run of correct steps from step 0
    walk      from the first row of an answer: take its run r (at most the chain length), go r + 1 tokens on, repeat;
              tau = tokens / jumps. On answers the target itself produced greedily this is what decoding does.
    sampling  1 + a_0 + a_0 a_1 + ..., a_k the mean chance that speculative sampling keeps the token of step k

The chain figure is biased: decoding starts more often right after a failure than the average row does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge_lite.capture.base import TargetEngine
from specforge_lite.capture.prefetch import SkipBudget
from specforge_lite.core.errors import DataError
from specforge_lite.data.sampler import PlannedStep
from specforge_lite.training.dataloader import BatchMaker, Dataloader
from specforge_lite.training.distributed import World
from specforge_lite.types import DraftBatch, StepOutput, TokenizedSample

Forward = Callable[[DraftBatch], StepOutput]


@dataclass(frozen=True)
class EvalResult:
    """Figures over an evaluation set. Lists have one entry per step k.

    accuracy, loss: over all positions. *_mean, *_std: over batches (those with a position at that step), std with
    n - 1. tau_chain, tau_walk, tau_sampling: acceptance lengths, see the module. chain_length: drafted tokens per pass.
    num_passes, num_tokens, accepted_at[k]: passes of the walk, tokens they gave, passes that accepted drafted token k.
    """

    num_batches: int
    num_samples: int
    num_skipped: int
    num_supervised: int
    chain_length: int
    accuracy: list[float]
    loss: list[float]
    accuracy_mean: list[float]
    accuracy_std: list[float]
    loss_mean: list[float]
    loss_std: list[float]
    tau_chain: float
    tau_walk: float
    tau_sampling: float
    num_passes: int
    num_tokens: int
    accepted_at: list[int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def metrics(self) -> dict[str, Any]:
        """Flat metrics for trackers, prefixed with `eval/`."""
        names = ("accuracy", "loss", "tau_chain", "tau_walk", "tau_sampling")
        return {f"eval/{name}": getattr(self, name) for name in names}

    def line(self) -> str:
        """For people."""
        accuracies = " ".join(f"{a:.3f}" for a in self.accuracy)
        return (
            f"eval: acc {accuracies} | loss0 {self.loss[0]:.4g} | tau walk {self.tau_walk:.3f} chain"
            f" {self.tau_chain:.3f} sampling {self.tau_sampling:.3f} ({self.num_samples} samples)"
        )


# ---------------------------------------------------------------------------------------------------------------- walk


def walk_document(
    correct_LK: Tensor, supervised_LK: Tensor, loss_mask_L: Tensor, chain_length: int
) -> list[tuple[int, int]]:
    """(tokens, drafted ones among them) of every pass of simulated chain decoding over the answers of one document;
    CPU tensors.

    An answer is a run of supervised tokens s..e. The target's prefill gives token s; row s-1 drafts s+1, s+2, ...

        token      s-1   s   s+1  s+2  s+3   e=s+4        run of row s-1 is 2: s+1, s+2 accepted, s+3 from the target
        pass 1     row ------^----^    (+)                row s+2: run 0, e from the target
        pass 2                    row        (+)          4 tokens, 2 passes
    """
    num_steps = min(chain_length, correct_LK.shape[1])
    runs = (correct_LK & supervised_LK)[:, :num_steps].int().cumprod(1).sum(1).tolist()
    passes: list[tuple[int, int]] = []
    for first, end in answers_of(loss_mask_L.tolist()):
        row = first - 1
        while row >= 0 and row + 2 < end:
            left = end - row - 2
            passes.append((min(runs[row] + 1, left), min(runs[row], left)))
            row += passes[-1][0]
    return passes


def answers_of(loss_mask_L: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, end) of every run of supervised tokens, end exclusive."""
    edges = np.diff([0, *(int(flag) for flag in loss_mask_L), 0])
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()))


# ---------------------------------------------------------------------------------------------------------------- rows


def batch_row(output: StepOutput, batch: DraftBatch, chain_length: int) -> list[float]:
    """Sums of one evaluated batch as plain numbers:

    [samples, run_sum, run_rows, tokens, passes | loss_sum K | counted K | supervised K | correct K | alpha_sum K |
     passes that accepted drafted token k, K]
    """
    if output.correct_NK is None or output.supervised_NK is None or output.alpha_sum_K is None:
        raise ValueError("evaluation needs TTTSettings(collect_rows=True)")
    correct_NK, supervised_NK = output.correct_NK.cpu(), output.supervised_NK.cpu()
    mask_N = batch.loss_mask_N.cpu()
    passes: list[tuple[int, int]] = []
    for start, stop in zip(batch.doc_offsets[:-1], batch.doc_offsets[1:]):
        span = slice(start, stop)
        passes += walk_document(correct_NK[span], supervised_NK[span], mask_N[span], chain_length)
    runs_N = (correct_NK & supervised_NK)[:, :chain_length].int().cumprod(1).sum(1)
    starts_N = supervised_NK[:, 0]
    vectors = (output.loss_sum_K, output.counted_K, output.supervised_K, output.correct_K, output.alpha_sum_K)
    return [
        float(len(batch.sample_ids)),
        float(runs_N[starts_N].sum()),
        float(starts_N.sum()),
        float(sum(tokens for tokens, _ in passes)),
        float(len(passes)),
        *torch.cat([v.double().cpu() for v in vectors]).tolist(),
        *(float(sum(accepted > k for _, accepted in passes)) for k in range(correct_NK.shape[1])),
    ]


NUM_ROW_SCALARS = 5


def result_of(rows: list[list[float]], num_steps: int, chain_length: int, num_skipped: int = 0) -> EvalResult:
    """Combine the rows of all batches. Raises DataError when nothing was supervised."""
    table = np.array([row for row in rows if row[0] > 0])
    if not len(table) or not table[:, NUM_ROW_SCALARS + 2 * num_steps].any():
        raise DataError("evaluation data has no supervised token; is the chat template the right one?")
    num_samples, run_sum, run_rows, tokens, passes = table[:, :NUM_ROW_SCALARS].sum(0).tolist()
    vectors_B6K = table[:, NUM_ROW_SCALARS:].reshape(len(table), 6, num_steps)
    loss_BK, counted_BK, supervised_BK, correct_BK, alpha_BK, accepted_BK = vectors_B6K.swapaxes(0, 1)
    chain_length = min(chain_length, num_steps)
    accuracy = _Ratios(correct_BK, supervised_BK)
    loss = _Ratios(loss_BK, counted_BK)
    return EvalResult(
        num_batches=len(table),
        num_samples=int(num_samples),
        num_skipped=num_skipped,
        num_supervised=int(supervised_BK[:, 0].sum()),
        chain_length=chain_length,
        num_passes=int(passes),
        num_tokens=int(tokens),
        accepted_at=accepted_BK.sum(0)[:chain_length].astype(int).tolist(),
        accuracy=accuracy.overall,
        loss=loss.overall,
        accuracy_mean=accuracy.mean,
        accuracy_std=accuracy.std,
        loss_mean=loss.mean,
        loss_std=loss.std,
        tau_chain=1 + run_sum / max(run_rows, 1),
        tau_walk=tokens / passes if passes else 1.0,
        tau_sampling=1 + float(np.cumprod(_Ratios(alpha_BK, supervised_BK).overall[:chain_length]).sum()),
    )


class _Ratios:
    """numerators / denominators [B, K]: over everything, and their mean and deviation (n - 1) over the batches that
    have a denominator; lists [K]."""

    def __init__(self, over_BK: np.ndarray, under_BK: np.ndarray) -> None:
        self.overall: list[float] = (over_BK.sum(0) / np.maximum(under_BK.sum(0), 1)).tolist()
        ratios_K = [over[under > 0] / under[under > 0] for over, under in zip(over_BK.T, under_BK.T)]
        self.mean = [float(ratios.mean()) if len(ratios) else 0.0 for ratios in ratios_K]
        self.std = [float(ratios.std(ddof=1)) if len(ratios) > 1 else 0.0 for ratios in ratios_K]


# ------------------------------------------------------------------------------------------------------------ evaluate


def evaluation_batches(num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Indices of this rank's batches. All ranks get the same number; some may be empty (sharded drafts need it)."""
    batches = [list(range(i, min(i + batch_size, num_samples))) for i in range(0, num_samples, batch_size)]
    while len(batches) % world_size:
        batches.append([])
    return batches[rank::world_size]


def evaluate(
    forward: Forward,
    dataset: Sequence[TokenizedSample],
    engine: TargetEngine,
    to_batch: BatchMaker,
    num_steps: int,
    chain_length: int = 5,
    batch_size: int = 1,
    max_samples: int | None = None,
    world: World | None = None,
    skips: SkipBudget | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> EvalResult:
    """Evaluate on the first `max_samples` samples. The result is the same on every rank and for any world size.

    forward: batch -> StepOutput with TTTSettings(num_steps=num_steps, collect_rows=True), in a mode of the caller's
    choice (gradients are off here). on_batch: called with the samples done, for a progress bar.
    """
    world = world or World(0, 1, torch.device("cpu"), 0.0)
    count = len(dataset) if max_samples is None else min(len(dataset), max_samples)
    plan = evaluation_batches(count, batch_size, world.rank, world.world_size)
    skips = skips or SkipBudget(num_samples=count)
    loader = Dataloader((PlannedStep([indices], {}) for indices in plan), dataset, engine, to_batch, skips, batch_size)
    rows = []
    try:
        for batch in (batch for step in loader for batch in step.batches):
            with torch.no_grad():
                rows.append(batch_row(forward(batch), batch, chain_length))
            if on_batch is not None:
                on_batch(len(batch.sample_ids))
    finally:
        loader.close()
    num_skipped = loader.num_skipped
    if world.distributed:  # rows in the order of a single process, so that sums do not depend on the world size
        parts = world.gather_bytes(np.array(rows).tobytes())
        by_rank = [np.frombuffer(bytes(part.numpy())).reshape(len(rows), -1).tolist() for part in parts]
        rows = [row for turn in zip(*by_rank) for row in turn]
        num_skipped = int(world.sum_(torch.tensor(num_skipped)))
    return result_of(rows, num_steps, chain_length, num_skipped)
