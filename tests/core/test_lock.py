"""What is installed is what requirements.lock says, nothing more comes along, and every licence is listed."""

from __future__ import annotations

import email.message
import re
from pathlib import Path

import pytest

from specforge_lite.core.errors import ConfigError
from tests.script_runner import ROOT, end_of_script, load_script

LINE = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)")
SCRIPT = load_script("lock_requirements")


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches) if not match]  # exact, no local suffix, no URL
    return {match[1]: match[2] for match in matches if match}


def test_what_the_requirements_ask_for_is_in_the_lock() -> None:
    versions = locked()
    for name in ("requirements.txt", "requirements-dev.txt"):
        for requirement in SCRIPT.requirements(ROOT / name):
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            assert versions[SCRIPT.canonicalize_name(requirement.name)] == specifier.version


def test_everything_that_comes_along_is_in_the_lock_at_its_version() -> None:
    names = SCRIPT.closure(ROOT / "requirements-dev.txt")
    assert len(names) > 50
    assert {name: SCRIPT.version_of(name) for name in names} == {n: v for n, v in locked().items() if n in names}


def test_make_installs_with_the_lock() -> None:
    installs = [
        line
        for line in (ROOT / "Makefile").read_text().splitlines()
        if "pip install" in line and " -r " in line and "--no-deps" not in line
    ]
    assert len(installs) == 3  # what a run needs, what development needs, the real target
    assert all("-c requirements.lock" in line for line in installs)


def test_every_locked_package_has_a_licence() -> None:
    rows = [
        line.strip("| ").split(" | ")
        for line in (ROOT / "docs" / "licences.md").read_text().splitlines()
        if "|" in line
    ]
    table = {row[0]: row[1:] for row in rows[2:]}
    assert {name: cells[0] for name, cells in table.items()} == locked()
    assert all(
        len(cells[1]) > 1 and cells[1].lower() not in ("unknown", "other/proprietary license")
        for cells in table.values()
    )
    assert {cells[2] for cells in table.values()} == {"to run", "to develop"}


def test_no_licence_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nameless:
        metadata = email.message.Message()

    monkeypatch.setattr(SCRIPT, "distribution", lambda name, wanted_by: Nameless)
    with pytest.raises(ConfigError, match="pkg: names no licence in its metadata"):
        SCRIPT.licence_of("pkg")


def test_the_script_sees_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of_script("lock_requirements", ["--check"], capsys)[0] == 0
    SCRIPT.LOCK = tmp_path / "lock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lock_requirements.py", "--check"])
        with pytest.raises(ConfigError, match="lock: differs from what is installed"):
            SCRIPT.main()
