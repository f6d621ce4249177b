"""A disk that gets full, and one that cannot be written, met by every stage: one clear line, exit code 2, nothing under
a final name; with room again the same command ends with the bytes of a run that had room from the start.

The disk is a small tmpfs that the test mounts. Where mounting is not allowed, a limit on the size of files makes the
same writes fail, and a directory below /proc takes the part of the read-only one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kill_stages import STAGES, Host, Inputs, difference, has_traceback, log_of

# Where the output of a stage lies, and which of its files are finished results (the others are caches and locks).
RESULTS = {
    "training": "run/step_*",
    "dataset cache": "dataset-*",
    "offline capture": "states/train/manifest.json",
    "regeneration": "merged.jsonl",
    "export": "draft",
    "bundle": "bundle",
    "prepare data": "data.jsonl",
}
ROOM_SHARE = 0.4  # of what an undisturbed run takes; the same for the largest file where only files can be limited


@dataclass
class Disk:
    """A directory with little room. is_mounted: it is a file system of its own."""

    path: Path
    is_mounted: bool

    def resize(self, num_bytes: int) -> None:
        assert self.is_mounted
        mount("-o", f"remount,size={num_bytes}", self.path)

    def set_read_only(self) -> None:
        mount("-o", "remount,ro", self.path)


def mount(*words: str | Path) -> bool:
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    is_mounted = mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", path)
    yield Disk(path, is_mounted)
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def check_refusal(status: int, log: str) -> str:
    assert status == 2, log[-2000:]
    assert not has_traceback(log), log[-2000:]
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    return line


def sizes(root: Path) -> list[int]:
    return [path.stat().st_size for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", RESULTS)
def test_a_disk_that_gets_full(name: str, host: Host, inputs: Inputs, disk: Disk, tmp_path: Path) -> None:
    stage, short = STAGES[name], "bundle" if name == "bundle" else "stage"
    whole, root, log = tmp_path / f"{short}-whole", disk.path / short, tmp_path / "full.log"
    assert host.run(stage, inputs, whole)["status"] == 0, log_of(whole).read_text()
    limit = None
    if disk.is_mounted:
        disk.resize(max(8192, int(ROOM_SHARE * sum(sizes(whole)))))
    else:
        limit = max(512, int(ROOM_SHARE * max(sizes(whole))))
    reply = host.run(stage, inputs, root, max_file_bytes=limit, log=log)
    line = check_refusal(reply["status"], log.read_text())
    assert any(
        words in line for words in ("No space left", "are free", "File too large", "disk full", "bytes could be")
    )
    finished = sorted(path.name for path in root.glob(RESULTS[name]))
    assert finished == [] or name == "training"  # the checkpoints before the one that found no room stay
    if disk.is_mounted:
        disk.resize(256 << 20)
    assert host.run(stage, inputs, root, log=log)["status"] == 0, log.read_text()[-2000:]
    assert difference(stage.result(whole), stage.result(root)) == ""


@pytest.mark.parametrize("name", RESULTS)
def test_a_directory_that_cannot_be_written(name: str, host: Host, inputs: Inputs, disk: Disk, tmp_path: Path) -> None:
    root, log = disk.path / "stage", tmp_path / "read-only.log"
    if disk.is_mounted:
        root.mkdir()
        disk.set_read_only()
    else:
        root = Path("/proc/sys/kernel")
    reply = host.run(STAGES[name], inputs, root, log=log)
    line = check_refusal(reply["status"], log.read_text())
    assert str(root) in line
    assert any(words in line for words in ("Read-only file system", "Permission denied", "No such file"))
