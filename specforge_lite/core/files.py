"""Files and directories that are complete under their final name or absent, whatever moment the process dies at; and
the locks and hashes that go with them.

    .NAME.tmp-PID-HEX      being written      .NAME.old-PID, .NAME.deleted-PID    being deleted

What a killed process leaves under these names is deleted by the next one that writes NAME (`remove_leftovers`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from specforge_lite.core import log
from specforge_lite.core.errors import ConfigError, DataError, SpecforgeError, first_line

if TYPE_CHECKING:
    from torch import Tensor

LOCK_FILE = ".lock"
# `save_tensors` wants this much room besides the tensors: for the header, and the small files beside it.
SPARE_BYTES = 1 << 20
FINGERPRINT_BYTES = 1 << 20


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


# --------------------------------------------------------------------------------------------------------------- write


@contextmanager
def _replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """A name beside `path`, to be written to, that replaces it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = _temporary(path)
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            sync_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path, mode: str = "w", sync: bool = True) -> Iterator[IO]:
    """A file that appears under `path` when the block ends without an error; nothing is left of it otherwise.

    sync: force it to the disk first (False: for files that a crash of the machine may lose).
    """
    with (
        _replacing(path, sync) as temporary,
        open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file,
    ):
        try_lock(file.fileno())  # tells `remove_leftovers`, on another host too, that the writer lives
        yield file


def write_atomically(path: Path, data: bytes | str, sync: bool = True) -> None:
    """Write a whole file (text as UTF-8), making its directory. Raises OSError."""
    with atomic_file(path, "w" if isinstance(data, str) else "wb", sync) as file:
        file.write(data)


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Write `value` as indented JSON, atomically. Raises OSError."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", sync)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, atomically. Raises OSError, for a full disk as well."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _replacing(path) as temporary:
        needed, free = tensor_bytes(tensors) + SPARE_BYTES, shutil.disk_usage(path.parent).free
        if free < needed:  # the writer of safetensors hides errno, so look first
            text = f"needs {log.format_bytes(needed)}, {log.format_bytes(free)} are free"
            raise OSError(errno.ENOSPC, f"{path.name} {text}")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # carries the operating system's message as text
            raise OSError(errno.EIO, f"{path.name}: {first_line(error)}") from None
        temporary.chmod(0o644)  # safetensors makes it private to its owner; a server may run as another user


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


@contextmanager
def atomic_directory(path: Path, held: bool = False) -> Iterator[Path]:
    """A directory that appears under `path`, in place of an older one, when the block ends without an error.

    held: the caller holds a lock under which nobody else writes `path`; see `remove_leftovers`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name, held)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            sync_to_disk(inside)
        sync_to_disk(temporary)
        replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(source: Path, destination: Path) -> None:
    """Move `source` to `destination` in one step, whatever was there; an older directory is deleted afterwards.

    Where the file system cannot exchange two names, the older one is set aside first.
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
    sync_to_disk(destination.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory; renamed first, so that an interrupted deletion leaves nothing that looks whole."""
    doomed = path.with_name(f".{path.name}.deleted-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically with renameat2(2); False where kernel, libc or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", lambda *_: -1)
    at_fdcwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


def sync_to_disk(path: Path) -> None:
    """Force a file's or a directory's content to the disk; for a directory: the renames inside it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ----------------------------------------------------------------------------------------------------------- leftovers


def remove_leftovers(directory: Path, name: str | None = None, held: bool = False) -> None:
    """Delete what killed processes left of `name`, or of everything, in `directory`.

    Nothing is touched whose process lives here, or that anybody (on another host, perhaps) holds a lock on. held: the
    caller holds a lock under which nobody else writes here, so whatever is left is dead; process numbers come again.
    """
    pattern = re.compile(rf"\.{re.escape(name) if name else '.+'}\.(?:tmp|old|deleted)-(\d+)(?:-[0-9a-f]+)?")
    for left in directory.iterdir() if directory.is_dir() else ():
        match = pattern.fullmatch(left.name)
        if match is None or (not held and (psutil.pid_exists(int(match[1])) or _is_locked(left))):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------------------------------------- locks


def try_lock(handle: int, shared: bool = False) -> bool:
    """Take the lock of an open file if nobody else has it (shared: if nobody has it alone). The kernel frees it when
    the file's last descriptor is closed or we die."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file of `path`; wait, and log it, while another process has it."""
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        if not try_lock(file.fileno()):
            log.info(f"waiting for another process that builds {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_directory(directory: Path, flag: str) -> IO[str]:
    """Make the directory, and hold its lock as long as the result is open. The lock file stays: deleting it would let
    two processes lock two different files.

    Raises ConfigError when another process holds it, or when the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stream = open(directory / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115  (the caller closes it)
    except OSError as error:
        raise ConfigError(f"{flag} {directory}: {error.strerror or error}") from None
    if not try_lock(stream.fileno()):
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise ConfigError(f"{flag} {directory}: in use by {holder}; choose another --{flag.replace('_', '-')}")
    stream.truncate(0)
    stream.write(f"process {os.getpid()} since {datetime.now(UTC).isoformat(timespec='seconds')}")
    stream.flush()
    return stream


# ---------------------------------------------------------------------------------------------------------------- read


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def read_json(path: Path, error_class: type[SpecforgeError] = DataError) -> dict[str, Any]:
    """A JSON object; raises `error_class` naming the place of a mistake."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_class(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise error_class(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise error_class(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# -------------------------------------------------------------------------------------------------------------- hashes


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content. Raises OSError."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def key_digest(key: dict[str, Any]) -> str:
    """sha256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8")).hexdigest()


def quick_fingerprint(path: Path) -> str:
    """Size and a hash of the first and the last MiB: tells files apart without reading 100 GB. Raises OSError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return f"{size}-{digest.hexdigest()[:32]}"
