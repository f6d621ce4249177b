"""Serve an exported draft in SGLang or vLLM and hold it against our own decoder on the same prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from specforge_lite.checkpoints.contract import Finding
from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.files import write_json
from specforge_lite.evaluation.compare_generation import decode_both_ways
from specforge_lite.evaluation.misreadings import likely_causes, misread_acceptance
from specforge_lite.inference.output import DecodeStats
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.serving.launch import check_server
from specforge_lite.serving.session import ServingOptions, ServingSession

TOLERANCE = 0.05
# Of our decoder's acceptance at a position; below it the server reads the draft otherwise than it was trained. With
# fewer than MIN_COUNT accepted tokens chance moves a position as far.
LOWEST_SHARE, MIN_COUNT = 0.8, 30
# Tokens a pass below which our own decoder is held against the draft read otherwise: its file may hold it wrong.
LOW = 1.3


@dataclass(frozen=True)
class ServingComparison:
    """Acceptance lengths are 1 + accepted drafted tokens / verifications, on both sides, over all prompts.

    num_identical: greedy answers of the server that equal plain decoding, token for token. accepted_at[k]: share of the
    passes that accepted at least k + 1 drafted tokens; num_passes: our decoder's. causes: of a low acceptance, see
    `likely_causes`.
    """

    backend: str
    num_prompts: int
    num_identical: int
    acceptance_length: float
    acceptance_length_ours: float
    tokens_per_second: float
    accepted_at: tuple[float, ...] = ()
    accepted_at_ours: tuple[float, ...] = ()
    num_passes: int = 0
    causes: tuple[str, ...] = ()

    @property
    def relative_difference(self) -> float:
        return abs(self.acceptance_length / self.acceptance_length_ours - 1)

    def check(self, tolerance: float = TOLERANCE) -> None:
        """Raise EngineError if the server accepts more or less than our decoder, or answers something else."""
        if self.relative_difference > tolerance:
            raise EngineError(
                f"{self.backend} reports an acceptance length of {self.acceptance_length:.3f}, our decoder"
                f" {self.acceptance_length_ours:.3f}: {self.relative_difference:.1%} apart, expected at most"
                f" {tolerance:.0%}; it may read the draft otherwise than it was trained (scripts/check_draft.py)"
            )
        if self.num_identical < self.num_prompts:
            raise EngineError(
                f"{self.backend}: {self.num_prompts - self.num_identical} of {self.num_prompts} greedy answers differ"
                " from plain decoding (a 16-bit dtype can do that; compare in float32)"
            )

    @property
    def counted(self) -> list[int]:
        """The positions at which our decoder accepted enough to compare with."""
        return [k for k, share in enumerate(self.accepted_at_ours) if share * self.num_passes >= MIN_COUNT]

    @property
    def lowest(self) -> int | None:
        """The first of them at which the server accepts too little; None where it does not."""
        served = [*self.accepted_at, *(0.0 for _ in self.accepted_at_ours)]
        return next((k for k in self.counted if served[k] < LOWEST_SHARE * self.accepted_at_ours[k]), None)

    def finding(self) -> Finding:
        """The verdict of a live check, with the likely cause where a position is accepted less than in our decoder."""
        name, ours, low = f"served by {self.backend}", self.accepted_at_ours, self.lowest
        served = [*self.accepted_at, *(0.0 for _ in ours)][: len(ours)]
        table = "accepted per position " + ", ".join(f"{s:.0%} of {o:.0%}" for s, o in zip(served, ours))
        causes = "; or ".join(self.causes)
        if low is None and causes:
            return Finding(
                name, "broken", f"{table}; our decoder accepts more of it when it is read otherwise: {causes}"
            )
        if not self.counted:
            text = f"our decoder itself accepts next to nothing of these prompts ({table}); nothing is proven"
            return Finding(name, "warning", text)
        if low is not None:
            place = "the first drafted token is wrong" if low == 0 else f"the first {low} agree and later ones do not"
            if causes:
                return Finding(name, "broken", f"{table}; {place}, as in our decoder with this mistake: {causes}")
            other = (
                "another target, other prompts (template), or another way of sampling drafts" if low == 0 else
                "the state that goes into the next step (norm_output), its position (RoPE), or the draft's cache"
            )  # fmt: skip
            return Finding(
                name, "broken", f"{table}; {place}, as with no mistake that was tried in our decoder: {other}"
            )
        if self.num_identical < self.num_prompts:
            differ = f"{self.num_prompts - self.num_identical} of {self.num_prompts} answers differ from plain decoding"
            return Finding(name, "warning", f"{table}; {differ}: compare in --target-dtype float32")
        return Finding(name, "ok", f"{table}; {self.num_prompts} answers equal plain decoding")

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_json(path, asdict(self))


def compare_serving(
    options: ServingOptions, prompts: list[list[int]], max_new_tokens: int, explain: bool = False
) -> ServingComparison:
    """Decode token-id prompts with our chain decoder, then in the server, at `options.temperature`; above 0 answers are
    not compared. explain: look for the cause of a low acceptance. Raises ConfigError, EngineError."""
    if not options.speculative or options.topk != 1:
        raise ConfigError("compare_serving: expected a draft and chains (topk 1)")
    check_server(options, options.temperature)
    load = lambda: SpeculativeModel.from_pretrained(  # noqa: E731
        options.model_path, options.draft_path, num_draft_tokens=options.num_steps, dtype=options.dtype
    )
    model = load()
    assert model.drafter is not None
    drawn = "greedy" if model.drafter.draft.config.algorithm == "dflash" else "sampled"  # as `serving` launches them
    settings = GenerationSettings(max_new_tokens, temperature=options.temperature, draft_sampling=drawn, seed=0)
    stats = DecodeStats()
    plain: list[list[int]] = []
    for without, drafted in decode_both_ways(model, prompts, settings):
        plain += without.new_tokens
        stats.add(drafted.stats)
    del model
    with ServingSession(options) as session:
        run = session.generate(prompts, max_new_tokens, options.temperature)
        acceptance = session.acceptance()
    found = ServingComparison(
        backend=options.backend,
        num_prompts=len(prompts),
        num_identical=sum(
            options.temperature > 0 or served == own for served, own in zip(run.outputs, plain, strict=True)
        ),
        acceptance_length=acceptance.length,
        acceptance_length_ours=1 + sum(stats.accepted_at) / max(stats.verification_passes, 1),
        tokens_per_second=run.tokens_per_second,
        accepted_at=tuple(count / max(acceptance.num_passes, 1) for count in acceptance.accepted_at),
        accepted_at_ours=tuple(stats.acceptance_per_position),
        num_passes=stats.verification_passes,
    )
    low_itself = found.acceptance_length_ours < LOW
    if explain and (low_itself or found.lowest is not None):
        served = None if found.lowest is None else found.accepted_at
        causes = likely_causes(misread_acceptance(load(), prompts, settings), served)
        found = replace(found, causes=tuple(causes))
    return found
