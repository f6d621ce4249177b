"""Tokenize once and count the draft vocabulary: `specforge-lite cache`."""

from specforge_lite.cli.cache import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
