"""The shard store: whatever the order of answers and the moment of a crash, every row ends in exactly one file."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_lite.core.errors import ConfigError
from specforge_lite.regenerate.shards import ShardStore, repair

SETTINGS: dict[str, Any] = {"model": "m", "temperature": [0.0]}


def open_store(directory: Path, num_per_shard: int = 4, resume: bool = True, **changes: Any) -> ShardStore:
    return ShardStore(directory, num_per_shard, {**SETTINGS, **changes}, resume)


def lines(directory: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(directory.glob(pattern)) for line in path.read_bytes().splitlines()]


def names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()} - {".lock", "regeneration.json"}


def finish(directory: Path, num_rows: int, num_per_shard: int = 4) -> set[int]:
    """A run without a crash; returns the rows it had to ask."""
    with open_store(directory, num_per_shard) as store:
        asked = {number for number in range(num_rows) if store.is_needed(number)}
        for number in sorted(asked, reverse=True):
            store.add_answer(number, {"id": f"r{number}"})
        store.end_of_input()
    return asked


def test_shards_by_row_range_sorted_and_complete(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        needed = [n for n in range(10) if store.is_needed(n)]
        assert needed == list(range(10))
        for n in (3, 1, 0):
            store.add_answer(n, {"id": f"r{n}"})
        assert names(tmp_path) == {"shard_0-4.jsonl.part"}
        store.add_error(2, {"id": "r2", "reason": "timeout"})
        assert names(tmp_path) == {"shard_0-4.jsonl", "error_0-4.jsonl"}
        for n in (9, 8, 7, 6, 5, 4):
            store.add_answer(n, {"id": f"r{n}"})
        store.end_of_input()
        store.write_merged(tmp_path / "all.jsonl")
    assert names(tmp_path) == {
        "shard_0-4.jsonl",
        "error_0-4.jsonl",
        "shard_4-8.jsonl",
        "shard_8-12.jsonl",
        "all.jsonl",
        "error.jsonl",
    }
    assert [row["row"] for row in lines(tmp_path, "shard_*")] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert [row["row"] for row in lines(tmp_path, "all.jsonl")] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert lines(tmp_path, "error_*") == [{"row": 2, "id": "r2", "reason": "timeout"}]


def test_shards_are_merged_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    finish(tmp_path, 13, num_per_shard=1)
    with open_store(tmp_path, 1) as store:
        store.write_merged(tmp_path / "all.jsonl")
    assert [row["row"] for row in lines(tmp_path, "all.jsonl")] == list(range(13))


def test_a_row_cannot_be_written_twice(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.is_needed(0)
        assert store.is_needed(1)
        store.add_answer(0, {"id": "a"})
        with pytest.raises(AssertionError, match="row 0 was written twice"):
            store.add_error(0, {"id": "a", "reason": "x"})


def test_resume_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert all(store.is_needed(n) for n in range(6))
        for n in (0, 1, 2, 3, 5):
            store.add_answer(n, {"id": f"r{n}"})
    assert finish(tmp_path, 6) == {4}
    assert finish(tmp_path, 6) == set()


@pytest.mark.parametrize(
    "tail", [b'{"row": 3, "id', b"\x00\x00\x00", b'{"row": 3, "id": "r3"}', b'{"id": 7}\n', b"[]\n"]
)
def test_a_line_cut_off_is_removed_and_its_row_asked_again(
    tmp_path: Path, tail: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(tmp_path) as store:
        assert all(store.is_needed(n) for n in range(4))
        store.add_answer(0, {"id": "r0"})
        store.add_answer(2, {"id": "r2"})
    with open(tmp_path / "shard_0-4.jsonl.part", "ab") as file:
        file.write(tail)
    assert finish(tmp_path, 4) == {1, 3}
    assert [row["row"] for row in lines(tmp_path, "shard_*")] == [0, 1, 2, 3]
    assert "cut off or damaged" in capsys.readouterr().err


def test_a_crash_between_the_two_renames(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert all(store.is_needed(n) for n in range(4))
        store.add_error(0, {"id": "r0", "reason": "timeout"})
        for n in (1, 2, 3):
            store.add_answer(n, {"id": f"r{n}"})
    os.rename(tmp_path / "shard_0-4.jsonl", tmp_path / "shard_0-4.jsonl.part")  # as if the error file alone got there
    assert finish(tmp_path, 4) == set()
    assert names(tmp_path) == {"shard_0-4.jsonl", "error_0-4.jsonl"}
    assert len(lines(tmp_path, "*_*.jsonl")) == 4


def test_retry_errors_drops_them_and_keeps_the_answers(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert all(store.is_needed(n) for n in range(6))
        for n in range(6):
            (store.add_error if n in (1, 5) else store.add_answer)(n, {"id": f"r{n}", "reason": "x"})
    with open_store(tmp_path) as store:
        assert store.retry_errors() == 2
    assert finish(tmp_path, 6) == {1, 5}
    assert [row["row"] for row in lines(tmp_path, "shard_*")] == list(range(6))
    assert lines(tmp_path, "error_*") == []


def test_all_rows_failed_leaves_an_empty_shard_file(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.is_needed(0)
        store.add_error(0, {"id": "r0", "reason": "x"})
        store.end_of_input()
    assert (tmp_path / "shard_0-4.jsonl").read_bytes() == b""
    assert finish(tmp_path, 1) == set()


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    finish(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"temperature was \[0.0\], now \[1.0\]"):
        open_store(tmp_path, temperature=[1.0])
    with pytest.raises(ConfigError, match="--resume is off"):
        open_store(tmp_path, resume=False)
    (tmp_path / "regeneration.json").unlink()
    with pytest.raises(ConfigError, match=r"holds shard_0-4.jsonl but no regeneration.json"):
        open_store(tmp_path)


def test_settings_may_change_while_nothing_is_written(tmp_path: Path) -> None:
    open_store(tmp_path).__exit__()
    open_store(tmp_path, model="other").__exit__()


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path), pytest.raises(ConfigError, match="in use by process"):
        open_store(tmp_path)
    open_store(tmp_path).__exit__()


def test_leftovers_of_a_crashed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".shard_0-4.jsonl.tmp-1-abc").write_text("half")
    open_store(tmp_path).__exit__()
    assert names(tmp_path) == set()


def test_many_open_shards_use_few_file_handles(tmp_path: Path) -> None:
    with open_store(tmp_path, num_per_shard=2) as store:
        assert all(store.is_needed(n) for n in range(400))
        before = len(os.listdir("/proc/self/fd"))
        for n in range(0, 400, 2):
            store.add_answer(n, {"id": f"r{n}"})
        assert len(os.listdir("/proc/self/fd")) - before <= 64
        for n in range(1, 400, 2):
            store.add_answer(n, {"id": f"r{n}"})
    assert len(lines(tmp_path, "shard_*.jsonl")) == 400


def test_repair_keeps_rows_of_its_range_once(tmp_path: Path) -> None:
    part = tmp_path / "p"
    rows = [{"row": 4}, {"row": 5}, {"row": 4}, {"row": 9}, {"row": 6}, {"row": True}]
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert repair(part, {6}, 4, 8) == {4, 5}
    assert part.read_text() == '{"row": 4}\n{"row": 5}\n'


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(1, 30), num_per_shard=st.integers(1, 9))
def test_any_crash_at_any_byte_loses_and_doubles_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_rows: int, num_per_shard: int
) -> None:
    """Runs that stop after a random number of rows and lose a random tail of what was not yet on the disk."""
    directory, rng = tmp_path_factory.mktemp("run"), random.Random(seed)
    for _ in range(4):
        with open_store(directory, num_per_shard) as store:
            asked = [n for n in range(num_rows) if store.is_needed(n)]
            rng.shuffle(asked)
            for n in asked[: rng.randrange(len(asked) + 1)]:
                (store.add_error if rng.random() < 0.3 else store.add_answer)(n, {"id": f"r{n}", "reason": "x"})
        for part in directory.glob("*.part"):
            os.truncate(part, max(0, part.stat().st_size - rng.choice([0, 1, 5, 40])))
    finish(directory, num_rows, num_per_shard)
    assert not list(directory.glob("*.part"))
    found = Counter(row["row"] for row in lines(directory, "*_*.jsonl"))
    assert found == Counter(range(num_rows))
