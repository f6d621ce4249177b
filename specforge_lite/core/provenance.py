"""Where a result comes from: command line without secrets, versions, git state, machine, resolved config."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import specforge_lite

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "pydantic", "numpy", "sglang", "vllm")
REMOVED = "***"
# Flags and keys whose value is a secret, and values that look like one wherever they stand (Hugging Face, OpenAI,
# GitHub, Anthropic and wandb keys).
SECRET_NAME = re.compile(r"(^|[-_.])(key|token|secret|password|passwd|credentials?|auth|authorization)$", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|AKIA[A-Z0-9]{12,}|[0-9a-f]{40})\b"
)
URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")
BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")


def without_secrets(text: str) -> str:
    """Replace everything in `text` that looks like a key, a token or a password in a URL."""
    return BEARER.sub(REMOVED, URL_PASSWORD.sub(f"{REMOVED}@", SECRET_VALUE.sub(REMOVED, text)))


def redact_argv(argv: list[str]) -> list[str]:
    """A command line whose secrets are replaced: values of secret-named flags, `name=value` words, and lookalikes."""
    words: list[str] = []
    hide_next = False
    for word in argv:
        name, equals, value = word.partition("=")
        is_flag = word.startswith("-")
        if hide_next and not is_flag:
            words.append(REMOVED)
        elif equals and value and SECRET_NAME.search(name):
            words.append(f"{name}={REMOVED}")
        else:
            words.append(without_secrets(word))
        hide_next = is_flag and not equals and bool(SECRET_NAME.search(name))
    return words


def redact(value: Any) -> Any:
    """The same for a nested config: dict values under secret names, and strings anywhere."""
    if isinstance(value, dict):
        return {
            key: REMOVED if item is not None and SECRET_NAME.search(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    if isinstance(value, str):
        name, equals, _ = value.partition("=")  # engine_arg entries: key=value
        return f"{name}={REMOVED}" if equals and SECRET_NAME.search(name) else without_secrets(value)
    return value


def collect_provenance(config: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON-ready facts about this process: what was run, with what, on what. Never a secret, never a host name."""
    return {
        "command": redact_argv([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": wall_time(),
        "specforge_lite": specforge_lite.__version__,
        "git": git_state(Path(specforge_lite.__file__).parent),
        "python": platform.python_version(),
        "packages": package_versions(),
        "machine": machine(),
        "config": redact(config) if config is not None else None,
    }


def wall_time() -> str:
    """Date and time for people, in UTC: `2026-11-27T18:05:00+00:00`. Never used to measure anything."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter and are installed."""
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def git_state(directory: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that holds `directory`; None outside one or without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(directory), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Processor kind, cores, accelerators and the torchrun world."""
    facts: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    torch = sys.modules.get("torch")  # never imported only to say that there is no GPU
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts
