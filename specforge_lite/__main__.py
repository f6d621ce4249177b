"""`python -m specforge_lite COMMAND`, for torchrun: `torchrun --nproc_per_node 8 -m specforge_lite train ...`."""

from specforge_lite.cli.commands import main

if __name__ == "__main__":
    main()
