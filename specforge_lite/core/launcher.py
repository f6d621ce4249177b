"""What a run prints under torchrun, which closes every failed run with a traceback of its own."""

from __future__ import annotations

import os
import subprocess
import sys

# Waits for a process to end and prints a line; run by `print_last`.
_PRINT_AFTER = """
import os, select, sys
waiting = select.poll()
waiting.register(os.pidfd_open(int(sys.argv[1])), select.POLLIN)
waiting.poll(20_000)
print(sys.argv[2], file=sys.stderr)
"""


def print_last(line: str, only_after_launcher: bool = False) -> None:
    """Print an error line on stderr so that it is the last one a user sees.

    torchrun closes every failed run with a traceback of its own, 30 lines about none of our code. Under it the line is
    printed by a small process that waits for the launcher's end (20 s at most). only_after_launcher: print nothing
    without torchrun, where the line was shown before.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(os, "pidfd_open"):
        command = [sys.executable, "-S", "-E", "-c", _PRINT_AFTER, str(os.getppid()), line]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    elif not only_after_launcher:
        print(line, file=sys.stderr, flush=True)
