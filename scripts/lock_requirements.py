"""Write requirements.lock and docs/licences.md from what is installed: every package that requirements-dev.txt brings
along, with its exact version and its licence.

    python scripts/lock_requirements.py      after a change of requirements*.txt, in an environment installed from them

`make` installs with `-c requirements.lock`, so that a later day installs the same. Versions carry no local suffix
(`torch==2.13.0`, not `+cpu`): which build of torch is taken is decided by the machine. What a CUDA build of torch needs
beyond that (nvidia-*, cuda-*, triton) is pinned by torch itself.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import Field

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import atomic_file
from specforge_lite.core.log import info, run_script
from specforge_lite.core.settings import Section, parse_config

ROOT = Path(__file__).resolve().parent.parent
LOCK, LICENCES = ROOT / "requirements.lock", ROOT / "docs" / "licences.md"
LOCK_HEADER = "# Everything that requirements-dev.txt installs, exactly; written by scripts/lock_requirements.py.\n"
LICENCES_HEADER = """# Licences of what is installed

Written by `python scripts/lock_requirements.py` from the packages' own metadata, for `requirements-dev.txt` and all
that it brings along. Serving engines have environments of their own (`engine_envs/`) and are not listed; torchao
(BSD 3-Clause, for `--optim adamw_8bit`) lies apart from the others.

| package | version | licence | needed |
|---|---|---|---|
"""
# What the licence file of a package says whose metadata name no licence.
KNOWN: dict[str, str] = {}
MAX_LICENCE_CHARS = 60


class LockConfig(Section):
    """Write requirements.lock and docs/licences.md from what is installed."""

    check: bool = Field(False, description="write nothing; exit code 2 if the files differ from what is installed")


def main() -> None:
    config = parse_config(LockConfig, description=__doc__ or "")
    run_names, all_names = closure(ROOT / "requirements.txt"), closure(ROOT / "requirements-dev.txt")
    for path, content in ((LOCK, lock_text(all_names)), (LICENCES, licences_text(all_names, run_names))):
        if not config.check:
            with atomic_file(path) as file:
                file.write(content)
            info(f"{path.relative_to(ROOT)}: {len(all_names)} packages")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            raise ConfigError(f"{path}: differs from what is installed; run scripts/lock_requirements.py")


def requirements(path: Path) -> Iterator[Requirement]:
    """Lines of a requirements file, `-r` followed."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.split(" #")[0].strip()
        if text.startswith("-r "):
            yield from requirements(path.with_name(text[3:].strip()))
        elif text and not text.startswith("#"):
            yield Requirement(text)


def closure(path: Path) -> set[str]:
    """Canonical names of all packages that a requirements file installs on this machine."""
    names: set[str] = set()
    todo = [(requirement, "") for requirement in requirements(path)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or name == "triton" or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add(key)
        names.add(name)
        needs = distribution(name, str(path)).requires or []
        todo += [(Requirement(need), extra) for need in needs for extra in ("", *requirement.extras)]
    return names


def distribution(name: str, wanted_by: str) -> importlib.metadata.Distribution:
    """What is installed under a name. Raises ConfigError."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{wanted_by}: {name} is not installed; run make test once") from None


def version_of(name: str) -> str:
    """Installed version, without a local suffix such as +cpu."""
    return distribution(name, name).version.split("+")[0]


def lock_text(names: set[str]) -> str:
    return LOCK_HEADER + "".join(f"{name}=={version_of(name)}\n" for name in sorted(names))


def licences_text(names: set[str], run_names: set[str]) -> str:
    rows = (
        f"| {name} | {version_of(name)} | {licence_of(name)} | {'to run' if name in run_names else 'to develop'} |\n"
        for name in sorted(names)
    )
    return LICENCES_HEADER + "".join(rows)


def licence_of(name: str) -> str:
    """The licence as the package names it: SPDX expression, short licence field, or trove classifiers."""
    metadata = distribution(name, name).metadata
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [c.rsplit(" :: ", 1)[1] for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    named = [c for c in classifiers if c != "OSI Approved"]
    if named:
        return ", ".join(named)
    text = re.sub(r"\s+", " ", metadata.get("License") or "").strip()
    if name in KNOWN:
        return KNOWN[name]
    if not text or len(text) > MAX_LICENCE_CHARS:
        raise ConfigError(f"{name}: names no licence in its metadata; add it to KNOWN in scripts/lock_requirements.py")
    return text


if __name__ == "__main__":
    run_script(main)
