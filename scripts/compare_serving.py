"""Serve a draft in SGLang or vLLM and compare with our decoder: `specforge-lite compare serving`."""

from specforge_lite.cli.compare import serving as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
