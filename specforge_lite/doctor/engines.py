"""Asks an installed serving engine, in its own environment, whether it knows a model architecture and serves EAGLE-3
for it. The engine's registry is imported, no model is loaded; that alone takes about 20 seconds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

from specforge_lite.core.errors import ConfigError
from specforge_lite.serving.environment import SERVING_ENGINES, Interpreter, check_plugin, find_interpreter, has_gpu

Problem = tuple[str, str]  # (level, message)

QUERY_TIMEOUT_SECONDS = 300.0


def check_engine(engine: str, architecture: str, python: str | None = None) -> Iterator[Problem]:
    """Findings about `sglang` or `vllm` for a model architecture such as `LlamaForCausalLM`."""
    try:
        interpreter = find_interpreter(engine, python)
        check_plugin(interpreter)
    except ConfigError as error:
        yield "warning", f"{error}; capture with --target-backend hf works without it"
        return
    answer, problem = ask_engine(interpreter, architecture)
    name = f"{engine} {interpreter.version}"
    if answer is None:
        yield "warning", f"{name} could not be asked: {problem}"
    elif not answer["known"]:
        yield "warning", f"{name} does not serve {architecture}; use another engine, or --target-backend hf"
    elif not answer["eagle3"]:
        yield (
            "warning",
            f"{name} serves {architecture}, but hands out no aux hidden states for it: no EAGLE-3 capture or serving",
        )
    else:
        yield "ok", f"{name} serves {architecture}, with EAGLE-3"


def ask_engine(interpreter: Interpreter, architecture: str) -> tuple[dict[str, bool] | None, str]:
    """({"known", "eagle3"}, "") or (None, why it gave no answer)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not has_gpu(None):
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
    command = [interpreter.python, "-c", SERVING_ENGINES[interpreter.engine].registry_query, architecture]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_SECONDS, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    if done.returncode or not isinstance(answer, dict):
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return None, f"exit code {done.returncode}: {' '.join(last)}"
    return answer, ""
