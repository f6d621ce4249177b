"""Fill holes in code with and without the draft: `specforge-lite evaluate completions`."""

from specforge_lite.cli.evaluate import completions as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
