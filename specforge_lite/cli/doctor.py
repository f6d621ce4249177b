"""What this machine can run: one table of libraries, GPU, engines, memory, tmpfs, compilers. Exit code 2 if nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from specforge_lite.core.log import USER_ERROR_EXIT_CODE, info
from specforge_lite.core.sections import LocalTargetSection
from specforge_lite.core.settings import Section, parse_config

TARGET_HELP = """\
Will everything work with this model as a target? One table: layers, template, mask, head, decoding, engines.

    python scripts/verify_target.py MODEL

Exit code 2 and one `broken:` line for each thing that does not work. docs/new-target.md says what to do about it.
"""


class InstallationConfig(Section):
    """What this machine can run: libraries, GPU, engines, memory, tmpfs, compilers."""


class VerifyConfig(LocalTargetSection):
    """Check a model as a target: layers, template, mask, head, decoding, engines."""

    chat_template: str = Field("auto", description="auto, or a name from specforge_lite.data.templates")
    aux_layer_ids: tuple[int, ...] | None = Field(None, description="0-based layers whose OUTPUT feeds the draft")
    load_model: bool = Field(True, description="run the model; --no-load-model checks its files only")
    engines: tuple[Literal["sglang", "vllm"], ...] = Field(
        ("sglang", "vllm"), description="ask these engines, where installed; 20 seconds each"
    )


def main() -> int:
    parse_config(InstallationConfig)
    from specforge_lite.doctor.installation import verify_installation
    from specforge_lite.doctor.table import print_findings

    findings = verify_installation()
    print_findings("this machine", findings)
    return USER_ERROR_EXIT_CODE if any(finding.is_broken for finding in findings) else 0


def target() -> int:
    config = parse_config(VerifyConfig, description=TARGET_HELP, positional="--target-model-path")
    from specforge_lite.doctor.files import VerifyOptions
    from specforge_lite.doctor.table import print_findings
    from specforge_lite.doctor.target import verdict, verify_target

    findings = verify_target(
        VerifyOptions(
            target_model_path=config.target_model_path,
            trust_remote_code=config.trust_remote_code,
            chat_template=config.chat_template,
            aux_layer_ids=config.aux_layer_ids,
            dtype=config.target_dtype,
            device=config.device,
            load_model=config.load_model,
            engines=config.engines,
        )
    )
    print_findings(config.target_model_path, findings)
    if any(finding.is_broken for finding in findings):
        return USER_ERROR_EXIT_CODE
    info(verdict(findings, config.target_model_path))
    return 0
