"""Files of one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.core.files import read_text


def read_jsonl(path: Path, last_may_be_cut: bool = False) -> list[dict[str, Any]]:
    """One JSON object per line; `last_may_be_cut`: leave out a half-written last line. Raises DataError with the line
    of a mistake."""
    lines = read_text(path).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else None
        except ValueError as error:
            if last_may_be_cut and number == len(lines):
                break
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
        if isinstance(value, dict):
            rows.append(value)
        elif line.strip():
            raise DataError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
    return rows
