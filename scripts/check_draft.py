"""Check a draft directory against what the engines load: `specforge-lite check`."""

from specforge_lite.cli.draft import check as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
