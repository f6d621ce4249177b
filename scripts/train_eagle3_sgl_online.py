"""Train an EAGLE-3 draft with an SGLang target, under the name of SpecForge's script: `specforge-lite train`."""

from specforge_lite.cli.train import main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
