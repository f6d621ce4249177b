"""Will everything work with this target? Each check answers one question of docs/new-target.md on the model itself.

Cheap checks come first (config, weights, tokenizer), then those that run the model. A check whose ground is missing is
skipped, and reported as that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from specforge_lite.checkpoints.contract import Finding
from specforge_lite.core.errors import SpecforgeError
from specforge_lite.doctor.engines import check_engine
from specforge_lite.doctor.files import (
    Examination,
    Problem,
    VerifyOptions,
    check_aux_layers,
    check_config,
    check_draft_shape,
    check_head,
    check_mask,
    check_prompt,
    check_template,
    check_tokenizer,
    check_weights,
)
from specforge_lite.doctor.model import (
    check_decoding,
    check_final_norm,
    check_load,
    check_logits,
    check_states,
    check_training,
)


def verify_target(options: VerifyOptions) -> list[Finding]:
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


# name -> (check, names of the checks whose results it needs)
CHECKS: dict[str, tuple[Callable[[Examination], Iterator[Problem]], tuple[str, ...]]] = {
    "config": (check_config, ()),
    "weights": (check_weights, ("config",)),
    "embedding and head": (check_head, ("weights",)),
    "aux layers": (check_aux_layers, ("config",)),
    "draft": (check_draft_shape, ("aux layers",)),
    "tokenizer": (check_tokenizer, ("config",)),
    "chat template": (check_template, ("tokenizer",)),
    "prompt": (check_prompt, ("chat template",)),
    "loss mask": (check_mask, ("chat template",)),
    "model": (check_load, ("weights",)),
    "hidden states": (check_states, ("model", "aux layers")),
    "teacher logits": (check_logits, ("hidden states", "embedding and head")),
    "final norm": (check_final_norm, ("hidden states", "embedding and head")),
    "training": (check_training, ("hidden states", "embedding and head", "draft")),
    "decoding": (check_decoding, ("model", "training")),
    "engines": (check_engines, ("config",)),
}
