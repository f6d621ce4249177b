"""SIGKILL at random moments in every stage of the pipeline: the next run goes on, and what it leaves has the bytes of a
run that nobody disturbed, with nothing left over.

Half of the kills hit exactly between two changes of the directory (before a rename, between a rename and the tidying up
after it), the other half an arbitrary moment, such as the middle of a write.
"""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.kill_stages import (
    STAGES,
    Host,
    Inputs,
    Result,
    Stage,
    difference,
    has_traceback,
    log_of,
)

KILLS_IN_A_ROW = 4
# How the 200 kills of `make stress` are shared out.
STRESS_KILLS = {
    "training": 64,
    "dataset cache": 28,
    "offline capture": 32,
    "regeneration": 36,
    "export": 16,
    "bundle": 12,
    "prepare data": 12,
}
SHORT_KILLS = {"training": 3, "dataset cache": 2, "offline capture": 2, "regeneration": 3, "export": 2}


@dataclass
class Undisturbed:
    """A run that was not killed: what it left, its directory changes, its seconds. `deck`: changes still to be hit."""

    result: Result
    events: int
    seconds: float
    deck: list[int] = field(default_factory=list)

    def next_event(self, rng: random.Random) -> int:
        """A change to be killed at; each once before any of them comes again."""
        if not self.deck:
            self.deck = rng.sample(range(1, self.events + 1), self.events)
        return self.deck.pop()


@dataclass
class Row:
    """A line of the table. `failures`: what was wrong after the last run of a chain."""

    stage: str
    kills: int = 0
    kills_at_changes: int = 0
    ran_to_the_end: int = 0
    resumes: int = 0
    failures: list[str] | None = None

    def line(self) -> str:
        problems = self.failures or []
        verdict = "same bytes, nothing left over" if not problems else f"{len(problems)} FAILED: {problems[0]}"
        return f"{self.stage:<16} {self.kills:>5} {self.kills_at_changes:>10} {self.resumes:>8}  {verdict}"


HEADER = f"{'stage':<16} {'kills':>5} {'at changes':>10} {'resumes':>8}  result"


def undisturbed(host: Host, stage: Stage, inputs: Inputs, root: Path) -> Undisturbed:
    stage.prepare(inputs, root)
    reply = host.run(stage, inputs, root)
    assert reply["status"] == 0, log_of(root).read_text()
    assert reply["events"] > 3  # or no kill would ever hit one
    return Undisturbed(stage.result(root), reply["events"], reply["seconds"])


def kill_chain(
    host: Host, stage: Stage, inputs: Inputs, root: Path, whole: Undisturbed, kills: int, rng: random.Random, row: Row
) -> None:
    """Kill one run `kills` times at random moments, each time continuing it, then let it end and compare."""
    stage.prepare(inputs, root)
    done = 0
    while done < kills:
        if rng.random() < 0.5:
            reply = host.run(stage, inputs, root, at_event=whole.next_event(rng))
            row.kills_at_changes += reply["status"] == -signal.SIGKILL
        else:
            reply = host.run(stage, inputs, root, after_s=rng.uniform(0, whole.seconds))
        if reply["status"] == -signal.SIGKILL:
            done += 1
            row.kills += 1
        elif reply["status"] == 0:  # there was little left to do; that is a resume as well
            row.ran_to_the_end += 1
            break
        else:
            raise AssertionError(f"exit code {reply['status']}: {log_of(root).read_text()[-2000:]}")
    reply = host.run(stage, inputs, root)
    row.resumes += 1
    log = log_of(root).read_text()
    if reply["status"] != 0 or has_traceback(log):
        problem = f"exit code {reply['status']}: {log[-1500:]}"
    else:
        problem = difference(whole.result, stage.result(root))
    if problem:
        row.failures = [*(row.failures or []), f"{root.name}: {problem}"]


def kill_many(host: Host, inputs: Inputs, directory: Path, plan: dict[str, int], seed: int) -> list[Row]:
    rows = []
    for name, kills in plan.items():
        rng, stage, row = random.Random(f"{seed} {name}"), STAGES[name], Row(name)
        short = name.replace(" ", "-")
        whole = undisturbed(host, stage, inputs, directory / f"{short}-whole")
        chain = 0
        while row.kills < kills:
            chain += 1
            in_a_row = min(rng.randint(1, KILLS_IN_A_ROW), kills - row.kills)
            kill_chain(host, stage, inputs, directory / f"{short}-{chain}", whole, in_a_row, rng, row)
        rows.append(row)
    return rows


def check(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + "\n".join([HEADER, *(row.line() for row in rows)]))
        print(f"{'all':<16} {sum(r.kills for r in rows):>5} {sum(r.kills_at_changes for r in rows):>10}", end="")
        print(f" {sum(row.resumes for row in rows):>8}")
    assert not [problem for row in rows for problem in row.failures or []]


def test_a_dozen_kills(host: Host, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = kill_many(host, inputs, tmp_path, SHORT_KILLS, seed=1)
    assert sum(row.kills for row in rows) == sum(SHORT_KILLS.values())
    check(rows, capsys)


@pytest.mark.stress
@pytest.mark.timeout(1500)
def test_two_hundred_kills(host: Host, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = kill_many(host, inputs, tmp_path, STRESS_KILLS, seed=200)
    assert sum(row.kills for row in rows) == 200
    check(rows, capsys)


def test_a_result_that_differs_would_be_seen() -> None:
    """The comparison itself: a byte, a file too many and a file too few."""
    expected = {"a": "1", "b": "2"}
    assert difference(expected, dict(expected)) == ""
    assert difference(expected, {"a": "1", "b": "3", "c": "4"}) == "left over: c; differs: b"
    assert difference(expected, {"a": "1"}) == "missing: b"
