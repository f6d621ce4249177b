"""Is the acceptance that training estimates the one that decoding gives? Both, position by position.

The estimate walks over teacher-forced answers (`training.evaluate`); decoding runs `SpeculativeModel` on the same
prompts. On answers that the target itself produced greedily they describe the same passes, so they differ by rounding
only; on other answers decoding leaves the text of the file at once, and the share of answers reproduced says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from specforge_lite.core.log import progress
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.training.evaluate import EvalResult, answers_of
from specforge_lite.types import TokenizedSample


@dataclass
class Acceptance:
    """Passes of chain drafts and what they accepted. accepted_at[k]: passes that accepted drafted token k (0-based)."""

    num_passes: int = 0
    num_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)

    @classmethod
    def estimated(cls, result: EvalResult) -> Acceptance:
        """That of the walk over teacher-forced answers."""
        return cls(result.num_passes, result.num_tokens, list(result.accepted_at))

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
