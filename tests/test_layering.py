"""Imports point one way: core, types <- {data, model} <- capture <- serving <- checkpoints <- {training, inference,
regenerate} <- {evaluation, benchmark} <- report <- {doctor, cli} <- scripts, benchmarks. Read from the source, so that
a lazy import counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "specforge_lite"

# Layer number of each part; a file may import parts of its own layer only if ALLOWED_SIDEWAYS says so.
LAYERS = {
    "__version__": 0, "types": 0, "core": 0, "assets": 0,
    "data": 1, "model": 1,
    "capture": 2,
    "serving": 3,
    "checkpoints": 4,
    "training": 5, "inference": 5, "regenerate": 5,
    "evaluation": 6, "benchmark": 6,
    "report": 7,
    "doctor": 8, "cli": 8, "__main__": 9,
}  # fmt: skip
ALLOWED_SIDEWAYS = {("core", "__version__"), ("regenerate", "inference"), ("cli", "doctor")}
FORBIDDEN = {("data", "model"), ("model", "data")}
# Importable with torch alone: a GPU machine may have nothing else.
TORCH_ONLY = ("model", "types", "core/errors.py", "core/log.py")
TORCH_ONLY_MODULES = {"torch", "specforge_lite", *sys.stdlib_module_names}


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE).parts
    return inside[0].removesuffix(".py")


def imported(tree: ast.AST, top_level_only: bool = False) -> list[str]:
    nodes = tree.body if top_level_only and isinstance(tree, ast.Module) else list(ast.walk(tree))
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += (
                [node.module] if node.module != "specforge_lite" else [f"specforge_lite.{a.name}" for a in node.names]
            )
    return names


FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent != PACKAGE
    if "plugins" not in path.parts
]


def problems_in(path: Path) -> list[str]:
    part = part_of(path)
    if part not in LAYERS:
        return [f"{path.relative_to(ROOT)}: '{part}' has no layer in tests/test_layering.py"]
    found = []
    for name in imported(ast.parse(path.read_text())):
        if not name.startswith("specforge_lite."):
            continue
        other = name.split(".")[1]
        same_layer = LAYERS.get(other, 99) == LAYERS[part] and other != part and (part, other) not in ALLOWED_SIDEWAYS
        if LAYERS.get(other, 99) > LAYERS[part] or same_layer or (part, other) in FORBIDDEN:
            found.append(f"{path.relative_to(ROOT)}: {part} imports {name}")
    if part in TORCH_ONLY or str(path.relative_to(PACKAGE)) in TORCH_ONLY:
        for name in imported(ast.parse(path.read_text()), top_level_only=True):
            if name.split(".")[0] not in TORCH_ONLY_MODULES:
                found.append(f"{path.relative_to(ROOT)}: imports {name} at module level; torch alone must do")
    return found


def test_imports_point_one_way() -> None:
    assert [line for path in FILES for line in problems_in(path)] == []


def test_the_check_sees_an_import_that_points_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "model").mkdir()
    bad = tmp_path / "model" / "x.py"
    bad.write_text("def f():\n    from specforge_lite.capture import base\nimport pydantic\n")
    assert len(problems_in(bad)) == 2


def test_plugins_import_nothing_of_ours() -> None:
    for path in (PACKAGE / "serving" / "plugins").rglob("*.py"):
        names = imported(ast.parse(path.read_text()))
        assert not [n for n in names if n.split(".")[0] == "specforge_lite"], path


def test_trainer_never_imports_an_engine() -> None:
    code = "import sys, specforge_lite.serving.registry; print([m for m in ('vllm', 'sglang') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_drafts_run_with_torch_alone() -> None:
    """What the benchmark of a GPU machine needs, with every third-party package but torch and numpy made absent."""
    code = """
import sys
for name in ('pydantic', 'datasets', 'tqdm', 'rich', 'transformers', 'safetensors', 'yaml'):
    sys.modules[name] = None  # importing it raises ImportError
import benchmarks.bench_training as bench
step = bench.make_step(bench.Variant.parse('fp32-75'), bench.SHAPES['test'], 'cpu')
print(step() > step())
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert output.returncode == 0, output.stderr
    assert output.stdout.strip() == "True"
