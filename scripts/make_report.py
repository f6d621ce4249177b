"""Write report.html of a run: `specforge-lite report`."""

from specforge_lite.cli.report import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
