"""Will everything work with this target? Each check answers one question of docs/new-target.md on the model itself.

Cheap checks come first (config, weights, tokenizer), then those that run the model. A check whose ground is missing is
skipped, and reported as that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from specforge_lite.checkpoints.contract import Finding
from specforge_lite.core.errors import ConfigError, SpecforgeError
from specforge_lite.doctor import Problem, files, model
from specforge_lite.doctor.files import Examination
from specforge_lite.doctor.settings import VerifyConfig
from specforge_lite.serving.environment import SERVING_ENGINES, ask_registry, check_plugin, find_interpreter
from specforge_lite.serving.families import support_of


def verify_target(options: VerifyConfig) -> list[Finding]:
    """Run all checks; at least one finding each."""
    examination = Examination(options)
    findings: list[Finding] = []
    for name, (check, grounds) in CHECKS.items():
        missing = [ground for ground in grounds if ground in examination.broken]
        if missing:
            examination.broken.add(name)
            findings.append(Finding(name, "skipped", f"not checked, because of: {', '.join(missing)}"))
            continue
        for level, message in _answers(check, examination):
            findings.append(Finding(name, level, message))
            if level in ("broken", "skipped"):
                examination.broken.add(name)
    if "model" not in examination.broken:
        examination.engine.close()
    return findings


def verdict(findings: Sequence[Finding], target_model_path: str) -> str:
    """The last line for a target without a broken check: that it works, only if everything was checked."""
    train = f"python scripts/train_eagle3_online.py --target-model-path {target_model_path}"
    skipped = [finding.check for finding in findings if finding.level == "skipped"]
    if not skipped:
        return f"works; train with: {train} --train-data-path TRAIN.jsonl --output-dir OUTPUT"
    checked = dict.fromkeys(finding.check for finding in findings if finding.check not in skipped)
    return (
        f"checked and in order: {', '.join(checked)}; NOT checked: {', '.join(skipped)}:"
        " run again without --no-load-model"
    )


def _answers(check: Callable[[Examination], Iterator[Problem]], examination: Examination) -> Iterator[Problem]:
    try:
        yield from check(examination)
    except SpecforgeError as error:
        yield "broken", str(error)
    except Exception as error:  # untried modelling code may raise anything; here that is the finding
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        yield "broken", f"{type(error).__name__}: {first}"


def check_engines(x: Examination) -> Iterator[Problem]:
    architecture = (getattr(x.config, "architectures", None) or [""])[0]
    yield "ok", "hf (transformers in process)"
    for engine in x.options.engines:
        yield from check_engine(engine, architecture)


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


# name -> (check, names of the checks whose results it needs)
CHECKS: dict[str, tuple[Callable[[Examination], Iterator[Problem]], tuple[str, ...]]] = {
    "config": (files.check_config, ()),
    "weights": (files.check_weights, ("config",)),
    "embedding and head": (files.check_head, ("weights",)),
    "aux layers": (files.check_aux_layers, ("config",)),
    "draft": (files.check_draft_shape, ("aux layers",)),
    "tokenizer": (files.check_tokenizer, ("config",)),
    "chat template": (files.check_template, ("tokenizer",)),
    "prompt": (files.check_prompt, ("chat template",)),
    "loss mask": (files.check_mask, ("chat template",)),
    "model": (model.check_load, ("weights",)),
    "hidden states": (model.check_states, ("model", "aux layers")),
    "teacher logits": (model.check_logits, ("hidden states", "embedding and head")),
    "final norm": (model.check_final_norm, ("hidden states", "embedding and head")),
    "training": (model.check_training, ("hidden states", "embedding and head", "draft")),
    "decoding": (model.check_decoding, ("model", "training")),
    "engines": (check_engines, ("config",)),
}
