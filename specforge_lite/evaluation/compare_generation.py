"""Answer the same prompts with and without the draft, and count: passes of the target, tokens per second, equality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Strict, model_validator
from pydantic.dataclasses import dataclass

from specforge_lite.core.log import progress
from specforge_lite.data.prompts import Prompt
from specforge_lite.inference.output import DecodeStats, GenerationOutput, token_texts
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.target import rounding_units

CHECKED = ConfigDict(extra="forbid")  # these are read from files, too
Count = Annotated[int, Strict()]
Number = Annotated[float, Strict()]


@dataclass(frozen=True, config=CHECKED)
class Sample:
    """One generation. `token_texts` joined are the answer; `tokens_per_pass` tells how many of them each verification
    pass of the target gave (the last one of a pass is the target's own, the others were drafted)."""

    prompt: str
    token_texts: tuple[str, ...]
    tokens_per_pass: tuple[Count, ...]
    category: str = ""

    @model_validator(mode="after")
    def _every_token_has_a_pass(self) -> Sample:
        texts, total = len(self.token_texts), sum(self.tokens_per_pass)
        if total < texts:
            raise ValueError(f"{texts} tokens, but tokens_per_pass adds up to {total}")
        return self


@dataclass(frozen=True, config=CHECKED)
class Decoding:
    """Decoding with a draft, and without it where that was done too.

    acceptance_length: tokens per verification pass. accepted_per_position[k]: share of passes whose drafted token k
    (0-based) was accepted. num_passes, num_passes_without: forward passes of the target for `num_tokens` tokens.
    tokens_per_second: with and without the draft. num_identical: prompts whose output is the same without the draft.
    num_near_ties: of the others, those that first differ where two tokens lead by rounding only (see `is_near_tie`).
    settings: a few words, e.g. "greedy, chains of 5".
    """

    acceptance_length: Number
    num_prompts: Count
    num_tokens: Count = 0
    settings: str = ""
    accepted_per_position: tuple[Number, ...] = ()
    num_identical: Count | None = None
    num_near_ties: Count | None = None
    num_passes: Count | None = None
    num_passes_without: Count | None = None
    tokens_per_second: Number | None = None
    tokens_per_second_without: Number | None = None
    samples: tuple[Sample, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def decode_both_ways(
    model: SpeculativeModel, prompts: Sequence[list[int]], settings: GenerationSettings
) -> Iterator[tuple[GenerationOutput, GenerationOutput]]:
    """Answers without and with the draft, a prompt at a time and in turn, so that a machine whose speed drifts favours
    neither."""
    with progress(len(prompts), "decode with and without the draft", "prompt") as bar:
        for token_ids in prompts:
            yield model.run(token_ids, settings, speculative=False), model.run(token_ids, settings, speculative=True)
            bar.update(1)


def compare_generation(
    model: SpeculativeModel,
    prompts: Sequence[tuple[Prompt, list[int]]],
    settings: GenerationSettings,
    num_samples: int = 8,
) -> Decoding:
    """Decode every prompt (and its token ids) with and without the draft."""
    with_draft, without = DecodeStats(), DecodeStats()
    num_identical = num_near_ties = 0
    samples: list[Sample] = []
    answered = decode_both_ways(model, [token_ids for _, token_ids in prompts], settings)
    for (prompt, prompt_ids), (plain, drafted) in zip(prompts, answered):
        without.add(plain.stats)
        with_draft.add(drafted.stats)
        if plain.new_tokens == drafted.new_tokens:
            num_identical += 1
        elif settings.sampling.is_greedy:
            num_near_ties += is_near_tie(model, prompt_ids, plain.new_tokens[0], drafted.new_tokens[0])
        if len(samples) < num_samples:
            chunks = [len(c.tokens) for c in model.stream(prompt_ids, settings) if c.tokens]
            texts = token_texts(model.tokenizer, drafted.new_tokens[0])
            samples.append(Sample(str(prompt.steps[0][-1]["content"]), tuple(texts), tuple(chunks)))
    return Decoding(
        acceptance_length=with_draft.tokens_per_pass,
        num_prompts=len(prompts),
        num_tokens=with_draft.num_tokens,
        accepted_per_position=tuple(with_draft.acceptance_per_position),
        num_identical=num_identical,
        num_near_ties=num_near_ties,
        num_passes=with_draft.target_forwards,
        num_passes_without=without.target_forwards,
        tokens_per_second=with_draft.tokens_per_second,
        tokens_per_second_without=without.tokens_per_second,
        samples=tuple(samples),
    )


@torch.inference_mode()
def is_near_tie(model: SpeculativeModel, prompt_ids: list[int], first: list[int], second: list[int]) -> bool:
    """Do two greedy answers first differ where the target leaves the choice to rounding?

    The target reads the text up to there in one pass; its logits of the two tokens must lie no further apart than
    logits that were rounded into opposite directions, by what passes of other shapes differ by here.
    """
    place = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), None)
    if place is None:
        return False
    text = [*prompt_ids, *first[:place]]
    logits_V = model.target.model(torch.tensor([text], device=model.target.device)).logits[0, -1].float()
    unit = torch.finfo(model.target.dtype).eps * float(logits_V.abs().max())
    return (
        float((logits_V[first[place]] - logits_V[second[place]]).abs()) <= 2 * rounding_units(model.target, text) * unit
    )


def identity_line(result: Decoding, dtype: torch.dtype) -> str:
    """Whether the draft left the output as it was, and when it must."""
    if result.num_identical is None:
        return ""
    different = result.num_prompts - result.num_identical
    counted = f"{result.num_identical} of {result.num_prompts} outputs identical"
    if different:
        counted += f"; {result.num_near_ties} of the {different} others first differ at a near tie"
    promise = "exact in float32; in 16 bits up to near ties, where passes of another shape round otherwise"
    return f"{counted} ({str(dtype).removeprefix('torch.')}; {promise})"
