"""The life of a server this process launches: start, health, restart after a crash, stop, and what a crash of the
trainer itself leaves behind."""

from __future__ import annotations

import errno
import getpass
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.files import try_lock
from specforge_lite.core.http import HttpFailure, fetch
from specforge_lite.core.log import format_seconds, info, progress, warn
from specforge_lite.serving import watchdog

MAX_RESTARTS = 3
STOP_GRACE_SECONDS = 5.0
TAIL_LINES = 25
MAX_ERROR = 300
SEARCHED_LOG_BYTES = 1 << 20
# Before each line of a traceback vLLM writes `(Worker pid=7) ERROR 11-27 16:46:10 [core.py:133] `, SGLang nothing.
_LOG_PREFIX = re.compile(r"^(?:\([\w-]+ pid=\d+\)\s*)?(?:(?:ERROR|CRITICAL)\s[\d-]+ [\d:]+ \[[^\]]+\]\s)?")
# Unindented, as the line that ends a traceback is: `ValueError: ...`, `torch.OutOfMemoryError: ...`.
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure)\b(?:: .*)?$")
_PORT_TAKEN = re.compile(r"(\[Errno 98\].*)")
_ERROR_LINE = re.compile(r"((?:\berror: |\bERROR\b|\bCRITICAL\b).*)")
RUN_PREFIX = "specforge-"
OWNER_FILE = ".owner"
SESSION_FILE = ".session"
RENDEZVOUS_FILE = ".rendezvous"
# What torchrun and our own venv put into the environment: a server that sees RANK or MASTER_PORT joins the trainer's
# process group.
_NOT_FOR_SERVERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|TORCH_NCCL)_.*"
    r"|VIRTUAL_ENV|PYTHON(PATH|HOME)"
)


@dataclass(frozen=True)
class ServerSpec:
    """What to run and how to know that it works. `env` is laid over this process's environment."""

    name: str
    command: list[str]
    env: dict[str, str]
    url: str
    health_path: str
    log_path: Path
    startup_seconds: float


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nothing listens there now."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def free_port() -> int:
    """A TCP port of the loopback interface that is free now.

    It lies below the ports that the system gives to outgoing connections and to listeners on port 0: one of those could
    take it in the half minute until the server has imported its engine and listens.
    """
    try:
        given_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except OSError:
        given_out = 32768
    span = range(min(10000, given_out - 8), given_out)
    for _ in range(100):
        if is_free(port := secrets.choice(span)):
            return port
    raise EngineError(f"found no free port from {span[0]} to {span[-1]} on 127.0.0.1")


def is_healthy(url: str, timeout_s: float = 5.0) -> bool:
    """True if a GET of `url` answers 200."""
    try:
        fetch(url, timeout_s)
    except HttpFailure:
        return False
    return True


def temporary_directory(run_dir: Path) -> Path:
    """TMPDIR of a server, from its run directory's name: engines leave sockets and files there when they are killed.
    Short, because a socket's path may have 107 characters."""
    return Path(tempfile.gettempdir()) / f"sf-{run_dir.name[-12:]}"


