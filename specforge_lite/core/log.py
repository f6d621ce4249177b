"""What a person sees: log lines, progress bars with rate and remaining time, and the end of a script."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from specforge_lite.core.errors import SpecforgeError

USER_ERROR_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 128 + signal.SIGINT
SECONDS_PER_LINE = 10.0  # of progress where there is no terminal


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


def _write(message: str, stream: Any, sinks_too: bool = True) -> None:
    for sink in sinks if sinks_too else ():
        sink("info" if stream is sys.stdout else "warning", message)
    try:
        from tqdm import tqdm
    except ImportError:  # torch-only machines run the benchmarks without tqdm
        print(message, file=stream, flush=True)
        return
    tqdm.write(message, file=stream)
    stream.flush()


def progress(total: int | None, description: str, unit: str = "it", **kwargs: Any) -> Any:
    """Return a progress bar (`.update(n)`, `.set_postfix_str`, context manager) with rate and remaining time.

    Off a terminal there is no bar: a line every ten seconds, and none for what is done before, so that a log stays
    readable.
    """
    kwargs.setdefault("disable", not is_main_rank())
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, mininterval=0.2, **kwargs)
    return ProgressLines(total, description, unit, kwargs.get("initial", 0), kwargs["disable"])


class ProgressLines:
    """What a bar would show, as plain lines: `regenerate: 120 of 1,000 (12%), 3.1 row/s, 4m left`."""

    def __init__(self, total: int | None, description: str, unit: str, initial: int = 0, disable: bool = False) -> None:
        self.total, self.n, self._initial, self._disable = total, initial, initial, disable
        self._description, self._unit, self._postfix = description, unit, ""
        self._start = self._shown = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.n += count
        if not self._disable and time.monotonic() - self._shown >= SECONDS_PER_LINE:
            self._shown = time.monotonic()
            _write(self.line(), sys.stderr, sinks_too=False)

    def line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.n - self._initial) / seconds
        if self._unit == "it" and not self.total:  # a wait, counted in turns of a loop
            parts = [format_seconds(seconds)]
        else:
            of_total = f" of {self.total:,} ({self.n / self.total:.0%})" if self.total else ""
            pace = f"{rate:,.3g}" if rate < 1000 else f"{rate:,.0f}"
            parts = [f"{self.n:,}{of_total}", f"{pace} {self._unit}/s"]
        if self.total and rate > 0:
            parts.append(f"{format_seconds(max(self.total - self.n, 0) / rate)} left")
        return f"{self._description}: {', '.join([*parts, *filter(None, [self._postfix])])}"

    def set_postfix_str(self, text: str = "", refresh: bool = True) -> None:
        self._postfix = text

    def close(self) -> None:
        """Nothing is left on a terminal that there is not."""

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    if not sys.stderr.isatty():  # read when the libraries are imported; a log file is no place for their bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        code = main()
    except SpecforgeError as error:
        from specforge_lite.core.launcher import print_last

        print_last(f"error: {error}")
        sys.exit(USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        print(f"interrupted after {format_seconds(time.monotonic() - start)}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPT_EXIT_CODE)
    except BrokenPipeError:  # `... | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:  # the top level: a bug of ours keeps its traceback
        from specforge_lite.core.launcher import print_last

        print_last(f"{type(error).__name__}: {error}", only_after_launcher=True)
        raise
    sys.exit(code or 0)
