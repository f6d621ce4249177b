"""What this machine can run: `specforge-lite doctor`."""

from specforge_lite.cli.doctor import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
