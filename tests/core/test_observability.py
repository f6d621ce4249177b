"""What a run says of itself while it runs, hangs, fails or ends, also when the clock of the machine jumps."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.core import log, provenance
from specforge_lite.core.errors import TrainingError
from specforge_lite.training import reporting
from specforge_lite.training.loop import Trainer
from tests.fake_engine import FakeEngine, Fault
from tests.training_runs import Run, start_ranks, train, wait


def summary_of(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.output_dir / "exit_summary.json").read_text()))


def events_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_error_ends_with_a_summary_that_says_what_is_left(tmp_path: Path) -> None:
    """Why, where, the newest checkpoint, and the counts, not only for runs that end well."""
    faults = {f"s{i}": Fault("nan") for i in range(0, 24, 3)} | {"s1": Fault("refused")}
    settings = {
        "training": {"nonfinite_budget": 2, "total_steps": 12, "skip_budget": 0.1},
        "checkpoint": {"save_interval": 1},
        "logging": {"log_file": str(tmp_path / "log.jsonl")},
    }
    run = Run(tmp_path, settings=settings, faults=faults)
    for restarts in range(2):
        with pytest.raises(TrainingError, match="3 steps had a NaN or infinite loss"):
            train(run)
        summary = summary_of(run)
        assert summary["reason"].startswith("TrainingError: ")
        assert Path(summary["last_checkpoint"]).is_dir()
        assert summary["last_checkpoint"] == str(reporting.checkpoints(run.output_dir)[0])
        assert (summary["nonfinite_steps"], summary["restarts"], summary["total_steps"]) == (3, restarts, 12)
        assert summary["seconds"] > 0
    end = [event for event in events_of(tmp_path / "log.jsonl") if event["event"] == "end"]
    assert [event["restarts"] for event in end] == [0, 1]
    assert all(event["nonfinite_steps"] == 3 for event in end)


def test_every_line_of_the_log_file_is_json_with_time_and_event(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log.jsonl"
    run = Run(tmp_path, settings={"logging": {"log_file": str(log)}, "training": {"total_steps": 4}})
    train(run)
    train(run)  # appends
    events = events_of(log)
    assert all(datetime.fromisoformat(event["time"]) and event["event"] for event in events)
    assert [event["event"] for event in events].count("start") == 2
    shown = [event["message"] for event in events if event["event"] == "info"]
    assert any(re.match(r"step 4/4 loss ", message) for message in shown)


def train_with_frequent_beats(run: Run) -> None:
    reporting.HEARTBEAT_SECONDS = 0.2
    train(run)


def test_the_heartbeat_tells_step_time_and_state_while_it_runs(tmp_path: Path) -> None:
    run = Run(tmp_path, settings={"training": {"total_steps": 10}}, latency_s=0.1)
    process = start_ranks(1, train_with_frequent_beats, (run,), tmp_path / "log")[0]
    seen: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        path = run.output_dir / "heartbeat.json"
        if path.exists():
            beat = json.loads(path.read_text())  # never half a file
            if not seen or beat != seen[-1]:
                seen.append(beat)
        time.sleep(0.01)
    assert wait([process]) == [0]
    assert len(seen) >= 3
    assert [beat["step"] for beat in seen] == sorted(beat["step"] for beat in seen)
    assert {beat["pid"] for beat in seen} == {process.pid}
    assert seen[0]["state"] == "training"
    assert (seen[-1]["step"], seen[-1]["state"]) == (10, "finished")
    age = datetime.now(UTC) - datetime.fromisoformat(seen[-1]["time"])
    assert timedelta(0) <= age < timedelta(minutes=2)


def test_a_hang_shows_its_place_on_sigusr1_and_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, settings={"training": {"total_steps": 12}}, faults={"s3": Fault("hang")})
    process = start_ranks(1, train, (run,), tmp_path / "log")[0]
    log = tmp_path / "log" / "rank_0.log"
    deadline = time.monotonic() + 60
    while not (run.output_dir / "heartbeat.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    while "in _spoil" not in log.read_text() and time.monotonic() < deadline:
        os.kill(process.pid or 0, signal.SIGUSR1)
        time.sleep(0.3)
    alive = process.is_alive()
    process.kill()
    process.join()
    text = log.read_text()
    assert alive  # a dump is no end
    assert 'tests/fake_engine.py", line ' in text  # where the engine's thread hangs
    assert "in _spoil" in text
    assert "in train\n" in text  # and what the main thread waits for


def test_the_step_line_tells_the_health_of_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(trainer: Trainer) -> None:
        trainer.engine_health = lambda: "engine restarted 2x" if trainer.progress.step > 2 else ""

    run = Run(tmp_path, settings={"training": {"total_steps": 4}})
    train(run, change)
    lines = [line for line in capsys.readouterr().out.splitlines() if " loss " in line]
    assert [line.endswith("engine restarted 2x") for line in lines] == [False, False, True, True]
    assert [row["engine"] for row in run.metrics() if "engine" in row] == ["", "", *["engine restarted 2x"] * 2]


def test_an_engine_that_reports_health_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "health", lambda self: "engine restarted 1x", raising=False)
    run = Run(tmp_path, settings={"training": {"total_steps": 2}})
    train(run)
    assert {row["engine"] for row in run.metrics() if "engine" in row} == {"engine restarted 1x"}


class JumpingClock(datetime):
    """Wall time that jumps by days, back and forth, with every look at it."""

    looks = 0

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        cls.looks += 1
        return datetime.now(tz) + timedelta(days=(-3 if cls.looks % 2 else 400))


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = time.time
    looks = [0]

    def jump() -> float:
        looks[0] += 1
        return real() + (-3e5 if looks[0] % 2 else 4e7)

    monkeypatch.setattr(provenance, "datetime", JumpingClock)
    monkeypatch.setattr(time, "time", jump)
    yield
    assert JumpingClock.looks > 3


@pytest.mark.usefixtures("jumping")
def test_clock_jumps_change_nothing(tmp_path: Path) -> None:
    """Rates, remaining time and heartbeats count on the monotonic clock; a resume does not look at dates."""
    settings: dict[str, Any] = {
        "training": {"total_steps": 6},
        "checkpoint": {"save_interval": 2, "save_total_limit": 2},
    }
    settings["optimizer"] = {"lr_schedule": "constant", "warmup_steps": 0}
    run = Run(tmp_path, settings=settings)
    train(run)
    longer = Run(tmp_path, settings=settings | {"training": {"total_steps": 10}})
    assert train(longer).step == 10
    names = sorted(path.name for path in run.output_dir.glob("*step_*"))
    assert names == ["step_10", "step_8"]
    for row in longer.metrics():
        assert row.get("eta_seconds", 0) >= 0
        assert row.get("tokens_per_second", 1) > 0
        assert 0 <= row.get("wait_share", 0) <= 1
    whole = Run(tmp_path, "whole", settings | {"training": {"total_steps": 10}})
    train(whole)
    assert whole.losses() == longer.losses()


def test_wall_time_is_read_in_four_places_only() -> None:
    """Dates for people, and a server's Retry-After; everything that is measured uses a clock that cannot jump."""
    package = Path(reporting.__file__).resolve().parents[1]
    users = set()
    for path in package.rglob("*.py"):
        if re.search(r"\btime\.time\(|datetime\.now\(|datetime\.utcnow\(", path.read_text()):
            users.add(str(path.relative_to(package)))
    assert {name for name in users if "plugins" not in name} == {
        "core/files.py", "core/http.py", "core/provenance.py", "serving/record.py",
    }  # fmt: skip


def test_progress_off_a_terminal_is_plain_lines_and_rare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    with log.progress(1000, "regenerate", unit="row") as bar:
        for _ in range(25):  # 25 seconds, 4 rows each
            clock[0] += 1.0
            bar.update(4)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert shown.splitlines() == [
        "regenerate: 40 of 1,000 (4%), 4 row/s, 4m left",
        "regenerate: 80 of 1,000 (8%), 4 row/s, 4m left",
    ]
