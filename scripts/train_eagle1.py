"""Train an EAGLE-1 draft: `specforge-lite train eagle1`."""

from specforge_lite.cli.train import eagle1 as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
