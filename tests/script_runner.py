"""Run a script's `main` in this process: its logic is tested without starting an interpreter."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> Any:
    """scripts/NAME.py, or a path from the repository's root, as a module."""
    path = ROOT / (name if name.endswith(".py") else f"scripts/{name}.py")
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_in_process(name: str, words: list[str]) -> int:
    """Call `main` of scripts/NAME.py with these arguments; errors come out as exceptions. Returns its exit code."""
    module = load_script(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *words])
        return int(module.main() or 0)


def end_of_script(name: str, words: list[str], capsys: Any) -> tuple[int, str]:
    """Run scripts/NAME.py as its `__main__` does; (exit code, its error, or else the last line of stderr)."""
    from specforge_lite.core.log import run_script

    module = load_script(name)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as ended:
            run_script(module.main)
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    start = errors.rfind("error: ")
    return int(ended.value.code or 0), errors[start:].rstrip("\n") if start >= 0 else (errors.splitlines() or [""])[-1]


def visible(directory: Path) -> list[str]:
    """What lies under a final name in a directory, which may be missing."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(name for name in names if not name.startswith("."))
