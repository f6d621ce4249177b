"""Files and directories that are either complete under their final name or not there at all."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from specforge_lite.core import log
from specforge_lite.core.errors import DataError


@contextmanager
def user_errors(path: Path) -> Iterator[None]:
    """Turn an OSError (no space, read-only, no permission) into a DataError with the path."""
    try:
        yield
    except shutil.Error as error:  # of copytree: a list of (source, destination, reason)
        _, destination, reason = error.args[0][0]
        raise DataError(f"{destination}: {reason}") from None
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from None


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file that appears under `path` when the block ends without an error; nothing is left of it otherwise.

    What a killed process left of an earlier attempt is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says to `remove_leftovers` that we live
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory that appears under `path`, in place of an older one, when the block ends without an error.

    The caller holds the lock of `path`; what crashed predecessors left is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        sync_directory(temporary)
        replace_directory(temporary, path)
    finally:
        for left in path.parent.glob(f".{path.name}.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Delete what processes that were killed left beside `path`: `.NAME.tmp-PID...`, `.NAME.partial-PID`.

    Nothing is touched whose process lives here, or that anybody (on another host, perhaps) holds a lock on.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(?:tmp|partial|old)-(\d+)(?:-[0-9a-f]+)?")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        match = pattern.fullmatch(left.name)
        if match is None or _is_alive(int(match[1])) or _is_locked(left):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours to ask
        return True
    return True


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def replace_directory(source: Path, destination: Path) -> None:
    """Move `source` to `destination` in one step, whatever was there; an older directory is deleted afterwards.

    Where the file system cannot exchange two names, the older one is set aside first: a process that is killed just
    then leaves it as `.NAME.old-PID`.
    """
    if not destination.exists():
        os.replace(source, destination)
    elif _exchange(source, destination):
        shutil.rmtree(source)
    else:
        aside = destination.with_name(f".{destination.name}.old-{os.getpid()}")
        os.replace(destination, aside)
        os.replace(source, destination)
        shutil.rmtree(aside)
    sync_directory(destination.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically with renameat2(2); False where kernel, libc or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    return renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file of `path`; says so when another process has it. The kernel frees it when a holder dies."""
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(f"waiting for another process that builds {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
