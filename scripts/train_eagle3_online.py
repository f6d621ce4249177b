"""Train an EAGLE-3 draft: `specforge-lite train`."""

from specforge_lite.cli.train import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
