"""Is the acceptance that training estimates the one that decoding gives? Both, position by position.

The estimate walks over teacher-forced answers (`training.evaluate`); decoding runs `SpeculativeModel` on the same
prompts. On answers that the target itself produced greedily they describe the same passes, so they differ by rounding
only; on other answers decoding leaves the text of the file at once, and the share of answers reproduced says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from specforge_lite.core.log import progress
from specforge_lite.inference.output import DecodeStats
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.training.evaluate import EvalResult, answers_of
from specforge_lite.types import TokenizedSample


@dataclass(frozen=True)
class Acceptance:
    """Passes of chain drafts and what they accepted. accepted_at[k]: passes that accepted drafted token k (0-based)."""

    num_passes: int
    num_tokens: int
    accepted_at: list[int]

    @classmethod
    def estimated(cls, result: EvalResult) -> Acceptance:
        """That of the walk over teacher-forced answers."""
        return cls(result.num_passes, result.num_tokens, list(result.accepted_at))

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
class Decoded(Acceptance):
    """That of decoding, and how many of the file's answer tokens came out before the first difference."""

    num_answers: int
    num_file_tokens: int
    num_reproduced: int

    @property
    def reproduced_share(self) -> float:
        """1: the file's answers are the target's own greedy ones, so the estimate describes the same passes."""
        return self.num_reproduced / max(self.num_file_tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "reproduced_share": self.reproduced_share}


def decode_answers(model: SpeculativeModel, samples: Iterable[TokenizedSample], chain_length: int) -> Decoded:
    """Decode every answer of `samples` greedily, as long as the file's, from the tokens before it."""
    jobs = [
        (sample.input_ids_L.tolist(), first, end)
        for sample in samples
        for first, end in answers_of(sample.loss_mask_L.tolist())
        if first > 0
    ]
    stats, reproduced = DecodeStats(accepted_at=[0] * chain_length), 0
    with progress(len(jobs), "decode", "answer") as bar:
        for ids, first, end in jobs:
            output = model.run(ids[:first], GenerationSettings(end - first, shape=TreeShape.chain(chain_length)))
            stats.add(output.stats)
            pairs = list(zip(output.new_tokens[0], ids[first:end]))
            reproduced += next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            bar.update(1)
    return Decoded(
        num_passes=stats.verification_passes,
        num_tokens=stats.num_tokens - stats.num_prompts,  # each first token is from the pass over its prompt
        accepted_at=stats.accepted_at,
        num_answers=len(jobs),
        num_file_tokens=sum(end - first for _, first, end in jobs),
        num_reproduced=reproduced,
    )


def disagreement(estimated: Acceptance, decoded: Acceptance) -> float:
    """Relative difference of the tokens per pass."""
    return abs(estimated.tokens_per_pass / decoded.tokens_per_pass - 1)
