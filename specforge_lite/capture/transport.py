"""How captured samples reach the trainer: files on tmpfs (one host) or objects in a Mooncake store (several).

The server's plugin stores a sample under a key of ours, `plugins/specforge_capture/blob.py` describes its bytes; here
it is waited for, checked and deleted. Nothing incomplete or damaged gets past `decode`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import mmap
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import xxhash

from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.files import try_lock
from specforge_lite.types import CapturedStates

FORMAT = "specforge-capture-2"
CHECKSUMS: dict[str, Callable[[Any], int]] = {"xxh3_64": xxhash.xxh3_64_intdigest, "crc32": zlib.crc32}
TAKE_SECONDS = 30.0
MOONCAKE_THREADS = 16
LATEST_SECONDS = 60.0  # an object later than this is left to the store's own eviction
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


class LostSample(Exception):
    """A sample did not arrive, or not as it was sent. It is asked for again; the user sees this only in the end."""


class NoSpace(LostSample):
    """The server found no room to store the sample."""


def decode(buffer: Any, key: str) -> CapturedStates:
    """Check a stored sample and view it as tensors that share `buffer`'s memory (writable, mmap or bytearray). It is
    named by its key, and its layers as the server names them.

    Raises LostSample where the size, the checksum or the key disagree.
    """
    raw = memoryview(buffer)
    if len(raw) < 8:
        raise LostSample(f"{len(raw)} bytes, expected a header")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > len(raw) - 8:
        raise LostSample(f"header of {length} bytes in {len(raw)}")
    try:
        header: dict[str, Any] = json.loads(bytes(raw[8 : 8 + length]))
        facts = header.pop("__metadata__")
        identity = facts["format"], facts["key"]
        end = max(entry["data_offsets"][1] for entry in header.values())
    except (ValueError, KeyError, TypeError) as error:
        raise LostSample(f"unreadable header ({type(error).__name__})") from None
    if identity != (FORMAT, key):
        raise LostSample(f"holds {identity}, expected {(FORMAT, key)}")
    data = raw[8 + length :]
    if len(data) != end:
        raise LostSample(f"{len(data)} bytes of data, expected {end}")
    if (found := CHECKSUMS[facts["checksum_kind"]](data)) != int(facts["checksum"], 16):
        raise LostSample(f"checksum {found:016x}, expected {facts['checksum']}")
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        flat = torch.frombuffer(buffer, dtype=torch.uint8, count=stop - start, offset=8 + length + start)
        tensors[name] = flat.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    layer_ids = tuple(int(i) for i in facts["layer_ids"].split(",") if i)
    normed = facts["last_is_normed"] == "1"
    return CapturedStates(key, tensors["input_ids"], tensors["aux"], tensors["last"], layer_ids, normed)


class TmpfsTransport:
    """Files in a directory on tmpfs; a file is mapped, never copied, and its name is deleted as soon as it is."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    async def take(self, key: str, timeout_s: float) -> CapturedStates:
        """Wait for the sample, check it, delete it. Raises LostSample."""
        path = os.path.join(self.directory, key)
        deadline, delay = time.monotonic() + timeout_s, 0.0005
        while True:
            try:
                mapped = _map_and_unlink(path)
                break
            except FileNotFoundError:
                self._raise_if_refused(key)
            if time.monotonic() > deadline:
                raise LostSample(f"{path} did not appear within {timeout_s:.0f}s")
            await asyncio.sleep(delay)
            delay = min(2 * delay, 0.05)
        return await asyncio.to_thread(decode, mapped, key) if len(mapped) > 1 << 22 else decode(mapped, key)

    def _raise_if_refused(self, key: str) -> None:
        """The plugin leaves an empty file `KEY.REASON` for a sample it could not store."""
        try:
            names = [name for name in os.listdir(self.directory) if name.startswith(f"{key}.")]
        except FileNotFoundError:
            raise LostSample(f"{self.directory} is not there; is the server on this host?") from None
        for name in names:
            reason = name.removeprefix(f"{key}.")
            os.unlink(os.path.join(self.directory, name))
            if reason == errno.errorcode[errno.ENOSPC]:
                raise NoSpace(f"no space left in {self.directory}")
            raise LostSample(f"the server could not store it ({reason}; see its log)")

    def close(self) -> None:
        pass


def _map_and_unlink(path: str) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        # Held until the map, which keeps a duplicate of `fd`, is freed with the last tensor in it: then the server may
        # write the file again. A file that it is writing has no key, so there is nothing to wait for.
        if not try_lock(fd, shared=True):
            raise LostSample("the server took it back: it was not fetched in time")
        size = os.fstat(fd).st_size
        os.unlink(path)
        if size == 0:
            raise LostSample("an empty file")
        return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)


