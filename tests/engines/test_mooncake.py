"""Hidden states between hosts: trainer and server in two network namespaces, a Mooncake store between (needs root).

namespace spf-trainer 10.77.0.1  <---- veth ---->  namespace spf-target 10.77.0.2
mooncake_master, training run                      scripts/serve_target.py with vLLM
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training import ROOT, TARGET, TrainingRuns, environment

MASTER = "10.77.0.1:50051"
URL = "http://10.77.0.2:30000"
HERE = Path(__file__).resolve().parent
IN_TRAINER = ["ip", "netns", "exec", "spf-trainer"]
IN_TARGET = ["ip", "netns", "exec", "spf-target"]


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[None]:
    remove_namespaces()
    for name in ("spf-trainer", "spf-target"):
        ip(f"netns add {name}")
        ip(f"-n {name} link set lo up")
    ip("link add spf0 netns spf-trainer type veth peer name spf0 netns spf-target")
    for name, address in (("spf-trainer", "10.77.0.1"), ("spf-target", "10.77.0.2")):
        ip(f"-n {name} addr add {address}/24 dev spf0")
        ip(f"-n {name} link set spf0 up")
    yield
    remove_namespaces()


def remove_namespaces() -> None:
    for name in ("spf-trainer", "spf-target"):
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def running(words: list[str], log: Path, ready: str, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with SIGTERM; entered when its log says `ready`."""
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + seconds
        while ready not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def store(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    master = str(Path(sys.executable).with_name("mooncake_master"))
    words = [*IN_TRAINER, master, "--rpc_address=10.77.0.1", "--rpc_port=50051", "--metrics_port=0"]
    with running(words, tmp_path_factory.mktemp("store") / "master.log", "Master service started", 30):
        yield


@pytest.fixture(scope="module")
def server(store: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    directory = tmp_path_factory.mktemp("target")
    words = [
        *IN_TARGET, sys.executable, "scripts/serve_target.py", "--target-model-path", str(TARGET), "--target-backend",
        "vllm", "--target-dtype", "float32", "--host", "10.77.0.2", "--port", "30000", "--max-length", "512",
        "--transport", "mooncake", "--mooncake-address", MASTER, "--transport-dir", str(directory), "--log-dir",
        str(directory),
    ]  # fmt: skip
    with running(words, directory / "serve.log", "attach with:", 240) as process:
        yield process
    assert [path.name for path in directory.iterdir() if path.name.startswith("specforge-")] == []


def test_the_two_namespaces_share_no_loopback(server: subprocess.Popen[bytes]) -> None:
    probe = "import urllib.request, sys; urllib.request.urlopen(sys.argv[1] + '/health', timeout=5)"
    reached = subprocess.run([*IN_TRAINER, sys.executable, "-c", probe, URL], capture_output=True)
    assert reached.returncode == 0, reached.stderr
    local = subprocess.run([*IN_TRAINER, sys.executable, "-c", probe, "http://127.0.0.1:30000"], capture_output=True)
    assert local.returncode != 0


def test_parity_lost_and_late_objects(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """See mooncake_client.py; it runs in the trainer's namespace and checks against transformers itself."""
    result = tmp_path / "result.json"
    words = [*IN_TRAINER, sys.executable, str(HERE / "mooncake_client.py"), URL, MASTER, str(TARGET), str(result)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(result.read_text()) == {"parity": 36, "lost": 2, "late": 1, "damaged": 1, "left": 0}


def test_a_training_run_gives_the_losses_of_transformers(
    server: subprocess.Popen[bytes], training: TrainingRuns
) -> None:
    words = ["--target-url", URL, "--transport", "mooncake", "--mooncake-address", MASTER]
    run = training.start("vllm", *words, ranks=2, name="mooncake", prefix=IN_TRAINER)
    oracle = training.hf_losses()
    assert run.wait(280) == 0, run.log()
    losses = run.losses()
    assert len(losses) == len(oracle)
    assert max(abs(a - b) for a, b in zip(losses, oracle)) < 1e-3


def test_a_tmpfs_client_is_told_to_use_the_store(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    code = (
        "import sys; from specforge_lite.core.sections import TargetSection; "
        "from specforge_lite.serving.registry import open_engine; "
        f"open_engine(TargetSection(target_model_path={str(TARGET)!r}, target_backend='vllm', target_url=({URL!r},)),"
        " 400)"
    )
    done = subprocess.run(
        [*IN_TRAINER, sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert f"stores to mooncake:tcp://{MASTER}; add --transport mooncake" in done.stderr
