"""Tokenize once and count the draft vocabulary: `specforge-lite cache`."""

from specforge_lite.cli.data import cache as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