class RunDirectory:
    """A directory only this user can enter, with an unguessable name, locked for as long as this process lives.

    Beside it comes `temporary_directory(path)`, for what the server's own libraries write.
    """

    def __init__(self, parent: Path) -> None:
        if not parent.is_dir():
            raise ConfigError(f"transport_dir {parent}: no such directory")
        self.path = parent / f"{RUN_PREFIX}{secrets.token_hex(16)}"
        self.path.mkdir(mode=0o700)
        temporary_directory(self.path).mkdir(mode=0o700)
        self._lock = os.open(self.path / OWNER_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try_lock(self._lock)

    def close(self) -> None:
        if self._lock >= 0:
            _remove(self.path)
            os.close(self._lock)
            self._lock = -1


def _remove(run_dir: Path) -> None:
    shutil.rmtree(temporary_directory(run_dir), ignore_errors=True)
    shutil.rmtree(run_dir, ignore_errors=True)


def collect_leftovers(parent: Path) -> int:
    """End servers and delete directories whose trainer has ended (its lock is free); return how many."""
    collected = 0
    for path in parent.glob(f"{RUN_PREFIX}{'[0-9a-f]' * 32}"):
        try:
            if path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / OWNER_FILE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if try_lock(lock):  # else its trainer is alive
                _end_recorded_session(path)
                _remove(path)
                collected += 1
        finally:
            os.close(lock)
    if collected:
        info(f"removed what {collected} crashed run{'s' if collected > 1 else ''} left in {parent}")
    return collected


def _end_recorded_session(run_dir: Path) -> None:
    try:
        record = json.loads((run_dir / SESSION_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return
    session = int(record["session"])
    if watchdog.start_time(session) not in (None, record["start_time"]):
        return  # the number was reused, so every process of the old session has ended
    watchdog.end_session(session, 0.0)
    if watchdog.start_time(session) is not None:
        os.kill(session, 9)


class LaunchedServer:
    """A server process of ours and its run directory, which is deleted when it is stopped. A thread waits for its exit
    and starts it again, at most `MAX_RESTARTS` times."""

    def __init__(self, spec: ServerSpec, run_dir: RunDirectory) -> None:
        self.spec = spec
        self.run_dir = run_dir
        self.failure: str | None = None
        """Set when the server will not come back: what happened, in one line."""
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # where the log of the present server begins in its file
        self._stopping = threading.Event()
        self._monitor = threading.Thread(target=self._watch, name=f"{spec.name}-monitor", daemon=True)

    @property
    def pid(self) -> int:
        """Process id of the watchdog: the session of everything that belongs to the server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Launch and wait until the health path answers. Raises EngineError, with the log's tail on stderr."""
        info(f"launching {self.spec.name} on {self.spec.url}, log {self.spec.log_path}")
        start = time.monotonic()
        try:
            self._spawn()
            self._wait_ready(show=True)
        except BaseException as error:
            self.stop()
            if isinstance(error, EngineError):
                self._show_tail()
            raise
        info(f"{self.spec.name} is ready after {format_seconds(time.monotonic() - start)}")
        self._monitor.start()

    def stop(self) -> None:
        """End the server and every process it started, delete its run directory; may be called twice."""
        self._stopping.set()
        process = self._process
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()  # the watchdog reads the end of the pipe and ends the session
            try:
                process.wait(STOP_GRACE_SECONDS + 15)
            except subprocess.TimeoutExpired:
                watchdog.end_session(process.pid, 0.0)
                process.kill()
                process.wait()
        self.run_dir.close()

    def _spawn(self) -> None:
        spec, run_dir = self.spec, self.run_dir.path
        directories = [str(run_dir), str(temporary_directory(run_dir))]
        order = {"command": spec.command, "grace_s": STOP_GRACE_SECONDS, "directories": directories}
        (run_dir / RENDEZVOUS_FILE).unlink(missing_ok=True)  # that of the server before a restart
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        with spec.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, watchdog.__file__, json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(own_environment(run_dir) | spec.env),
                start_new_session=True,
            )
        record = {"session": self._process.pid, "start_time": watchdog.start_time(self._process.pid)}
        (run_dir / SESSION_FILE).write_text(json.dumps(record))

    def _wait_ready(self, show: bool) -> None:
        spec, process = self.spec, self._process
        assert process is not None
        deadline = time.monotonic() + spec.startup_seconds
        shown = {"bar_format": "{desc} {elapsed} {postfix}"} if show else {"disable": True}
        with progress(None, f"waiting for {spec.name}", **shown) as bar:
            while not is_healthy(spec.url + spec.health_path):
                if self._stopping.is_set():
                    raise EngineError(f"{spec.name} was stopped while it started")
                if (code := process.poll()) is not None:
                    raise EngineError(f"{spec.name} ended with status {_status(code)} while it started{self._cause()}")
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{spec.name} was not ready after {format_seconds(spec.startup_seconds)} (--dist-timeout);"
                        f" log: {spec.log_path}"
                    )
                bar.set_postfix_str(self._log(300).strip().rpartition("\n")[2][:80], refresh=False)
                bar.update(1)
                self._stopping.wait(0.5)

    def _watch(self) -> None:
        while True:
            assert self._process is not None
            died = f"died (status {_status(self._process.wait())})"
            if self._stopping.is_set():
                return None
            if self.restarts >= MAX_RESTARTS:
                return self._give_up(f"{self.spec.name} {died} after {self.restarts} restarts{self._cause()}")
            self.restarts += 1
            warn(f"{self.spec.name} {died}; restart {self.restarts} of at most {MAX_RESTARTS}{self._cause()}")
            self._spawn()
            try:
                self._wait_ready(show=False)
                info(f"{self.spec.name} is back")
            except EngineError as error:
                return None if self._stopping.is_set() else self._give_up(str(error))

    def _log(self, num_bytes: int) -> str:
        """The last bytes of what the present server has logged."""
        try:
            with self.spec.log_path.open("rb") as file:
                file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - num_bytes))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _cause(self) -> str:
        """The end of a message about a server that ended: its first error, and where its log is."""
        found = first_error(self._log(SEARCHED_LOG_BYTES))  # far back in a long log are errors that it survived
        return f"{f': {found}' if found else ''}; log: {self.spec.log_path}"

    def _give_up(self, failure: str) -> None:
        self.failure = failure
        self._show_tail()

    def _show_tail(self) -> None:
        tail = self._log(300 * TAIL_LINES).splitlines()[-TAIL_LINES:]
        warn(f"last lines of {self.spec.log_path}:\n  " + "\n  ".join(tail))


