"""Is the acceptance that training estimates the one that decoding gives? Both, position by position.

The estimate walks over teacher-forced answers (`training.evaluate`); decoding runs `SpeculativeModel` on the same
prompts. On answers that the target itself produced greedily they describe the same passes, so they differ by rounding
only; on other answers decoding leaves the text of the file at once, and the share of answers reproduced says so.

Letters: L tokens of a document, K steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from specforge_lite.core.log import progress
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.types import DraftBatch, StepOutput, TokenizedSample


@dataclass
class Acceptance:
    """Passes of chain drafts and what they accepted. accepted_at[k]: passes that accepted drafted token k (0-based)."""

    num_passes: int = 0
    num_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)

    def add(self, num_tokens: int, num_accepted: int) -> None:
        """One pass that gave `num_tokens` tokens, `num_accepted` of them drafted."""
        self.num_passes += 1
        self.num_tokens += num_tokens
        for k in range(num_accepted):
            self.accepted_at[k] += 1

    @property
    def tokens_per_pass(self) -> float:
        return self.num_tokens / self.num_passes if self.num_passes else 1.0

    @property
    def per_position(self) -> list[float]:
        """Share of passes that accepted drafted token k."""
        return [count / max(self.num_passes, 1) for count in self.accepted_at]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, shares included."""
        return {**asdict(self), "tokens_per_pass": self.tokens_per_pass, "per_position": self.per_position}


def answers_of(loss_mask_L: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, end) of every run of supervised tokens, end exclusive."""
    edges = [0, *(int(flag) for flag in loss_mask_L), 0]
    starts = [i for i in range(len(edges) - 1) if edges[i] < edges[i + 1]]
    ends = [i for i in range(len(edges) - 1) if edges[i] > edges[i + 1]]
    return list(zip(starts, ends))


class Walk:
    """Chain decoding simulated on teacher-forced rows; add every evaluated batch, then read `acceptance`.

    Answer tokens s .. e-1: the target's prompt pass gives s. Row s-1 drafts s+1, s+2, ...; with r guesses right
    the pass gives r + 1 tokens (r drafted ones and the target's own next), or what is left of the answer.
    """

    def __init__(self, chain_length: int) -> None:
        self.chain_length = chain_length
        self.acceptance = Acceptance(accepted_at=[0] * chain_length)

    def add(self, output: StepOutput, batch: DraftBatch) -> None:
        assert output.correct_NK is not None
        assert output.supervised_NK is not None
        right_NK = (output.correct_NK & output.supervised_NK).cpu()[:, : self.chain_length]
        runs_N = right_NK.int().cumprod(1).sum(1)
        for start, stop in zip(batch.doc_offsets[:-1], batch.doc_offsets[1:]):
            self._add_document(runs_N[start:stop].tolist(), batch.loss_mask_N[start:stop].tolist())

    def _add_document(self, runs_L: list[int], mask_L: list[bool]) -> None:
        for first, end in answers_of(mask_L):
            row = first - 1
            while row >= 0 and row + 2 < end:
                left = end - row - 2
                gained = min(runs_L[row] + 1, left)
                self.acceptance.add(gained, min(runs_L[row], left))
                row += gained


@dataclass(frozen=True)
class Decoded:
    """Result of decoding: acceptance, and tokens of the file's answers that came out before the first difference."""

    acceptance: Acceptance
    num_answers: int
    num_file_tokens: int
    num_reproduced: int

    @property
    def reproduced_share(self) -> float:
        """1: the file's answers are the target's own greedy ones, so the estimate describes the same passes."""
        return self.num_reproduced / max(self.num_file_tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = {name: getattr(self, name) for name in ("num_answers", "num_file_tokens", "num_reproduced")}
        return {**self.acceptance.to_dict(), **counts, "reproduced_share": self.reproduced_share}


def decode_answers(model: SpeculativeModel, samples: Iterable[TokenizedSample], chain_length: int) -> Decoded:
    """Decode every answer of `samples` greedily, as long as the file's, from the tokens before it."""
    shape = TreeShape.chain(chain_length)
    acceptance = Acceptance(accepted_at=[0] * chain_length)
    jobs = [(sample, first, end) for sample in samples for first, end in answers_of(sample.loss_mask_L.tolist())]
    jobs = [job for job in jobs if job[1] > 0]
    reproduced = 0
    with progress(len(jobs), "decode", "answer") as bar:
        for sample, first, end in jobs:
            ids = sample.input_ids_L.tolist()
            settings = GenerationSettings(max_new_tokens=end - first, shape=shape)
            tokens: list[int] = []
            for index, chunk in enumerate(model.stream(ids[:first], settings)):
                tokens += chunk.tokens
                if index and chunk.tokens:
                    acceptance.add(len(chunk.tokens), sum(chunk.drafted))
            pairs = list(zip(tokens, ids[first:end]))
            reproduced += next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            bar.update(1)
    return Decoded(acceptance, len(jobs), sum(end - first for _, first, end in jobs), reproduced)


def disagreement(estimated: Acceptance, decoded: Acceptance) -> float:
    """Relative difference of the tokens per pass."""
    return abs(estimated.tokens_per_pass / decoded.tokens_per_pass - 1)
