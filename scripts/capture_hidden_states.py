"""Write hidden states to disk, for training without the target: `specforge-lite capture`."""

from specforge_lite.cli.target import capture as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
