"""Check a draft directory against what SGLang and vLLM load: a table of findings, exit code 2 if one is broken.

    python scripts/check_draft.py DRAFT --target-model-path MODEL
    python scripts/check_draft.py DRAFT --target-model-path MODEL --checkpoint RUN/step_N --decode

With --decode the run's own data are decoded with the real target: tokens per pass far below what the run estimated mean
that the draft was trained on other states than decoding gives it, such as layers in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from specforge_lite.core.hub import load_config
from specforge_lite.core.log import USER_ERROR_EXIT_CODE
from specforge_lite.core.sections import TARGET_FLAGS, DraftPathSection, LocalTargetSection, TargetSection
from specforge_lite.core.settings import parse_config


class CheckConfig(DraftPathSection, LocalTargetSection):
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

    @model_validator(mode="after")
    def _decoding_needs_both(self) -> CheckConfig:
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
    print_findings(str(config.draft_model_path), findings)
    if any(finding.is_broken for finding in findings):
        return USER_ERROR_EXIT_CODE
    print("nothing found that an engine would refuse or serve wrong")
    return 0


def _target_config(config: CheckConfig) -> Any:
    if config.target_model_path is None:
        return None
    return load_config(config.target_model_path, config.trust_remote_code)
