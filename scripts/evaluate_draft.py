"""Accuracy, loss and acceptance of a draft: `specforge-lite evaluate`."""

from specforge_lite.cli.evaluate import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
