"""docs/reliability.md names tests that exist, and says of each what came out."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS.parent / "docs" / "reliability.md"
NAME = re.compile(r"`(?:(test_\w+\.py))?(?:::(test_\w+))?`")


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return [row for row in cells if row[0] not in ("promise", "input")]


def test_every_named_test_exists() -> None:
    names = 0
    for row in rows():
        file = ""
        for match in NAME.finditer(row[1]):
            file = match[1] or file
            if not file:
                continue
            source = next(TESTS.rglob(file)).read_text(encoding="utf-8")
            names += 1
            assert match[2] is None or f"def {match[2]}(" in source, f"{file}::{match[2]}"
    assert names > 50


def test_every_row_has_a_promise_a_test_and_a_result() -> None:
    assert len(rows()) > 40
    for row in rows():
        assert len(row) == 3, row
        assert "`test_" in row[1] or "@given" in row[1], row
        assert len(row[2]) > 5, row
        assert not re.search(r"\b[A-Z]+_[A-Z]+\b", row[2]), row  # nothing was left to be filled in
