"""What this machine can run: one table of libraries, GPU, engines, memory, tmpfs, compilers. Exit code 2 if nothing."""

from __future__ import annotations

from specforge_lite.core.log import USER_ERROR_EXIT_CODE, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.doctor.installation import verify_installation
from specforge_lite.doctor.table import print_findings


class InstallationConfig(Section):
    """What this machine can run: libraries, GPU, engines, memory, tmpfs, compilers."""


def main() -> int:
    parse_config(InstallationConfig)
    findings = verify_installation()
    print_findings("this machine", findings)
    return USER_ERROR_EXIT_CODE if any(finding.is_broken for finding in findings) else 0


if __name__ == "__main__":
    run_script(main)
