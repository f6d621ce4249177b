"""Whether an installed serving engine knows a model architecture and captures the right states of it."""

from __future__ import annotations

from collections.abc import Iterator

from specforge_lite.core.errors import ConfigError
from specforge_lite.serving.environment import SERVING_ENGINES, ask_registry, check_plugin, find_interpreter
from specforge_lite.serving.families import support_of

Problem = tuple[str, str]  # (level, message)


def check_engine(engine: str, architecture: str, python: str | None = None) -> Iterator[Problem]:
    """Findings about `sglang` or `vllm` for a model architecture such as `LlamaForCausalLM`."""
    try:
        interpreter = find_interpreter(engine, python)
        check_plugin(interpreter)
    except ConfigError as error:
        yield "warning", f"{error}; capture with --target-backend hf works without it"
        return
    name = f"{engine} {interpreter.version}"
    support = support_of(SERVING_ENGINES[engine], architecture)
    if support is not None and support.status == "refused":
        yield "warning", f"{name}: no EAGLE-3 capture of {architecture}: {support.note}; use --target-backend hf"
        return
    answer, problem = ask_registry(interpreter, architecture)
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
        condition = f" ({support.note})" if support is not None and support.note else ""
        yield "ok", f"{name} serves {architecture}, with EAGLE-3{condition}"
