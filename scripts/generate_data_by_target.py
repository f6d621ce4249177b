"""Replace the answers of a data set by the target's own: `specforge-lite regenerate`."""

from specforge_lite.cli.data import regenerate as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
