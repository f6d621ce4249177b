"""Where captured samples go. A sink is asked to store one sample under a key the client made up and, if it cannot,
to leave a note under the same key, so that the client need not wait for a timeout."""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections import deque
from urllib.parse import urlsplit

from .blob import Blob

logger = logging.getLogger(__name__)

SWITCH = "SPECFORGE_CAPTURE"
SEGMENT_MB = "SPECFORGE_MOONCAKE_SEGMENT_MB"
KEY = re.compile(r"[0-9a-f]{32}\Z")  # the client's key becomes a file name; nothing else is accepted
UNCLAIMED_SECONDS = 900.0
IDLE_SLOT_SECONDS = 60.0
SLOT_BYTES = 4 << 20
SLOT_PREFIX = ".slot-"


def open_sink() -> TmpfsSink | MooncakeSink | None:
    """The sink that SPECFORGE_CAPTURE names, or None where it is unset: then the server is an ordinary one."""
    kind, _, place = os.environ.get(SWITCH, "").partition(":")
    if kind == "tmpfs" and place:
        return TmpfsSink(place)
    if kind == "mooncake" and place:
        return MooncakeSink(place)
    if kind:
        raise ValueError(f"{SWITCH}={kind}:{place}: expected tmpfs:DIRECTORY or mooncake:tcp://HOST:PORT")
    return None


class TmpfsSink:
    """One file per sample in a directory that only its owner can enter.

    A file appears under its key when it is complete. The client locks it, deletes the key and maps the file. The key of
    a sample of SLOT_BYTES and more is a second name (hard link) of a slot: when the client's last tensor is freed, or
    it dies, its lock is gone and the slot is written again. Existing pages take a copy at twice the rate of new ones.

        slot:  written (locked by us) -> linked to KEY -> locked by the client, KEY deleted -> free

    Samples nobody fetched (their client is gone) are deleted after UNCLAIMED_SECONDS, slots nobody needed after
    IDLE_SLOT_SECONDS, all of them at start if no other server uses the directory.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        facts = os.lstat(directory)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            raise PermissionError(f"{directory}: expected a directory of this user's with mode 0700")
        self._written: deque[tuple[float, str]] = deque()
        self._slots: list[_Slot] = []
        self._guard = threading.Lock()
        self._lock = os.open(os.path.join(directory, ".server"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        atexit.register(self.delete_free_slots)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # another server is at work here; what lies here may be its own
        for name in os.listdir(directory):
            if KEY.match(name.split(".")[0]) or name.startswith(SLOT_PREFIX):
                os.unlink(os.path.join(directory, name))

    def put(self, key: str, blob: Blob) -> None:
        """Store a sample. Raises OSError, for a full tmpfs as well."""
        self._drop_unclaimed()
        try:
            self._write(key, blob)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.delete_free_slots()
            self._write(key, blob)

    def _write(self, key: str, blob: Blob) -> None:
        path = os.path.join(self.directory, key)
        slot = self._take_slot(blob.num_bytes)
        try:
            for offset, piece in blob.chunks():
                done = 0
                while done < len(piece):
                    done += os.pwrite(slot.fd, piece[done:], offset + done)
            os.ftruncate(slot.fd, blob.num_bytes)  # where it held a longer one
            slot.size, slot.used_at = blob.num_bytes, time.monotonic()
            fcntl.flock(slot.fd, fcntl.LOCK_UN)
            os.link(slot.path, path)
        except BaseException:
            self._forget(slot)
            raise
        self._written.append((slot.used_at, path))
        if blob.num_bytes < SLOT_BYTES:
            self._forget(slot)
        slot.is_ours = False

    def _take_slot(self, size: int) -> _Slot:
        """The free slot nearest in size, else a new one; locked."""
        with self._guard:
            for slot in sorted(self._slots, key=lambda s: abs(s.size - size)) if size >= SLOT_BYTES else ():
                if slot.try_take():
                    return slot
            slot = _Slot(os.path.join(self.directory, f"{SLOT_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"))
            self._slots.append(slot)
            return slot

    def _forget(self, slot: _Slot) -> None:
        with self._guard:
            self._slots.remove(slot)
        slot.delete()

    def delete_free_slots(self, unused_for: float = 0.0) -> None:
        """Give the memory of slots back that are free and were not written for so many seconds."""
        before = time.monotonic() - unused_for
        with self._guard:
            free = [slot for slot in self._slots if slot.used_at <= before and slot.try_take()]
            self._slots = [slot for slot in self._slots if slot not in free]
        for slot in free:
            slot.delete()

    def fail(self, key: str, error: BaseException) -> None:
        """Leave an empty file whose name is the reason: on a full tmpfs a name still fits where no byte does."""
        reason = errno.errorcode.get(error.errno or 0, "EIO") if isinstance(error, OSError) else "FAILED"
        path = os.path.join(self.directory, f"{key}.{reason}")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            self._written.append((time.monotonic(), path))
        except OSError:
            logger.exception("specforge_capture: cannot even note the failure of %s", key)

    def _drop_unclaimed(self) -> None:
        while self._written and time.monotonic() - self._written[0][0] > UNCLAIMED_SECONDS:
            path = self._written.popleft()[1]
            if os.path.exists(path):
                os.unlink(path)
        self.delete_free_slots(IDLE_SLOT_SECONDS)


class _Slot:
    """A file of the sink that is written again and again. It is free when its only name is its own and nobody holds
    its lock. is_ours: this process is writing it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        self.size, self.used_at, self.is_ours = 0, time.monotonic(), True

    def try_take(self) -> bool:
        """Lock it if it is free. The client locks before it deletes the key, so a single name is safe to look at."""
        if self.is_ours or os.fstat(self.fd).st_nlink != 1:
            return False
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        self.is_ours = True
        return True

    def delete(self) -> None:
        os.close(self.fd)
        if os.path.exists(self.path):
            os.unlink(self.path)


class MooncakeSink:
    """One object per sample in a Mooncake store. This process lends the store a segment of its memory
    (SPECFORGE_MOONCAKE_SEGMENT_MB, default 2048), in which the objects of this host lie."""

    def __init__(self, address: str) -> None:
        self._store = open_mooncake_store(address, int(os.environ.get(SEGMENT_MB, "2048")) << 20)

    def put(self, key: str, blob: Blob) -> None:
        code = self._store.put_parts(key, *blob.buffers())
        if code != 0:
            raise OSError(errno.ENOSPC if code == -200 else errno.EIO, f"mooncake put answered {code}")

    def fail(self, key: str, error: BaseException) -> None:
        self._store.put(f"{key}.failed", str(error).encode()[:200])


def open_mooncake_store(address: str, segment_bytes: int):  # type: ignore[no-untyped-def]
    """Connect to the master at `tcp://HOST:PORT` or `rdma://HOST:PORT/DEVICE`, lending `segment_bytes`."""
    os.environ.setdefault("MC_STORE_MEMCPY", "0")  # the local shortcut crashes on hosts without RDMA
    import torch  # noqa: F401  the store of a GPU machine finds libcudart only where torch has loaded it
    from mooncake.store import MooncakeDistributedStore

    parts = urlsplit(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port))  # sends nothing; shows which of our addresses faces the master
        own_address = probe.getsockname()[0]
    store = MooncakeDistributedStore()
    master, device = f"{parts.hostname}:{parts.port}", parts.path.strip("/")
    code = store.setup(own_address, "P2PHANDSHAKE", segment_bytes, 64 << 20, parts.scheme, device, master)
    if code != 0:
        raise ConnectionError(f"mooncake store at {address}: setup answered {code}")
    return store
