"""Check a draft directory against what SGLang and vLLM load: a table of findings, exit code 2 if one is broken.

    python scripts/check_draft.py DRAFT --target-model-path MODEL
    python scripts/check_draft.py DRAFT --target-model-path MODEL --checkpoint RUN/step_N --decode
    python scripts/check_draft.py DRAFT --target-model-path MODEL --live vllm

With --live the draft is served by the engine and held, position by position, against our own greedy decoder on the same
prompts (24 of MT-bench unless --prompts names a file): below 80% of ours is an error with its likely cause.
With --decode the run's own data are decoded with the real target: tokens per pass far below what the run estimated mean
that the draft was trained on other states than decoding gives it, such as layers in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from specforge_lite.core.hub import load_config
from specforge_lite.core.log import USER_ERROR_EXIT_CODE
from specforge_lite.core.sections import TARGET_FLAGS, DraftPathSection, EngineFlags, LocalTargetSection, TargetSection
from specforge_lite.core.settings import parse_config

if TYPE_CHECKING:
    from specforge_lite.checkpoints.contract import Finding

LIVE_STEPS, LIVE_LENGTH = 3, 1024  # drafted tokens of an EAGLE chain; positions that are served


class CheckConfig(DraftPathSection, LocalTargetSection, EngineFlags):
    """Check a draft directory against what SGLang and vLLM load: a table of findings, exit code 2 if one is broken."""

    target_model_path: str | None = Field(  # type: ignore[assignment]  # optional here only
        None,
        description="compare with this target: width, vocabulary, depth",
        json_schema_extra=TARGET_FLAGS,
    )
    num_draft_tokens: int | None = Field(None, ge=1, description="dspark, dflash: tokens a pass it is served with")
    checkpoint: Path | None = Field(None, description="compare aux layers with this training checkpoint step_N")
    decode: bool = Field(False, description="decode the run's data and compare with the acceptance it estimated")
    decode_samples: int = Field(16, ge=1, description="samples to decode")

    live: Literal["sglang", "vllm"] | None = Field(None, description="serve it with this engine, against our decoder")
    prompts: Path | None = Field(None, description="--live: jsonl of prompts (default: 24 of MT-bench)")
    num_prompts: int = Field(24, ge=1, description="--live: the first so many")
    max_new_tokens: int = Field(64, ge=8, description="--live: tokens of an answer")
    log_dir: Path | None = Field(None, description="--live: where the server's log goes")

    @model_validator(mode="after")
    def _decoding_needs_both(self) -> CheckConfig:
        if self.live and self.target_model_path is None:
            raise ValueError("target_model_path: required with --live")
        for name in ("target_model_path", "checkpoint"):
            if self.decode and getattr(self, name) is None:
                raise ValueError(f"{name}: required with --decode")
        return self


def main() -> int:
    config = parse_config(CheckConfig, description=__doc__ or "", positional="--draft-model-path")
    from specforge_lite.checkpoints.contract import Finding, check_draft
    from specforge_lite.checkpoints.draft_files import draft_config_of
    from specforge_lite.checkpoints.loading import read_draft_files
    from specforge_lite.doctor.acceptance import check_acceptance
    from specforge_lite.doctor.table import print_findings

    trained = draft_config_of(read_draft_files(config.checkpoint)).aux_layer_ids if config.checkpoint else None
    findings = check_draft(config.draft_model_path, _target_config(config), trained, config.num_draft_tokens)
    if config.decode and not any(finding.is_broken for finding in findings):
        assert config.checkpoint is not None
        shared = config.model_dump(include={"target_model_path", "trust_remote_code", "target_dtype"})
        problems = check_acceptance(
            config.draft_model_path, config.checkpoint, TargetSection(**shared), config.device, config.decode_samples
        )
        findings += [Finding("acceptance", level, message) for level, message in problems]
    if config.live and not any(finding.is_broken for finding in findings):
        findings.append(_serve(config))
    print_findings(str(config.draft_model_path), findings)
    if any(finding.is_broken for finding in findings):
        return USER_ERROR_EXIT_CODE
    print("nothing found that an engine would refuse or serve wrong")
    return 0


def _target_config(config: CheckConfig) -> Any:
    if config.target_model_path is None:
        return None
    return load_config(config.target_model_path, config.trust_remote_code)


def _serve(config: CheckConfig) -> Finding:
    from specforge_lite.benchmark.prompts import shipped_file
    from specforge_lite.checkpoints.draft_files import draft_config_of
    from specforge_lite.checkpoints.loading import read_draft_files
    from specforge_lite.data.prompts import encode_prompt_file
    from specforge_lite.evaluation.compare_serving import compare_serving
    from specforge_lite.serving.session import ServingOptions

    assert config.live is not None
    assert config.target_model_path is not None
    draft = draft_config_of(read_draft_files(config.draft_model_path), _target_config(config))
    steps = draft.block_size - (draft.algorithm == "dflash") if draft.block_size else LIVE_STEPS
    encoded = encode_prompt_file(
        config.prompts or shipped_file("mtbench.jsonl"),
        config.num_prompts,
        config.target_model_path,
        config.trust_remote_code,
        LIVE_LENGTH,
        config.max_new_tokens + 1,  # the server keeps a position back
    )
    options = ServingOptions(
        config.live,
        config.target_model_path,
        str(config.draft_model_path),
        num_steps=steps,
        num_draft_tokens=steps + 1,
        tp_size=config.tp_size,
        dtype=config.target_dtype,
        mem_frac=config.mem_frac,
        max_length=LIVE_LENGTH,
        engine_python=config.engine_python,
        engine_args=config.engine_arg,
        engine_devices=config.engine_devices,
        trust_remote_code=config.trust_remote_code,
        log_dir=config.log_dir,
    )
    return compare_serving(options, [token_ids for _, token_ids in encoded], config.max_new_tokens).finding()
