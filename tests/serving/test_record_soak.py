"""The soak of the recorder in short; benchmarks/soak_record.py says what it does, and runs for an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak_record import Soak, SoakConfig, answer_of

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = str(ROOT / "benchmarks" / "soak_record.py")


def soak(*flags: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_ten_seconds() -> None:
    # Memory is judged over the hour only: in ten seconds one process after another starts.
    seen = soak("--seconds", "10", "--rate", "40", "--stall-seconds", "1", "--allowed-growth-mb", "100")
    assert "RESULT nothing lost, nothing doubled" in seen


@pytest.mark.stress
@pytest.mark.timeout(4200)
def test_an_hour(capsys: pytest.CaptureFixture[str]) -> None:
    seen = soak("--seconds", "3600", "--rate", "25")
    with capsys.disabled():
        print("\n" + seen.strip())


def test_what_goes_wrong_would_be_seen(tmp_path: Path) -> None:
    run = Soak(SoakConfig(), tmp_path)
    run.kinds = ["plain", "stream", "break", "plain", "plain"]
    run.whole = {0, 1, 3, 4}
    turns = lambda n: [f"{run.kinds[n]} {n}", answer_of(n, run.kinds[n]) + "x" * (n == 4)]  # noqa: E731
    rows = [{"id": f"chat-{n}", "conversations": [{"content": text} for text in turns(n)]} for n in (0, 1, 1, 2, 4)]
    (tmp_path / "traffic_000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": "cut')
    assert run.check() == [
        "plain 4: the row is not what was said",
        "plain 3: lost",
        "stream 1: doubled",
        "break 2: no whole reply, yet a row",
    ]
