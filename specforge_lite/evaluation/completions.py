"""Code completions with and without the draft: decoded acceptance, exact match and BLEU against the file's own middle.

The holes are asked for with the token ids that training and servers use (`regenerate.rows.FimPrompts`). Greedy answers
with and without the draft must be the same; how good they are is the target's doing alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError
from specforge_lite.data.fim import FimRow, to_fim_row
from specforge_lite.data.prompts import read_rows
from specforge_lite.evaluation.compare_generation import decode_both_ways
from specforge_lite.inference.output import DecodeStats
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.regenerate.rows import FimPrompts

NUM_SHOWN = 5


@dataclass(frozen=True)
class CompletionSettings:
    """max_length: tokens of prompt and answer; fim_order: psm or spm; shape: of the drafted chain or tree."""

    max_new_tokens: int = 64
    max_length: int = 512
    fim_order: str = "psm"
    shape: TreeShape = field(default_factory=lambda: TreeShape.chain(5))


@dataclass(frozen=True)
class Quality:
    """Completions against the text that was cut out. Shares are 0..1, BLEU 0..100."""

    exact_match: float
    first_line_match: float
    bleu: float
    bleu_signature: str


@dataclass(frozen=True)
class CompletionResult:
    """Both runs. acceptance_length: completion tokens per verification pass; tokens_per_pass: without each answer's
    first token, which the target's own prompt pass gives."""

    num_rows: int
    num_files: int
    num_tokens: int
    num_identical: int
    acceptance_length: float
    tokens_per_pass: float
    accepted_per_position: list[float]
    target_passes: int
    target_passes_without: int
    tokens_per_second: float
    tokens_per_second_without: float
    with_draft: Quality
    without_draft: Quality
    samples: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def read_fim_file(path: Path, limit: int | None = None) -> list[FimRow]:
    """FIM rows of a file. Raises DataError with file:line of the first row that is none, and their number."""
    return read_rows(path, limit, lambda row, _: to_fim_row(row))


def complete(model: SpeculativeModel, rows: Sequence[FimRow], settings: CompletionSettings) -> CompletionResult:
    """Fill every hole greedily twice, in turn. Raises ConfigError for a target without fill-in-the-middle tokens."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError("the target has no tokenizer; code completion needs one")
    prompts = FimPrompts(tokenizer, settings.fim_order, settings.max_length, settings.max_new_tokens)
    eos = [*model.eos_token_ids, *prompts.end_token_ids]
    generation = GenerationSettings(prompts.max_tokens, eos_token_id=eos, shape=settings.shape)
    with_draft, without = DecodeStats(), DecodeStats()
    texts: list[str] = []
    plain_texts: list[str] = []
    num_identical = 0
    for plain, drafted in decode_both_ways(model, [prompts.prompt_ids(row) for row in rows], generation):
        without.add(plain.stats)
        with_draft.add(drafted.stats)
        num_identical += plain.new_tokens == drafted.new_tokens
        texts.append(tokenizer.decode(drafted.new_tokens[0], skip_special_tokens=True))
        plain_texts.append(tokenizer.decode(plain.new_tokens[0], skip_special_tokens=True))
    references = [row.middle for row in rows]
    return CompletionResult(
        num_rows=len(rows),
        num_files=len({row.source or row.id for row in rows}),
        num_tokens=with_draft.num_tokens,
        num_identical=num_identical,
        acceptance_length=with_draft.acceptance_length,
        tokens_per_pass=with_draft.tokens_per_pass,
        accepted_per_position=with_draft.acceptance_per_position,
        target_passes=with_draft.target_forwards,
        target_passes_without=without.target_forwards,
        tokens_per_second=with_draft.tokens_per_second,
        tokens_per_second_without=without.tokens_per_second,
        with_draft=quality_of(texts, references),
        without_draft=quality_of(plain_texts, references),
        samples=[
            {"id": row.id, "prefix_end": row.prefix[-200:], "middle": row.middle, "completion": text}
            for row, text in list(zip(rows, texts))[:NUM_SHOWN]
        ],
    )


def quality_of(completions: Sequence[str], references: Sequence[str]) -> Quality:
    """Exact match (spaces and line ends around the text do not count), match of the first line, corpus BLEU."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    score = bleu.corpus_score(list(completions), [list(references)])
    pairs = list(zip(completions, references))
    return Quality(
        exact_match=sum(ours.strip() == theirs.strip() for ours, theirs in pairs) / len(pairs),
        first_line_match=sum(first_line(ours) == first_line(theirs) for ours, theirs in pairs) / len(pairs),
        bleu=float(score.score),
        bleu_signature=str(bleu.get_signature()),
    )


def first_line(text: str) -> str:
    """The first line with text in it, without the spaces around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
