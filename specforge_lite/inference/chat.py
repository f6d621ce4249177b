"""A conversation with a target, told piece by piece: text as it comes, and which of it the draft had guessed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.output import TextStream
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel


@dataclass(frozen=True)
class Piece:
    """Text of one token ("" while a character is incomplete). drafted: the draft had guessed the token."""

    text: str
    drafted: bool


@dataclass
class Pace:
    """How an answer is going. A pass is one forward pass of the target, the prompt's own included."""

    num_tokens: int = 0
    num_drafted: int = 0
    num_passes: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def add(self, drafted: Sequence[bool]) -> None:
        """Count the tokens of one pass."""
        self.num_passes += 1
        self.num_tokens += len(drafted)
        self.num_drafted += sum(drafted)
        self.seconds = time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """For people."""
        passes = max(self.num_passes, 1)
        return (
            f"{self.tokens_per_second:.0f} tokens/s, {self.num_tokens} tokens in {self.num_passes} passes"
            f" ({self.num_tokens / passes:.2f} per pass, {self.num_drafted} guessed by the draft)"
        )


class Chat:
    """A conversation. `speculate` switches the draft on and off between answers.

    Raises ConfigError when the target has no tokenizer or chat template.
    """

    def __init__(self, model: SpeculativeModel, settings: GenerationSettings, system_prompt: str | None = None) -> None:
        if model.tokenizer is None or not getattr(model.tokenizer, "chat_template", None):
            raise ConfigError("the target has no chat template, so it cannot chat; generate from token ids or text")
        self.model, self.settings, self.system_prompt = model, settings, system_prompt
        self.speculate = model.drafter is not None
        self.messages: list[dict[str, str]] = []
        self.pace = Pace()
        self.clear()

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []

    def ask(self, text: str) -> Iterator[Piece]:
        """Answer `text`, yielding the answer token by token; the conversation grows by both.

        Raises ConfigError when the conversation does not fit into the target's context; it is then as before.
        """
        tokenizer: Any = self.model.tokenizer
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        stream, self.pace, answer = TextStream(tokenizer), Pace(), ""
        for chunk in self.model.stream(ids, self.settings, speculative=self.speculate):
            self.pace.add(chunk.drafted)
            for token, drafted in zip(chunk.tokens, chunk.drafted):
                piece = Piece(stream.add(token), drafted)
                answer += piece.text
                yield piece
        self.messages = [*asked, {"role": "assistant", "content": answer}]
