"""The wheel: what is in it, and that it trains in an environment that has never seen the repository."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import specforge_lite
from tests.script_runner import ROOT, load_script

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git knows, so that nothing left over in the checkout gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        if name.startswith(("specforge_lite/", "pyproject.toml", "README.md", "LICENSE")) and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (path,) = out.glob("*.whl")
    return path


def test_everything_that_git_knows_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", "specforge_lite"], cwd=ROOT, capture_output=True, text=True).stdout
    ours = {name for name in listed.splitlines() if (ROOT / name).exists()}
    assert ours - inside == set()
    assert "specforge_lite/serving/plugins/specforge_capture/sglang_plugin.py" in inside
    assert "specforge_lite/py.typed" in inside
    assert any(name.endswith("LICENSE") for name in inside)
    assert not any(name.startswith(("tests/", "benchmarks/", "scripts/")) for name in inside)


def test_the_wheel_trains_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """Libraries come from this environment (a path file, read after the fresh environment's own packages)."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    words = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(packages), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def run(*words: str) -> str:
        command = [str(home / "bin" / "python"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = run("-c", "import specforge_lite; print(specforge_lite.__file__)")
    assert where.startswith(str(packages))
    assert specforge_lite.__version__ in run("-m", "specforge_lite", "--version")
    target = str(packages / "specforge_lite" / "assets" / "tiny_target")
    command = [str(packages / "bin" / "specforge-lite")]  # pip --target puts console commands there
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4, as 2 and 2 make 4."}]
    (tmp_path / "rows.jsonl").write_text(3 * (json.dumps({"conversations": turns}) + "\n"))
    run(
        *command, "train", "--target-model-path", target, "--target-backend", "hf", "--train-data-path", "rows.jsonl",
        "--output-dir", "run", "--total-steps", "5", "--max-length", "128", "--ttt-length", "2",
    )  # fmt: skip
    assert (tmp_path / "run" / "step_5" / "draft.safetensors").exists()
    run(*command, "export", "run", "--output-dir", "draft")
    assert (tmp_path / "draft" / "model.safetensors").exists()


def test_pins_lie_in_the_ranges_and_nothing_is_missing() -> None:
    pinned = {r.name.lower(): r for r in load_script("lock_requirements").requirements(ROOT / "requirements-dev.txt")}
    extras = PYPROJECT["project"]["optional-dependencies"]
    ranges = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
    optional = [Requirement(text) for name, texts in extras.items() if name != "adam-8bit" for text in texts]
    assert {r.name.lower() for r in ranges + optional} == set(pinned)
    for requirement in ranges + optional:
        (pin,) = pinned[requirement.name.lower()].specifier
        assert requirement.specifier.contains(pin.version), requirement
    assert {"wandb", "report", "dev"} <= set(extras)


def test_the_version_has_one_home() -> None:
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "specforge_lite.__version__"}
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert specforge_lite.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_calls_the_same_script_as_everybody() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["ci"]["steps"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    ruff = next(r for r in hooks if "ruff" in r["repo"])["rev"]
    assert f"ruff=={ruff.removeprefix('v')}" in (ROOT / "requirements-dev.txt").read_text()