def check_space(directory: Path, needed_bytes: int) -> None:
    """Raise EngineError unless the tmpfs has room for the requests in flight."""
    facts = os.statvfs(directory)
    free = facts.f_bavail * facts.f_frsize
    if free < needed_bytes:
        raise EngineError(
            f"transport_dir {directory}: {free / 2**20:.0f} MiB free, {needed_bytes / 2**20:.0f} MiB needed for the"
            " requests in flight; lower --requests-in-flight or --max-length, or enlarge it"
        )


class MooncakeTransport:
    """Objects in a Mooncake store. Its calls block, so they run in threads of their own. An object that could not be
    removed (a lease may still be held, or it came too late) is tried again with every later one and at close."""

    def __init__(self, address: str) -> None:
        self._store = _open_mooncake_store(address)
        self._threads = ThreadPoolExecutor(MOONCAKE_THREADS, thread_name_prefix="mooncake")
        self._to_remove: dict[str, float] = {}  # key -> when to stop trying
        self._lock = threading.Lock()
        self._closed = False

    async def take(self, key: str, timeout_s: float) -> CapturedStates:
        """See TmpfsTransport."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._take, key, timeout_s)

    def _take(self, key: str, timeout_s: float) -> CapturedStates:
        deadline, delay = time.monotonic() + timeout_s, 0.001
        while self._store.is_exist(key) != 1:
            if self._store.is_exist(f"{key}.failed") == 1:
                reason = bytes(self._store.get(f"{key}.failed")).decode(errors="replace")
                self._remove(f"{key}.failed")
                raise NoSpace(reason) if "-200" in reason else LostSample(reason)
            if self._closed or time.monotonic() > deadline:
                self._remove(key)
                raise LostSample(f"object {key} did not appear within {timeout_s:.0f}s")
            time.sleep(delay)
            delay = min(2 * delay, 0.05)
        raw = bytearray(self._store.get(key))  # empty if it was evicted just now, which decode refuses
        self._remove(key)
        return decode(raw, key)

    def _remove(self, key: str) -> None:
        with self._lock:
            self._to_remove[key] = time.monotonic() + LATEST_SECONDS
            self._remove_all()

    def _remove_all(self) -> None:
        now = time.monotonic()
        for key, until in list(self._to_remove.items()):
            if self._store.remove(key, True) == 0 or now > until:
                del self._to_remove[key]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True)
        self._remove_all()
        self._store.close()


def _open_mooncake_store(address: str) -> Any:
    """Connect to the master at `tcp://HOST:PORT` or `rdma://HOST:PORT/DEVICE`; lends the store no memory."""
    os.environ.setdefault("MC_STORE_MEMCPY", "0")  # the local shortcut crashes on hosts without RDMA
    os.environ.setdefault("GLOG_minloglevel", "2")  # its information lines are not for our user
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise ConfigError(
            f"--transport mooncake: mooncake is not installed beside the trainer ({error}); run `make mooncake`"
        ) from None
    parts = urlsplit(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port))  # sends nothing; tells which of our addresses faces the master
        own_address = probe.getsockname()[0]
    store = MooncakeDistributedStore()
    master = f"{parts.hostname}:{parts.port}"
    code = store.setup(own_address, "P2PHANDSHAKE", 0, 512 << 20, parts.scheme, parts.path.strip("/"), master)
    if code != 0:
        raise EngineError(f"mooncake store at {address}: no answer (setup said {code}); is mooncake_master running?")
    return store


def mooncake_address(text: str | None) -> str:
    """`HOST:PORT`, `tcp://HOST:PORT` or `rdma://HOST:PORT/DEVICE` as a full address; raises ConfigError."""
    if not text:
        raise ConfigError("--transport mooncake: name the store's master with --mooncake-address HOST:PORT")
    full = text if "://" in text else f"tcp://{text}"
    try:
        parts = urlsplit(full)
        if parts.scheme in ("tcp", "rdma") and parts.hostname and parts.port:
            return full
    except ValueError:
        pass
    raise ConfigError(f"mooncake_address {text}: expected HOST:PORT, tcp://HOST:PORT or rdma://HOST:PORT/DEVICE")


Transport = TmpfsTransport | MooncakeTransport


def open_transport(place: str) -> Transport:
    """The trainer's end of the place a server stores to."""
    kind, _, where = place.partition(":")
    if kind not in ("tmpfs", "mooncake"):
        raise EngineError(f"the server stores to {place}: expected tmpfs:DIRECTORY or mooncake:tcp://HOST:PORT")
    return TmpfsTransport(where) if kind == "tmpfs" else MooncakeTransport(where)
