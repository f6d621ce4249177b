"""Serve drafts or checkpoints and choose the best for a workload: `specforge-lite bench drafts`."""

from specforge_lite.cli.bench import acceptance as main
from specforge_lite.core.log import run_script

if __name__ == "__main__":
    run_script(main)
