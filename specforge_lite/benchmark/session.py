"""What the benchmark needs of an engine: answers with their timing and their verification passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Ask:
    """One request."""

    token_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Reply:
    """One answer; see `statistics.Record` for the fields."""

    token_ids: tuple[int, ...]
    passes: int | None
    accepted_at: tuple[int, ...]
    first_token_seconds: float
    seconds: float
    finish_reason: str = ""
    num_first_tokens: int = 1


@dataclass(frozen=True)
class Counters:
    """What an engine counted over all requests since `begin`. draft_share: part of the decoding time spent in the
    draft; None where it is not known."""

    passes: int | None = None
    accepted_at: tuple[int, ...] = ()
    draft_share: float | None = None


class Session(Protocol):
    """A running engine with one way of speculation.

    batched: `generate` wants all requests in flight at once and returns when the last is answered; otherwise it is
    called with one request by as many threads as there are requests in flight. context_length: tokens of prompt and
    answer. clock: seconds, for all times.
    """

    batched: bool
    context_length: int
    clock: Callable[[], float]

    def generate(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer requests, in their order."""
        ...

    def begin(self) -> None:
        """A run starts: forget caches of earlier runs and start counting."""
        ...

    def counters(self) -> Counters:
        """What was counted since `begin`."""
        ...

    def close(self) -> None:
        """Stop what was started."""
        ...
