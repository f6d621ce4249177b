"""Choose the draft's shape for serving from a benchmark: `specforge-lite plan speculation`."""

from specforge_lite.cli.plan import speculation as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
