"""Peak memory, speed and disk before a run: `specforge-lite plan`."""

from specforge_lite.cli.plan import memory as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
