"""What both real engines must do when asked for hidden states. test_sglang.py and test_vllm.py derive from this class
and from those in live_training.py: one worker takes one engine, and a class shares one server start (15 to 96 s).
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from proxy import Proxy
from training import TrainingRuns

from specforge_lite.capture import remote, transport
from specforge_lite.capture.prefetch import Prefetcher, SkipBudget
from specforge_lite.capture.remote import RemoteEngine
from specforge_lite.core.errors import CaptureError, EngineError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving import watchdog
from specforge_lite.serving.registry import open_engine
from specforge_lite.types import CapturedStates, TokenizedSample

MAX_LENGTH = 1000
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 64, 65, 100, 257, 511, 512, 700, 999, 1000]
AUX = (0, 3, 6)
RELATIVE = 1e-4


def sample(name: str, length: int, seed: int = 0) -> TokenizedSample:
    generator = torch.Generator().manual_seed(seed * 100_003 + length)
    ids = torch.randint(0, 4096, (length,), generator=generator)
    return TokenizedSample(name, ids, torch.ones(length, dtype=torch.bool))


class Oracle:
    """Hidden states of plain transformers, `output_hidden_states=True`, one sample at a time, in fp32."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.eval()

    def assert_equal(self, wanted: TokenizedSample, got: CapturedStates) -> None:
        with torch.no_grad():
            out = self.model(wanted.input_ids_L[None], output_hidden_states=True)
            last = got.last_LH if got.last_is_normed else self.model.norm(got.last_LH)
        assert got.sample_id == wanted.sample_id
        assert torch.equal(got.input_ids_L, wanted.input_ids_L)
        for place, layer in enumerate(AUX):
            assert_close(got.aux_LAH[:, place], out.hidden_states[layer + 1][0])
        assert_close(last, out.last_hidden_state[0])


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Row by row: the largest difference of a row against the largest value of that row."""
    assert got.shape == want.shape
    error = (got - want).abs().amax(-1) / want.abs().amax(-1)
    assert float(error.max()) < RELATIVE, float(error.max())


@contextmanager
def tmpfs(directory: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of its own, so that it can be filled (needs root, as in the container the suite runs in)."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def server_main(engine: RemoteEngine) -> int:
    """Process id of the launched server itself: the watchdog's child."""
    assert engine._server is not None
    (child,) = (p.pid for p in psutil.Process(engine._server.pid).children())
    return child


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Address and port of every TCP socket on which these processes listen."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for pid in pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.fixture(scope="class")
def oracle(tiny_target: Path) -> Oracle:
    return Oracle(tiny_target)


