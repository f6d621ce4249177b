"""Where captured samples go. A sink is asked to store one sample under a key the client made up and, if it cannot,
to leave a note under the same key, so that the client need not wait for a timeout."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import stat
import time
from collections import deque
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

SWITCH = "SPECFORGE_CAPTURE"
SEGMENT_MB = "SPECFORGE_MOONCAKE_SEGMENT_MB"
KEY = re.compile(r"[0-9a-f]{32}\Z")  # the client's key becomes a file name; nothing else is accepted
UNCLAIMED_SECONDS = 900.0


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

    A file appears under its final name when it is complete. Files nobody fetched (their client is gone) are deleted
    after UNCLAIMED_SECONDS, and at start if no other server uses the directory.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        facts = os.lstat(directory)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            raise PermissionError(f"{directory}: expected a directory of this user's with mode 0700")
        self._written: deque[tuple[float, str]] = deque()
        self._lock = os.open(os.path.join(directory, ".server"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # another server is at work here; what lies here may be its own
        for name in os.listdir(directory):
            if KEY.match(name.split(".")[0]):
                os.unlink(os.path.join(directory, name))

    def put(self, key: str, buffers: list[memoryview]) -> None:
        self._drop_unclaimed()
        path = os.path.join(self.directory, key)
        temporary = path + ".part"
        try:
            fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                for buffer in buffers:
                    done = 0
                    while done < len(buffer):
                        done += os.write(fd, buffer[done:])
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except OSError:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        self._written.append((time.monotonic(), path))

    def fail(self, key: str, error: BaseException) -> None:
        """Leave an empty file whose name tells the reason: on a full tmpfs a name still fits where no byte does."""
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


class MooncakeSink:
    """One object per sample in a Mooncake store. This process lends the store a segment of its memory
    (SPECFORGE_MOONCAKE_SEGMENT_MB, default 2048), in which the objects of this host lie."""

    def __init__(self, address: str) -> None:
        self._store = open_mooncake_store(address, int(os.environ.get(SEGMENT_MB, "2048")) << 20)

    def put(self, key: str, buffers: list[memoryview]) -> None:
        code = self._store.put_parts(key, *buffers)
        if code != 0:
            raise OSError(errno.ENOSPC if code == -200 else errno.EIO, f"mooncake put answered {code}")

    def fail(self, key: str, error: BaseException) -> None:
        self._store.put(f"{key}.failed", str(error).encode()[:200])


def open_mooncake_store(address: str, segment_bytes: int):  # type: ignore[no-untyped-def]
    """Connect to the master at `tcp://HOST:PORT` or `rdma://HOST:PORT/DEVICE`, lending `segment_bytes`."""
    os.environ.setdefault("MC_STORE_MEMCPY", "0")  # the local shortcut crashes on hosts without RDMA
    from mooncake.store import MooncakeDistributedStore

    parts = urlsplit(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port))  # sends nothing; tells which of our addresses faces the master
        own_address = probe.getsockname()[0]
    store = MooncakeDistributedStore()
    code = store.setup(
        own_address,
        "P2PHANDSHAKE",
        segment_bytes,
        64 << 20,
        parts.scheme,
        parts.path.strip("/"),
        f"{parts.hostname}:{parts.port}",
    )
    if code != 0:
        raise ConnectionError(f"mooncake store at {address}: setup answered {code}")
    return store
