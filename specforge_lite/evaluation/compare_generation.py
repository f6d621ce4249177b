"""Answer the same prompts with and without the draft, and count: passes of the target, tokens per second, equality."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.core.log import progress
from specforge_lite.inference.output import DecodeStats, token_texts
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel


@dataclass(frozen=True)
class Sample:
    """One generation. `token_texts` joined are the answer; `tokens_per_pass` tells how many of them each verification
    pass of the target gave (the last one of a pass is the target's own, the others were drafted)."""

    prompt: str
    token_texts: tuple[str, ...]
    tokens_per_pass: tuple[int, ...]
    category: str = ""


@dataclass(frozen=True)
class Decoding:
    """Decoding with a draft, and without it where that was done too.

    acceptance_length: tokens per verification pass. accepted_per_position[k]: share of passes whose drafted token k
    (0-based) was accepted. num_passes, num_passes_without: forward passes of the target for `num_tokens` tokens.
    tokens_per_second: with and without the draft. num_identical: prompts whose output is the same without the draft.
    settings: a few words, e.g. "greedy, chains of 5".
    """

    acceptance_length: float
    num_prompts: int
    num_tokens: int = 0
    settings: str = ""
    accepted_per_position: tuple[float, ...] = ()
    num_identical: int | None = None
    num_passes: int | None = None
    num_passes_without: int | None = None
    tokens_per_second: float | None = None
    tokens_per_second_without: float | None = None
    samples: tuple[Sample, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def read_prompts(path: Path, limit: int | None) -> list[list[dict[str, Any]]]:
    """The messages before the last assistant turn of each row of a normal-form jsonl file.

    Raises DataError with file:line for a row without a user turn.
    """
    prompts: list[list[dict[str, Any]]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(prompts) == limit:
                break
            messages = json.loads(line).get("conversations", [])
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise DataError(f"{path}:{number}: expected a user turn, found none")
            prompts.append(messages)
    return prompts


def compare_generation(
    model: SpeculativeModel, prompts: list[list[dict[str, Any]]], settings: GenerationSettings, num_samples: int = 8
) -> Decoding:
    """Decode every prompt twice, one at a time and in turn, so that a machine whose speed drifts favours neither."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise DataError("the target has no tokenizer; prompts of text need one")
    with_draft, without = DecodeStats(), DecodeStats()
    num_identical = 0
    samples: list[Sample] = []
    with progress(len(prompts), "decode with and without the draft", "prompt") as bar:
        for messages in prompts:
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            prompt_ids = list(encoded["input_ids"])
            plain = model.run(prompt_ids, settings, speculative=False)
            drafted = model.run(prompt_ids, settings, speculative=True)
            without.add(plain.stats)
            with_draft.add(drafted.stats)
            num_identical += plain.new_tokens == drafted.new_tokens
            if len(samples) < num_samples:
                chunks = [len(c.tokens) for c in model.stream(prompt_ids, settings) if c.tokens]
                texts = token_texts(tokenizer, drafted.new_tokens[0])
                samples.append(Sample(str(messages[-1]["content"]), tuple(texts), tuple(chunks)))
            bar.update(1)
    return Decoding(
        acceptance_length=with_draft.tokens_per_pass,
        num_prompts=len(prompts),
        num_tokens=with_draft.num_tokens,
        accepted_per_position=tuple(with_draft.acceptance_per_position),
        num_identical=num_identical,
        num_passes=with_draft.target_forwards,
        num_passes_without=without.target_forwards,
        tokens_per_second=with_draft.tokens_per_second,
        tokens_per_second_without=without.tokens_per_second,
        samples=tuple(samples),
    )
