"""Speed-up of a draft on benchmark prompts, from the repository root: `specforge-lite bench`."""

from specforge_lite.cli.bench import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