def first_error(log: str) -> str | None:
    """The first error of any worker in a server's log, as one line; None if there is none that looks like one.

    The last lines of a log are of the processes that ended because another one did; the first error is the reason: the
    exception that ends the first traceback, else the first line that an argument parser or a logger calls an error. A
    port that is taken comes before both: SGLang logs it without a traceback, and then calls the stranger who has it.
    """
    lines = log.splitlines()
    if taken := _PORT_TAKEN.search(log):
        return " ".join(taken[1].split())[:MAX_ERROR]
    starts = [place for place, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    plain = [_LOG_PREFIX.sub("", line) for line in lines[starts[0] :]] if starts else []
    for line, after in zip_longest(plain, plain[1:], fillvalue=""):
        if found := _EXCEPTION.match(line):
            more = after if after.startswith("  ") else ""  # pydantic's second line holds what is wrong
            return " ".join(f"{found[0]} {more}".split())[:MAX_ERROR]
    for line in lines:
        if found := _ERROR_LINE.search(line):
            return " ".join(found[1].split())[:MAX_ERROR]
    return None


def own_environment(run_dir: Path) -> dict[str, str]:
    """Keeps a server's ranks to this host and its files where they are found again; what the user has set stays.

    The ranks' sockets bind to loopback instead of what the host's name resolves to. SGLang's would meet at a torch
    store that listens on all interfaces, vLLM's meet in a file; with a file, SGLang's do so too.
    """
    compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")  # torch's own default
    chosen = {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{run_dir.absolute() / RENDEZVOUS_FILE}",
        "TORCHINDUCTOR_CACHE_DIR": compiled,
    }
    kept = {name: value for name, value in chosen.items() if name not in os.environ}
    return kept | {"TMPDIR": str(temporary_directory(run_dir))}


def server_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment, without what is not for servers, and with `extra` laid over it."""
    return {name: value for name, value in os.environ.items() if not _NOT_FOR_SERVERS.fullmatch(name)} | extra


def _status(code: int) -> str:
    """How a shell would put it: the watchdog passes on -9 as 247."""
    return f"{code}, signal {256 - code}" if code > 192 else str(code)
