"""Chat in the terminal: `specforge-lite chat`."""

from specforge_lite.cli.chat import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
