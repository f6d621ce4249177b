"""Answer all prompts of a benchmark with a fixed number of requests in flight, and what that needs of an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol

from specforge_lite.benchmark.statistics import Counters, Measurement, Record
from specforge_lite.core.errors import DataError
from specforge_lite.data.prompts import ChatEncoder, Prompt
from specforge_lite.serving.engine import Generation

MIN_NEW_TOKENS = 8  # a turn that has room for fewer is left out, with a note
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """One request."""

    token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0


class Session(Protocol):
    """A running engine with one way of speculation.

    batched: `generate` wants all requests in flight, of one temperature, at once and returns when the last is answered;
    otherwise it is called with one request by as many threads as there are requests in flight. context_length: tokens
    of prompt and answer. clock: seconds, for all times.
    """

    batched: bool
    context_length: int
    clock: Callable[[], float]

    def generate(self, asks: Sequence[Ask]) -> list[Generation]:
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


class Dialogue:
    """One prompt on its way through its turns."""

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        chat: ChatEncoder,
        max_new_tokens: int,
        context_length: int,
        temperature: float = 0.0,
    ) -> None:
        self.index, self.prompt, self.chat = index, prompt, chat
        self.max_new_tokens, self.context_length, self.temperature = max_new_tokens, context_length, temperature
        self.messages: list[dict[str, Any]] = []
        self.turn = 0
        self.records: list[Record] = []
        self.num_left_out = 0
        self._asked = Ask((), 0)

    def next_ask(self) -> Ask | None:
        """The next request, or None at the end."""
        steps = self.prompt.steps
        if self.turn >= len(steps):
            return None
        messages = [*self.messages, *steps[self.turn]]
        token_ids = self.chat.encode(messages, self.prompt.tools, self.prompt.place)
        room = self.context_length - len(token_ids)
        if room < MIN_NEW_TOKENS:
            self.num_left_out = len(steps) - self.turn
            self.turn = len(steps)
            return None
        self.messages = messages
        self._asked = Ask(tuple(token_ids), min(self.max_new_tokens, room), self.temperature)
        return self._asked

    def take(self, reply: Generation) -> None:
        """Note the answer and go on to the next turn."""
        prompt, asked = self.prompt, len(self._asked.token_ids)
        self.records.append(
            Record(**vars(reply), prompt=self.index, turn=self.turn, category=prompt.category, num_prompt_tokens=asked)
        )
        self.messages.append({"role": "assistant", "content": self.chat.decode(reply.token_ids)})
        self.turn += 1


def measure(
    session: Session,
    prompts: Sequence[Prompt],
    batch_size: int,
    chat: ChatEncoder,
    max_new_tokens: int,
    on_done: Callable[[int], None] | None = None,
    temperature: float = 0.0,
) -> Measurement:
    """Keep `batch_size` requests in flight until every turn of every prompt is answered.

    A short warm-up is not counted. on_done: called with the number of prompts finished. Raises DataError if no prompt
    fits the context.
    """

    def begun(some: Sequence[Prompt]) -> list[Dialogue]:
        length = session.context_length
        return [Dialogue(i, p, chat, max_new_tokens, length, temperature) for i, p in enumerate(some)]

    warm_up(session, begun(prompts[:batch_size]))
    dialogues = begun(prompts)
    session.begin()
    start = session.clock()
    if session.batched:
        _in_waves(session, dialogues, batch_size, on_done)
    else:
        _in_threads(session, dialogues, batch_size, on_done)
    duration = session.clock() - start
    records = [record for dialogue in dialogues for record in dialogue.records]
    if not records:
        raise DataError(f"no prompt leaves room for {MIN_NEW_TOKENS} tokens in a context of {session.context_length}")
    return Measurement(records, duration, session.counters(), sum(dialogue.num_left_out for dialogue in dialogues))


def warm_up(session: Session, dialogues: Sequence[Dialogue]) -> None:
    """Answer the first turns of `dialogues` for a few tokens, all at once. The conversations are used up."""
    first = [ask for dialogue in dialogues if (ask := dialogue.next_ask())]
    asks = [replace(ask, max_new_tokens=min(ask.max_new_tokens, WARM_UP_TOKENS)) for ask in first]
    if not asks:
        return
    if session.batched:
        session.generate(asks)
        return
    with ThreadPoolExecutor(len(asks)) as pool:
        list(pool.map(lambda ask: session.generate([ask]), asks))


def _in_waves(
    session: Session, dialogues: Sequence[Dialogue], batch_size: int, on_done: Callable[[int], None] | None
) -> None:
    """`batch_size` conversations at a time, turn by turn; a wave ends with its longest answer."""
    for start in range(0, len(dialogues), batch_size):
        wave = list(dialogues[start : start + batch_size])
        while True:
            asked = [(dialogue, ask) for dialogue in wave if (ask := dialogue.next_ask()) is not None]
            if not asked:
                break
            for (dialogue, _), reply in zip(asked, session.generate([ask for _, ask in asked])):
                dialogue.take(reply)
        if on_done is not None:
            on_done(len(wave))


def _in_threads(
    session: Session, dialogues: Sequence[Dialogue], batch_size: int, on_done: Callable[[int], None] | None
) -> None:
    """A thread per request in flight; each takes the next conversation when it has finished one."""

    failed = threading.Event()

    def answer(dialogue: Dialogue) -> None:
        try:
            while not failed.is_set() and (ask := dialogue.next_ask()) is not None:
                dialogue.take(session.generate([ask])[0])
        except BaseException:
            failed.set()  # the other threads end after the request they are waiting for
            raise
        if on_done is not None:
            on_done(1)

    with ThreadPoolExecutor(batch_size) as pool:
        futures = [pool.submit(answer, dialogue) for dialogue in dialogues]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
    for future in futures:
        if not future.cancelled():
            future.result()
