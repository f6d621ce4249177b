"""What this machine can run: one table of libraries, GPU, engines, memory, tmpfs, compilers. Exit code 2 if nothing."""

from __future__ import annotations

from specforge_lite.core.log import USER_ERROR_EXIT_CODE, info
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.doctor.settings import VerifyConfig

TARGET_HELP = """\
Will everything work with this model as a target? One table: layers, template, mask, head, decoding, engines.

    python scripts/verify_target.py MODEL

Exit code 2 and one `broken:` line for each thing that does not work. docs/new-target.md says what to do about it.
"""


class InstallationConfig(Section):
    """What this machine can run: libraries, GPU, engines, memory, tmpfs, compilers."""


def main() -> int:
    parse_config(InstallationConfig)
    from specforge_lite.doctor.installation import verify_installation
    from specforge_lite.report.tables import print_findings

    return USER_ERROR_EXIT_CODE if print_findings("this machine", verify_installation()) else 0


def target() -> int:
    config = parse_config(VerifyConfig, description=TARGET_HELP, positional="--target-model-path")
    from specforge_lite.doctor.target import verdict, verify_target
    from specforge_lite.report.tables import print_findings

    findings = verify_target(config)
    if print_findings(config.target_model_path, findings):
        return USER_ERROR_EXIT_CODE
    info(verdict(findings, config.target_model_path))
    return 0
