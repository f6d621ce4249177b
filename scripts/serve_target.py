"""Run a target as a capture server: `specforge-lite serve`."""

from specforge_lite.cli.target import serve as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
