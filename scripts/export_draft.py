"""Write a checkpoint's draft as SGLang and vLLM load it: `specforge-lite export`."""

from specforge_lite.cli.draft import export as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
