"""The benchmark's loop: requests in flight, turns, resuming after a crash. Engines are small real sessions."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.benchmark.configs import BASELINE, BenchConfig, Speculation
from specforge_lite.benchmark.measure import Ask, Session, measure
from specforge_lite.benchmark.rows import ResultFile
from specforge_lite.benchmark.run import Workload, run_benchmark
from specforge_lite.benchmark.statistics import Counters
from specforge_lite.core.errors import DataError, EngineError
from specforge_lite.data.prompts import ChatEncoder, Prompt
from specforge_lite.serving.engine import Generation

CHAIN = Speculation(2, 1, 3)
PROMPTS = [
    Prompt(str(i), "ab"[i % 2], (f"question {i}", "and?") if i % 3 == 0 else (f"question {i}",)) for i in range(7)
]


class Words:
    """A tokenizer of characters."""

    chat_template = "present"

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for m in messages for c in f"{m['role'][0]}{m['content']}|"]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


@dataclass
class Parrot:
    """Repeats the end of the prompt. With a draft two tokens per pass."""

    speculation: Speculation = BASELINE
    batched: bool = False
    context_length: int = 1000
    delay: float = 0.0
    fail_at: int | None = None
    num_asked: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    batch_sizes: list[int] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    num_begun: int = 0
    closed: bool = False
    clock: Any = time.perf_counter

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def begin(self) -> None:
        self.num_begun += 1

    def counters(self) -> Counters:
        return Counters()

    def close(self) -> None:
        self.closed = True

    def generate(self, asks: Sequence[Ask]) -> list[Generation]:
        with self.lock:
            self.num_asked += len(asks)
            self.in_flight += len(asks)
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.batch_sizes.append(len(asks))
            self.seen += ["".join(map(chr, ask.token_ids)) for ask in asks]
            failed = self.fail_at is not None and self.num_asked > self.fail_at
        if failed:
            raise EngineError("the server died")
        time.sleep(self.delay)
        with self.lock:
            self.in_flight -= len(asks)
        return [self._reply(ask) for ask in asks]

    def _reply(self, ask: Ask) -> Generation:
        tokens = ask.token_ids[-min(9, ask.max_new_tokens) :]
        if self.speculation.is_baseline:
            return Generation(tokens, None, (), 0.001, 0.010)
        return Generation(tokens, (len(tokens) - 1) // 2, ((len(tokens) - 1) // 2,), 0.001, 0.006)


CHAT = ChatEncoder(Words())


def test_as_many_requests_in_flight_as_asked_for() -> None:
    session = Parrot(delay=0.02)
    measured = measure(session, PROMPTS, 3, CHAT, 100)
    assert session.most_in_flight == 3
    assert len(measured.records) == 10  # 7 prompts, 3 of them with two turns
    assert session.num_begun == 1
    assert session.num_asked == 10 + 3  # the warm-up
    assert sorted({r.prompt for r in measured.records}) == list(range(7))
    assert measured.duration > 0.02 * 10 / 3


def test_batched_sessions_get_waves() -> None:
    session = Parrot(batched=True)
    done: list[int] = []
    measured = measure(session, PROMPTS, 3, CHAT, 100, done.append)
    # Warm-up, then waves {0,1,2}, {3,4,5}, {6}, each followed by the second turns of 0, 3 and 6.
    assert session.batch_sizes == [3, 3, 1, 3, 1, 1, 1]
    assert done == [3, 3, 1]
    assert len(measured.records) == 10


def test_the_second_turn_sees_the_first_answer() -> None:
    session = Parrot()
    prompt = Prompt("x", "", ("one", "two"), ({"role": "system", "content": "S"},))
    records = measure(session, [prompt], 1, CHAT, 4).records
    assert session.seen[-2:] == ["sS|uone|", "sS|uone|aone||utwo|"]  # the answer to "one|" was "one|"
    assert [r.turn for r in records] == [0, 1]
    assert all(len(r.token_ids) == 4 for r in records)


def test_turns_without_room_are_left_out_and_counted() -> None:
    session = Parrot(context_length=30)
    long = Prompt("x", "", ("q" * 15, "r" * 5, "s"))
    measured = measure(session, [long], 1, CHAT, 50)
    assert len(measured.records) == 1
    assert measured.num_left_out == 2
    assert measured.records[0].num_prompt_tokens == 17
    with pytest.raises(DataError, match="no prompt leaves room for 8 tokens in a context of 20"):
        measure(Parrot(context_length=20), [long], 1, CHAT, 50)


def test_an_error_in_one_thread_ends_the_run() -> None:
    session = Parrot(delay=0.005, fail_at=6)
    with pytest.raises(EngineError, match="the server died"):
        measure(session, PROMPTS, 2, CHAT, 100)
    assert session.num_asked <= 6 + 2  # nothing is asked after the failure but what was on its way


def work() -> Workload:
    return Workload({"mine": PROMPTS, "other": PROMPTS[:2]}, CHAT, 100)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    opened: list[tuple[Speculation, int, Parrot]] = []

    def opener(fail_at: int | None) -> Any:
        def open_session(speculation: Speculation, batch_size: int) -> Session:
            session = Parrot(speculation, fail_at=None if speculation.is_baseline else fail_at)
            opened.append((speculation, batch_size, session))
            return session

        return open_session

    configs = [BenchConfig(2, CHAIN), BenchConfig(1, CHAIN)]
    path = tmp_path / "r.jsonl"
    with pytest.raises(EngineError):  # dies within the second drafted row: warm-up 1 + 10 requests, then 1 + 2
        run_benchmark(configs, work(), ResultFile(path, {}), opener(fail_at=12))
    assert [(s, b) for s, b, _ in opened] == [(BASELINE, 2), (CHAIN, 2)]
    assert all(session.closed for _, _, session in opened)
    assert len(ResultFile(path, {}).rows) == 4 + 1
    opened.clear()
    rows = run_benchmark(configs, work(), ResultFile(path, {}), opener(None))
    assert [(s, b) for s, b, _ in opened] == [(CHAIN, 2)]  # the baseline is not run again
    assert opened[0][2].num_begun == 3
    assert [(r.benchmark, r.batch_size, r.steps) for r in rows] == [
        ("mine", 1, 0), ("other", 1, 0), ("mine", 2, 0), ("other", 2, 0),
        ("mine", 1, 2), ("other", 1, 2), ("mine", 2, 2), ("other", 2, 2),
    ]  # fmt: skip
    assert all(row.identical_share == 1.0 for row in rows if row.steps)
    assert all(row.acc_length == 9 / 4 for row in rows if row.steps)
    assert all(row.speedup is not None and row.speedup_interval is not None for row in rows if row.steps)
    opened.clear()
    assert run_benchmark(configs, work(), ResultFile(path, {}), opener(None)) == ResultFile(path, {}).rows
    assert opened == []


def test_different_answers_are_seen(tmp_path: Path) -> None:
    class Liar(Parrot):
        def _reply(self, ask: Ask) -> Generation:
            reply = super()._reply(ask)
            wrong = chr(ask.token_ids[-2]) == "1" and not self.speculation.is_baseline
            return Generation((0, *reply.token_ids[1:]), *list(vars(reply).values())[1:]) if wrong else reply

    rows = run_benchmark([BenchConfig(1, CHAIN)], work(), ResultFile(tmp_path / "r.jsonl", {}), lambda s, b: Liar(s))
    assert {row.benchmark: row.identical_share for row in rows if row.steps} == {"mine": 6 / 7, "other": 1 / 2}
