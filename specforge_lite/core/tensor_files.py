"""Writing files that are either complete or absent, whatever moment the process dies at."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

HASH_CHUNK_BYTES = 8 << 20
# Room asked for besides the tensors of a file: its header, and the small files beside it.
SPARE_BYTES = 1 << 20


def sync_file(path: Path) -> None:
    """Force a file's or a directory's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes, sync: bool = True) -> None:
    """Write under a temporary name in the same directory, then rename."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        sync_file(path.parent)


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), sync)


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write and fsync a safetensors file. Raises OSError, for a full disk as well."""
    needed, free = tensor_bytes(tensors) + SPARE_BYTES, shutil.disk_usage(path.parent).free
    if free < needed:  # the writer of safetensors hides errno, so look first
        raise OSError(errno.ENOSPC, f"{path.name} needs {format_bytes(needed)}, {format_bytes(free)} are free")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # carries the operating system's message as text
        raise OSError(errno.EIO, f"{path.name}: {error}") from error
    path.chmod(0o644)  # safetensors makes it private to its owner
    sync_file(path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def format_bytes(count: float) -> str:
    """Bytes as a person says them: `812M`, `1.9G`."""
    for unit in ("B", "K", "M", "G", "T"):
        if abs(count) < 1024 or unit == "T":
            return f"{count:.0f}{unit}" if unit in "BKM" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    raise AssertionError
