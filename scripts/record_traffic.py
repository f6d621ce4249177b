"""Record the chats of a running server as training data: `specforge-lite record`."""

from specforge_lite.cli.record import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
