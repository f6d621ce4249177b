"""What a generation returns, when it stops, and what it counted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError


@dataclass
class DecodeStats:
    """Counts of one call, over all its prompts. seconds: wall time; those of the networks: see `Metered`.

    accepted_at[k]: passes (of one row each) that accepted at least k+1 drafted tokens. A pass that the end of the text
    cuts short counts with what it contributed.
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
        accepted = zip_longest(self.accepted_at, other.accepted_at, fillvalue=0)
        for name, value in vars(other).items():
            if name != "accepted_at":
                setattr(self, name, getattr(self, name) + value)
        self.accepted_at = [mine + theirs for mine, theirs in accepted]


class Metered:
    """A network that counts its forward passes, and the seconds of the work in its `measured` blocks.

    On a GPU a call returns when its work is queued, so both ends of a block are events in the stream; nothing waits for
    them until `seconds` is read.
    """

    device: torch.device
    num_forwards = 0
    clock: Callable[[], float] = time.perf_counter  # of the host
    _seconds = 0.0

    def mark(self) -> Any:
        """An event behind all work that is queued; None where the host itself computes."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def measured(self) -> Iterator[None]:
        start, begin = self.clock(), self.mark()
        try:
            yield
        finally:
            if begin is None:
                self._seconds += self.clock() - start
            else:
                self._running.append((begin, self.mark()))
                self._add_ended(wait=False)

    @property
    def seconds(self) -> float:
        self._add_ended(wait=True)
        return self._seconds

    @cached_property
    def _running(self) -> deque[tuple[Any, Any]]:
        """Begin and end of blocks whose work may not have ended."""
        return deque()

    def _add_ended(self, wait: bool) -> None:
        while self._running and (wait or self._running[0][1].query()):
            begin, end = self._running.popleft()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3  # torch gives milliseconds


@dataclass(frozen=True)
class StopRules:
    """When an answer ends: `max_new_tokens`, one of `eos_token_ids` (kept in the answer), or one of `stop_strings`
    (the answer keeps the tokens up to the one that completes it; the text ends before it)."""

    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


class TextStream:
    """Token ids to text, one at a time. Byte-level tokens that end within a character wait for the next one."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
        self._tokens: list[int] = []  # the last few; those before `_done` gave their text and are context
        self._done = 0

    def add(self, token: int) -> str:
        """Text that this token completes."""
        self._tokens.append(token)
        before, now = self._decode(self._tokens[: self._done]), self._decode(self._tokens)
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._tokens = self._tokens[self._done :]
        self._done = len(self._tokens)
        return now[len(before) :]

    def rest(self) -> str:
        """Text of the tokens that still wait."""
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._done])) :]


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Text of each token, special ones included, such that the texts joined are the decoded whole.

    A character made of several byte-level tokens belongs to the last of them; the others get "".
    """
    stream = TextStream(tokenizer, skip_special_tokens=False)
    texts = [stream.add(token) for token in token_ids]
    if texts:
        texts[-1] += stream.rest()
    return texts


class Answer:
    """The growing answer to one prompt."""

    def __init__(self, prompt: Sequence[int], rules: StopRules, tokenizer: Any | None) -> None:
        if rules.stop_strings and tokenizer is None:
            raise ConfigError("stop_strings: need a tokenizer, and the target has none")
        self.prompt = list(prompt)
        self.rules = rules
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.drafted: list[bool] = []  # which tokens the draft had guessed
        self.finish_reason: str | None = None
        # Only with stop strings: the text of each token, all of it, and where the stop string begins in it.
        self._stream = TextStream(tokenizer, skip_special_tokens=False) if rules.stop_strings else None
        self._pieces: list[str] = []
        self._text, self._stop_at = "", 0

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
            elif self._stream is not None and self._completes_stop(self._stream.add(token)):
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.rules.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        return len(self.tokens) - before

    def _completes_stop(self, piece: str) -> bool:
        longest = max(len(stop) for stop in self.rules.stop_strings)
        start = max(0, len(self._text) - longest + 1)
        self._pieces.append(piece)
        self._text += piece
        found = [at for stop in self.rules.stop_strings if (at := self._text.find(stop, start)) >= 0]
        self._stop_at = min(found, default=0)
        return bool(found)

    def text(self, skip_special_tokens: bool = True) -> str:
        """The answer as text, ending before the stop string that ended it."""
        if self.tokenizer is None:
            raise ConfigError("the target has no tokenizer, so there is no text; read the token ids")
        if self.finish_reason != "stop":
            return str(self.tokenizer.decode(self.tokens, skip_special_tokens=skip_special_tokens))
        hidden = set(self.tokenizer.all_special_ids) if skip_special_tokens else set()
        room, kept = self._stop_at, []
        for token, piece in zip(self.tokens, self._pieces):
            kept += [] if token in hidden else [piece[:room]]
            room = max(0, room - len(piece))
        return "".join(kept)


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


@dataclass(frozen=True)
class Chunk:
    """What one step added to one answer, for streaming. drafted: which of the tokens the draft had guessed."""

    prompt_index: int
    tokens: list[int]
    drafted: list[bool]
    finish_reason: str | None
