"""What a generation returns, when it stops, and what it counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError


@dataclass
class DecodeStats:
    """Counts of one call, over all its prompts. Seconds are wall time; they mean something on a CPU only, where a call
    returns when its work is done.

    accepted_at[k]: passes (of one row each) that accepted at least k+1 drafted tokens; drafted_at[k]: passes that
    proposed so deep. A pass that the end of the text cuts short counts with what it contributed.
    """

    num_prompts: int = 0
    num_tokens: int = 0
    verification_passes: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    draft_true_rows: int = 0
    draft_speculative_rows: int = 0
    near_ties: int = 0
    near_ties_flipped: int = 0
    seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    accepted_at: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Completion tokens per verification pass, the statistic SGLang reports; each prompt's first token comes from
        its prompt's own pass and counts as a token."""
        return self.num_tokens / self.verification_passes if self.verification_passes else 1.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a verification pass yields, the first token of each prompt left out (as in training's walk)."""
        passes = self.verification_passes
        return (self.num_tokens - self.num_prompts) / passes if passes else 1.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the passes that accepted drafted token k, for k = 0, 1, ..."""
        return [count / max(self.verification_passes, 1) for count in self.accepted_at]

    @property
    def overhead(self) -> float:
        """Share of the time that was spent outside the two networks."""
        return 1 - (self.target_seconds + self.draft_seconds) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def count_pass(self, num_accepted: int, longest_path: int) -> None:
        """One row's verification pass that contributed `num_accepted` drafted tokens."""
        self.verification_passes += 1
        self.accepted_at += [0] * (longest_path - len(self.accepted_at))
        for k in range(num_accepted):
            self.accepted_at[k] += 1

    def add(self, other: DecodeStats) -> None:
        """Add the counts and seconds of another call."""
        for name, value in vars(other).items():
            if name == "accepted_at":
                self.accepted_at += [0] * (len(value) - len(self.accepted_at))
                for k, count in enumerate(value):
                    self.accepted_at[k] += count
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_dict(self) -> dict[str, Any]:
        """All counts and the statistics derived from them, JSON-ready."""
        names = ("acceptance_length", "tokens_per_pass", "acceptance_per_position", "overhead", "tokens_per_second")
        return {**vars(self), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class StopRules:
    """When an answer ends: `max_new_tokens`, one of `eos_token_ids` (kept in the answer), or one of `stop_strings`
    (the answer keeps the tokens up to the one that completes it; the text ends before it)."""

    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


class Answer:
    """The growing answer to one prompt."""

    def __init__(self, prompt: Sequence[int], rules: StopRules, tokenizer: Any | None) -> None:
        if rules.stop_strings and tokenizer is None:
            raise ConfigError("stop strings need a tokenizer")
        self.prompt = list(prompt)
        self.rules = rules
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.drafted: list[bool] = []  # which tokens the draft had guessed
        self.finish_reason: str | None = None
        self._checked = 0

    @property
    def all_tokens(self) -> list[int]:
        return self.prompt + self.tokens

    def add(self, tokens: Sequence[int], drafted: Sequence[bool]) -> int:
        """Append tokens until one ends the answer; -> how many were taken."""
        before = len(self.tokens)
        for token, guess in zip(tokens, drafted):
            self.tokens.append(token)
            self.drafted.append(guess)
            if token in self.rules.eos_token_ids:
                self.finish_reason = "eos"
            elif self.rules.stop_strings and self._stop_string_done():
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.rules.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        return len(self.tokens) - before

    def _stop_string_done(self) -> bool:
        # A stop string of n characters lies within the last n tokens, or n+8 bytes' worth of broken characters.
        assert self.tokenizer is not None
        longest = max(len(stop) for stop in self.rules.stop_strings)
        tail = self.tokenizer.decode(self.tokens[-(longest + 8) :], skip_special_tokens=False)
        return any(stop in tail for stop in self.rules.stop_strings)

    def text(self, skip_special_tokens: bool = True) -> str:
        """The answer as text, ending before the stop string that ended it."""
        if self.tokenizer is None:
            raise ConfigError("no tokenizer was given, so there is no text")
        full: str = self.tokenizer.decode(self.tokens, skip_special_tokens=skip_special_tokens)
        if self.finish_reason == "stop":
            full = full[: min(full.find(stop) for stop in self.rules.stop_strings if stop in full)]
        return full


@dataclass
class GenerationOutput:
    """answers: one per prompt, in order. sequences_BT: prompt and answer, padded with `pad_token_id` on the right."""

    answers: list[Answer]
    stats: DecodeStats
    pad_token_id: int = 0

    @property
    def sequences_BT(self) -> Tensor:
        rows = [torch.tensor(answer.all_tokens) for answer in self.answers]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)

    @property
    def new_tokens(self) -> list[list[int]]:
        return [answer.tokens for answer in self.answers]

    @property
    def texts(self) -> list[str]:
        return [answer.text() for answer in self.answers]

    @property
    def finish_reasons(self) -> list[str | None]:
        return [answer.finish_reason for answer in self.answers]


@dataclass(frozen=True)
class Chunk:
    """What one step added to one answer, for streaming. drafted: which of the tokens the draft had guessed."""

    prompt_index: int
    tokens: list[int]
    drafted: list[bool]
    finish_reason: str | None