class CaptureChecks:
    """One launched server, tensor-parallel size 1, fp32, and clients that attach to it."""

    engine_name: str

    @pytest.fixture(scope="class")
    def shm(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        with tmpfs(tmp_path_factory.mktemp("live") / "shm", 64) as directory:
            yield directory

    @pytest.fixture(scope="class")
    def engine(self, tiny_target: Path, shm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEngine]:
        target = TargetSection(
            target_model_path=str(tiny_target),
            target_backend=self.engine_name,
            target_dtype="float32",
            transport_dir=shm,
        )
        opened = open_engine(target, MAX_LENGTH, log_dir=tmp_path_factory.mktemp("log"), wait_minutes=5)
        assert isinstance(opened, RemoteEngine)
        yield opened
        opened.close()
        assert list(shm.iterdir()) == []

    @pytest.fixture
    def attach(self, engine: RemoteEngine, tiny_target: Path) -> Iterator[Callable[..., RemoteEngine]]:
        opened: list[RemoteEngine] = []

        def attach_one(url: str | None = None, minutes: float = 5.0, **values: object) -> RemoteEngine:
            settings = {"target_model_path": str(tiny_target), "target_backend": "auto", **values}
            target = TargetSection(target_url=(url or engine._urls[0],), **settings)
            found = open_engine(target, MAX_LENGTH, wait_minutes=minutes)
            assert isinstance(found, RemoteEngine)
            opened.append(found)
            return found

        yield attach_one
        for found in opened:
            found.close()

    @pytest.fixture
    def proxy(self, engine: RemoteEngine) -> Iterator[Proxy]:
        with Proxy(engine._urls[0]) as running:
            yield running

    def test_facts(self, engine: RemoteEngine) -> None:
        info = engine.info
        assert (info.engine, info.num_layers, info.hidden_size, info.vocab_size) == (self.engine_name, 8, 128, 4096)
        assert (info.max_length, info.aux_layer_ids) == (MAX_LENGTH, AUX)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_parity_at_every_length(self, engine: RemoteEngine, oracle: Oracle, length: int) -> None:
        wanted = sample("s", length)
        oracle.assert_equal(wanted, engine.capture([wanted])[0])

    def test_parity_in_flight_with_shared_prefixes_and_repeats(self, engine: RemoteEngine, oracle: Oracle) -> None:
        base = sample("base", 300).input_ids_L
        ids = [sample("r", n, seed=n).input_ids_L for n in (5, 63, 128, 401)]
        ids += [torch.cat([base[:n], sample("x", m, seed=1).input_ids_L]) for n, m in ((100, 3), (256, 40), (300, 1))]
        ids += [base, base, base[:128], base[:16]]
        samples = [TokenizedSample(str(i), x, x >= 0) for i, x in enumerate(ids * 4)]
        batches = [samples[i : i + 3] for i in range(0, len(samples), 3)]
        with Prefetcher(engine, iter(batches), depth=5) as stream:
            got = [state for _, states in stream for state in states]
        assert [state.sample_id for state in got] == [s.sample_id for s in samples]
        for wanted, state in zip(samples, got, strict=True):
            oracle.assert_equal(wanted, state)

    def test_an_attached_client_gets_the_same_states(
        self, engine: RemoteEngine, attach: Callable[..., RemoteEngine], oracle: Oracle
    ) -> None:
        wanted = sample("a", 77)
        oracle.assert_equal(wanted, attach().capture([wanted])[0])

    def test_files_are_the_owners_only_and_names_unguessable(self, engine: RemoteEngine, shm: Path) -> None:
        import urllib.request

        key = "0f" * 16
        path, body = engine._dialect.capture_request([5, 6, 7], key)
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(engine._urls[0] + path, json.dumps(body).encode(), headers)
        urllib.request.urlopen(request).read()
        (run,) = shm.iterdir()
        assert len(run.name.removeprefix("specforge-")) == 32
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        assert wait_for((run / key).exists, 10)
        assert stat.S_IMODE((run / key).stat().st_mode) == 0o600
        os.unlink(run / key)

    def test_the_server_listens_on_loopback_only(self, engine: RemoteEngine) -> None:
        assert engine._server is not None
        found = listening(watchdog.session_processes(engine._server.pid))
        assert ("127.0.0.1", int(engine._urls[0].rpartition(":")[2])) in found
        assert {ip for ip, _ in found} == {"127.0.0.1"}

    def test_too_long_samples_are_counted_and_skipped_within_the_budget(self, engine: RemoteEngine) -> None:
        batches = [[sample("a", 5)], [sample("long", 1001), sample("b", 6)], [sample("longer", 1200)]]
        skips = SkipBudget(fraction=0.25, num_samples=4)
        with Prefetcher(engine, iter(batches), depth=1, skips=skips) as stream:
            assert [[s.sample_id for s in next(stream)[0]] for _ in range(2)] == [["a"], ["b"]]
            with pytest.raises(CaptureError, match="longer: 1200 tokens, the target accepts 1000; 2 skipped"):
                next(stream)

    def test_the_servers_own_refusal_of_a_long_sample_is_told(self, engine: RemoteEngine) -> None:
        held = engine.info
        engine.info = replace(held, max_length=5000)
        try:
            with pytest.raises(CaptureError, match=r"HTTP 400: .*1500"):
                engine.capture([sample("long", 1500)])
        finally:
            engine.info = held

    def test_ids_that_would_end_the_server_are_not_sent(self, engine: RemoteEngine, oracle: Oracle) -> None:
        bad = TokenizedSample("bad", torch.tensor([1, 4096]), torch.ones(2, dtype=torch.bool))
        with pytest.raises(CaptureError, match=r"token ids 1..4096, the vocabulary is 0..4095"):
            engine.capture([bad])
        wanted = sample("after", 20)
        oracle.assert_equal(wanted, engine.capture([wanted])[0])

    def test_a_wrong_width_is_refused_at_the_probe(
        self, attach: Callable[..., RemoteEngine], tiny_target: Path, tmp_path: Path
    ) -> None:
        config = json.loads((tiny_target / "config.json").read_text()) | {"hidden_size": 64}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CaptureError, match=r"aux shape \(16, 3, 128\) != .* = \(16, 3, 64\)"):
            attach(target_model_path=str(tmp_path))

    def test_wrong_layers_are_refused_at_the_probe(self, attach: Callable[..., RemoteEngine]) -> None:
        with pytest.raises(CaptureError, match=r"aux layers \[0, 3, 6\], expected \[0, 3, 4\]"):
            attach(aux_layer_ids=(0, 3, 4))

    def test_other_token_ids_are_refused(self, attach: Callable[..., RemoteEngine], proxy: Proxy) -> None:
        client = attach(proxy.url)
        proxy.change_ids = True
        with pytest.raises(CaptureError, match=r"token 3 is .* in the reply, .* was sent"):
            client.capture([sample("a", 9)])

    def test_damaged_cut_lost_and_unanswered_samples_are_asked_for_again(
        self,
        attach: Callable[..., RemoteEngine],
        proxy: Proxy,
        oracle: Oracle,
        shm: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(transport, "TAKE_SECONDS", 1.0)
        client = attach(proxy.url)
        (proxy.run_dir,) = shm.iterdir()
        for fault in ("damage", "cut", "empty", "delete", "hang up"):
            proxy.faults.append(fault)
            wanted = sample(fault, 50)
            oracle.assert_equal(wanted, client.capture([wanted])[0])
            assert proxy.faults == []

    def test_a_full_tmpfs_is_waited_for_then_told(
        self, engine: RemoteEngine, oracle: Oracle, shm: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filler = shm / "filler"

        def fill() -> None:
            facts = os.statvfs(shm)
            with filler.open("wb", buffering=0) as file:
                file.write(b"x" * (facts.f_bavail * facts.f_frsize))
            assert os.statvfs(shm).f_bavail == 0

        wanted = sample("a", 400)
        fill()
        timer = threading.Timer(1.0, filler.unlink)
        timer.start()
        oracle.assert_equal(wanted, engine.capture([wanted])[0])
        timer.join()
        fill()
        monkeypatch.setattr(remote, "RETRY_SECONDS", 0.01)
        with pytest.raises(CaptureError, match=r"asked 6 times, no space left in .*; lower --requests-in-flight"):
            engine.capture([wanted])
        filler.unlink()
        oracle.assert_equal(wanted, engine.capture([wanted])[0])
        (run,) = shm.iterdir()
        assert [p.name for p in run.iterdir() if not p.name.startswith(".")] == []

    def test_a_killed_server_is_restarted_waited_for_or_given_up(
        self,
        engine: RemoteEngine,
        attach: Callable[..., RemoteEngine],
        oracle: Oracle,
        training: TrainingRuns,
    ) -> None:
        """Four clients of a server that is killed: its launcher, one that waits, one that does not wait long, and a
        training run that does not wait long."""
        patient, hasty = attach(), attach(minutes=0.05)
        run = training.start_attached(engine._urls[0], self.engine_name)
        assert run.wait_for_step(8, 240), run.log()
        samples = [sample(str(i), 30 + i) for i in range(24)]
        before = engine.capture(samples)
        os.kill(server_main(engine), signal.SIGKILL)
        with pytest.raises(EngineError, match=r"no answer for 3s \(--dist-timeout\)"):
            hasty.capture(samples[:2])
        assert run.wait(120) == 2, run.log()
        assert "no answer for" in run.log()
        assert str(run.newest_checkpoint()) in run.log()
        with Prefetcher(engine, iter([[s] for s in samples]), depth=16) as stream:
            after = [states[0] for _, states in stream]
        for wanted, first, second in zip(samples, before, after, strict=True):
            assert_close(second.aux_LAH, first.aux_LAH)
            oracle.assert_equal(wanted, second)
        oracle.assert_equal(samples[0], patient.capture(samples[:1])[0])
        assert engine._server is not None
        assert engine._server.restarts == 1
