"""Will everything work with this model as a target? `specforge-lite doctor target`."""

from specforge_lite.cli.doctor import target as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
