"""Write training_curves.png of a run: `specforge-lite report curves`."""

from specforge_lite.cli.report import curves as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
