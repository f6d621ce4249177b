"""What a person sees: log lines, progress bars with rate and remaining time, and the end of a script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from specforge_lite.core.errors import SpecforgeError

USER_ERROR_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 128 + signal.SIGINT


def is_main_rank() -> bool:
    """True on the torchrun rank that talks to the user (rank 0, or a process started without torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def info(message: str) -> None:
    """Print one line on stdout, on the main rank only, above any live progress bar."""
    if is_main_rank():
        _write(message, sys.stdout)


def warn(message: str) -> None:
    """Print one `warning:` line on stderr, on every rank (a warning of rank 3 is as real as one of rank 0)."""
    rank = os.environ.get("RANK")
    _write(f"warning: {message}" if rank in (None, "0") else f"warning (rank {rank}): {message}", sys.stderr)


# Called with ("info" or "warning", message) for every line that is shown, e.g. by a run's log file.
sinks: list[Callable[[str, str], None]] = []


def _write(message: str, stream: Any) -> None:
    for sink in sinks:
        sink("info" if stream is sys.stdout else "warning", message)
    try:
        from tqdm import tqdm
    except ImportError:  # torch-only machines run the benchmarks without tqdm
        print(message, file=stream, flush=True)
        return
    tqdm.write(message, file=stream)
    stream.flush()


def progress(total: int | None, description: str, unit: str = "it", **kwargs: Any) -> Any:
    """Return a tqdm bar (`.update(n)`, `.set_postfix_str`, context manager) with rate and remaining time.

    Off a terminal it prints at most one line every ten seconds, so that a CI log stays readable.
    """
    from tqdm import tqdm

    interactive = sys.stderr.isatty()
    defaults: dict[str, Any] = {
        "total": total,
        "desc": description,
        "unit": unit,
        "dynamic_ncols": interactive,
        "mininterval": 0.2 if interactive else 10.0,
        "maxinterval": 10.0 if interactive else 60.0,
        "disable": not is_main_rank(),
    }
    return tqdm(**{**defaults, **kwargs})


def format_seconds(seconds: float) -> str:
    """Seconds as a person says them: `8s`, `12m`, `3h05m`."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


def format_bytes(count: float) -> str:
    """Bytes as a person says them: `812M`, `1.9G`."""
    for unit in ("B", "K", "M", "G", "T"):
        if abs(count) < 1024 or unit == "T":
            return f"{count:.0f}{unit}" if unit in "BKM" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    raise AssertionError


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main`; one clear line and exit code 2 for a user's error, 130 for Ctrl-C, traceback otherwise."""
    start = time.monotonic()
    try:
        code = main()
    except SpecforgeError as error:
        print_last(f"error: {error}")
        sys.exit(USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        print(f"interrupted after {format_seconds(time.monotonic() - start)}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPT_EXIT_CODE)
    except Exception as error:  # the top level: a bug of ours keeps its traceback
        print_last(f"{type(error).__name__}: {error}", only_after_launcher=True)
        raise
    sys.exit(code or 0)


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
