"""Evaluate every checkpoint of a run: `specforge-lite evaluate checkpoints`."""

from specforge_lite.cli.evaluate import checkpoints as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
