"""Which engines are installed where, in which version, and what they answer about a model architecture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from specforge_lite.capture.remote import PLUGIN_VERSION
from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.files import write_json
from specforge_lite.core.http import HttpFailure, HttpStatus, fetch
from specforge_lite.core.log import info, warn
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.engine import Engine
from specforge_lite.serving.sglang import Sglang
from specforge_lite.serving.vllm import Vllm

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PLUGIN_DIR = Path(__file__).resolve().parent / "plugins"
REGISTRY_SECONDS = 300.0
_PLUGIN_DISTRIBUTION = "specforge-capture"
# In the order in which `auto` chooses.
SERVING_ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Sglang(), Vllm())}

_VERSIONS_QUERY = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
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


def first_installed_engine() -> str | None:
    """What `auto` chooses among the serving engines; None where none is installed."""
    return next((name for name in SERVING_ENGINES if installed_engine_python(name) is not None), None)


def _read_versions(python: str) -> dict[str, str]:
    """Versions of the engines, under our names, and of the plugin, as that interpreter sees them."""
    resolved = shutil.which(python)
    if resolved is None:
        raise ConfigError(f"engine_python {python}: no such interpreter")
    names = {name: engine.name for engine in SERVING_ENGINES.values() for name in engine.distributions}
    command = [resolved, "-c", _VERSIONS_QUERY, *names, _PLUGIN_DISTRIBUTION]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        raise ConfigError(f"engine_python {python}: not a working python ({error})") from None
    return {names.get(name, name): version for name, version in found.items()}


def engine_of_interpreter(python: str) -> str:
    """The engine installed in an environment; raises ConfigError if there is none."""
    versions = _read_versions(python)
    for name in SERVING_ENGINES:
        if name in versions:
            return name
    raise ConfigError(f"engine_python {python}: neither {' nor '.join(SERVING_ENGINES)} is installed there")


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
    versions = _read_versions(chosen)
    if engine not in versions:
        raise ConfigError(f"engine_python {chosen}: {engine} is not installed there")
    SERVING_ENGINES[engine].check_version(versions[engine])
    return Interpreter(chosen, engine, versions[engine], versions.get(_PLUGIN_DISTRIBUTION))


def check_plugin(interpreter: Interpreter) -> None:
    """Raise ConfigError unless the capture plugin is installed beside the engine, in this project's version."""
    install = f"run `{interpreter.python} -m pip install --no-deps {PLUGIN_DIR}`"
    found = interpreter.plugin_version
    if found is None:
        there = f"{interpreter.engine} {interpreter.version} is installed, the capture plugin is not"
        raise ConfigError(f"{interpreter.python}: {there}; {install}")
    if found != PLUGIN_VERSION:
        raise ConfigError(f"{interpreter.python}: capture plugin {found}, expected {PLUGIN_VERSION}; {install}")


def ask_registry(interpreter: Interpreter, architecture: str) -> tuple[dict[str, bool] | None, str]:
    """({"known", "eagle3"}, "") from the engine's registry of models, or (None, why it gave no answer).

    The engine is imported, no model is loaded; that takes about 20 seconds, so the answer is kept for this version.
    """
    name = f"{interpreter.engine} {interpreter.version}"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specforge_lite" / "architectures.json"
    try:
        known: dict[str, dict[str, bool]] = dict(json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    if found := known.get(f"{name} {architecture}"):
        return found, ""
    info(f"asking {name} whether it captures {architecture} (once per version)")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({} if has_gpu(None) else {"SGLANG_USE_CPU_ENGINE": "1"})
    command = [interpreter.python, "-c", SERVING_ENGINES[interpreter.engine].registry_query, architecture]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REGISTRY_SECONDS, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    try:
        answer = json.loads(done.stdout.strip().rpartition("\n")[2])
        found = {key: bool(answer[key]) for key in ("known", "eagle3")}
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return None, f"exit code {done.returncode}: {' '.join(last)}"
    try:
        write_json(kept, {**known, f"{name} {architecture}": found})
    except OSError as error:  # a home that cannot be written costs 20 seconds at the next start
        warn(f"{kept}: {error.strerror or error}; the engine will be asked again")
    return found, ""


def engine_of_url(url: str) -> str:
    """Ask a running server what it is. Raises EngineError if nothing answers or it is no engine we know."""
    for name, engine in SERVING_ENGINES.items():
        try:
            fetch(url.rstrip("/") + engine.identify_path)
        except HttpStatus:
            continue
        except HttpFailure as error:
            raise EngineError(f"target_url {url}: nothing answers ({error.detail})") from None
        return name
    raise EngineError(f"target_url {url}: the server is neither SGLang nor vLLM")


def choose_backend(target: TargetSection) -> str:
    """The backend that is named; for `auto` what answers at `--target-url`, else the first serving engine that is
    installed, else hf."""
    if target.target_backend != "auto":
        return target.target_backend
    if target.target_url:
        return engine_of_url(target.target_url[0])
    if target.engine_python is not None:
        return engine_of_interpreter(target.engine_python)
    return first_installed_engine() or "hf"


def has_gpu(engine_devices: str | None) -> bool:
    """True if a launched server should use CUDA: a device is there and `--engine-devices cpu` was not given."""
    if engine_devices == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/nvidia0")
