"""What a killed process leaves is removed by the next run, and never what a living one is writing."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.capture.offline import OfflinePart, capture_offline
from specforge_lite.capture.settings import CaptureSection
from specforge_lite.core import files as atomic
from specforge_lite.core.files import atomic_file, lock_directory, remove_leftovers, replace_directory
from specforge_lite.regenerate.shards import ShardStore
from tests.fake_engine import FakeEngine
from tests.script_runner import end_of_script
from tests.training_runs import INFO, Run, make_dataset, train


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_only_what_is_dead_and_belongs_to_the_file_goes(tmp_path: Path, dead_pid: int) -> None:
    kept = [f".data.tmp-{os.getpid()}-00ff", ".data.tmp-x", f".other.tmp-{dead_pid}-00ff", f".data.backup-{dead_pid}"]
    gone = [f".data.tmp-{dead_pid}-00ff", f".data.deleted-{dead_pid}"]
    for name in [*kept, *gone]:
        (tmp_path / name).write_text("x")
    (tmp_path / f".data.old-{dead_pid}").mkdir()
    (tmp_path / f".data.old-{dead_pid}" / "file").write_text("x")
    remove_leftovers(tmp_path, "data")
    assert names(tmp_path) == sorted(kept)


def test_a_file_that_somebody_holds_stays(tmp_path: Path, dead_pid: int) -> None:
    """The process number means nothing when the writer is on another host; its lock does."""
    left = tmp_path / f".data.tmp-{dead_pid}-00ff"
    with open(left, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_leftovers(tmp_path, "data")
        assert left.exists()
    remove_leftovers(tmp_path, "data")
    assert not left.exists()


def test_writing_a_file_tidies_up_first_and_holds_a_lock(tmp_path: Path, dead_pid: int) -> None:
    (tmp_path / f".data.tmp-{dead_pid}-00ff").write_text("half")
    with atomic_file(tmp_path / "data") as file:
        file.write("whole")
        (temporary,) = (tmp_path / name for name in names(tmp_path))
        assert atomic._is_locked(temporary)
    assert names(tmp_path) == ["data"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_is_replaced(tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_directory(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old" / "file").read_text() == "new"


def test_two_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
    assert not atomic._exchange(tmp_path / "a", tmp_path / "nothing")


def test_a_run_tidies_its_directory(tmp_path: Path, dead_pid: int) -> None:
    settings = {"checkpoint": {"save_interval": 2, "save_total_limit": 2}}
    run = Run(tmp_path, settings=settings)
    train(run)
    wanted = names(run.output_dir)
    for name in (f".exit_summary.json.tmp-{dead_pid}", f".heartbeat.json.tmp-{dead_pid}"):
        (run.output_dir / name).write_text("{")
    # killed after the last save, before the oldest checkpoint was deleted
    subprocess.run(["cp", "-r", run.output_dir / "step_4", run.output_dir / "step_2"], check=True)
    (run.output_dir / f".step_6.tmp-{dead_pid}").mkdir()
    train(run)
    assert names(run.output_dir) == wanted


def test_the_oldest_checkpoint_stays_while_a_newer_one_is_damaged(tmp_path: Path) -> None:
    run = Run(tmp_path, settings={"checkpoint": {"save_interval": 2}})
    train(run)
    (run.output_dir / "step_6" / "draft.safetensors").write_bytes(b"")
    (run.output_dir / "step_4" / "manifest.json").write_text("{")
    limited = Run(tmp_path, settings={"checkpoint": {"save_interval": 2, "save_total_limit": 1}})
    assert train(limited).step == 6
    assert [name for name in names(run.output_dir) if "step" in name] == ["step_6"]


def test_a_capture_killed_while_it_copied_the_dataset_continues(tmp_path: Path, dead_pid: int) -> None:
    data = make_dataset(tmp_path / "data")
    directory = tmp_path / "states"
    config = CaptureSection(offline_dir=directory)
    capture_offline(data, FakeEngine(INFO), directory, config)
    (directory / "dataset").rename(directory / f".dataset.tmp-{dead_pid}")
    (directory / "manifest.json").unlink()
    capture_offline(data, FakeEngine(INFO), directory, config)
    assert [name for name in names(directory) if name.startswith(".")] == []
    assert len(OfflinePart(directory).dataset) == len(data)


@pytest.mark.parametrize("damage", ["deleted", "cut", "changed"])
def test_a_shard_that_is_not_as_written_is_captured_again(tmp_path: Path, damage: str) -> None:
    data, directory = make_dataset(tmp_path / "data"), tmp_path / "states"
    capture_offline(data, FakeEngine(INFO), directory, CaptureSection(offline_dir=directory))
    shard = directory / "states_00000.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-4] if damage == "cut" else good[:-1] + bytes([good[-1] ^ 1]))
    if damage == "deleted":
        shard.unlink()
    capture_offline(data, FakeEngine(INFO), directory, CaptureSection(offline_dir=directory))
    assert shard.read_bytes() == good


def test_a_second_capture_into_one_directory_is_refused(tmp_path: Path, tiny_target: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "response": "an answer"}\n')
    holder = lock_directory(tmp_path / "states", "offline_dir")
    words = ["--target-model-path", str(tiny_target), "--target-backend", "fake", "--train-data-path", str(rows)]
    words += ["--offline-dir", str(tmp_path / "states"), "--cache-dir", str(tmp_path / "cache"), "--max-length", "64"]
    code, error = end_of_script("capture_hidden_states", words, capsys)
    assert code == 2
    assert f"offline_dir {tmp_path / 'states'}: in use by process {os.getpid()} since" in error
    assert names(tmp_path / "states") == [".lock"]
    holder.close()
    assert end_of_script("capture_hidden_states", words, capsys)[0] == 0


def test_parts_of_a_finished_shard_go(tmp_path: Path) -> None:
    with ShardStore(tmp_path, 2, {}, True) as store:
        for number in range(2):
            assert store.is_needed(number)
            store.add_answer(number, {"id": str(number)})
        store.end_of_input()
    whole = (tmp_path / "shard_0-2.jsonl").read_bytes()
    (tmp_path / "shard_0-2.jsonl.part").write_bytes(whole[:9])
    (tmp_path / "error_0-2.jsonl.part").write_bytes(b"")
    with ShardStore(tmp_path, 2, {}, True) as store:
        assert not store.is_needed(0)
    assert [name for name in names(tmp_path) if name.endswith(".part")] == []
    assert json.loads(whole.splitlines()[0])["row"] == 0
