"""Turn a data set into the normal form: `specforge-lite prepare`."""

from specforge_lite.cli.data import prepare as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
