"""Decode prompts with and without the draft: `specforge-lite compare`."""

from specforge_lite.cli.compare import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
