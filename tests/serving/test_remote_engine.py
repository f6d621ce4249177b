"""The client of serving engines against a small real HTTP server with the real plugin's writer, and every fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from specforge_lite.capture import remote, transport
from specforge_lite.capture.base import TargetInfo
from specforge_lite.capture.remote import RemoteEngine
from specforge_lite.core.errors import CaptureError, ConfigError, EngineError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.engine import Launch, cpu_thread_binding, engine_arg, engine_arg_words
from specforge_lite.serving.environment import choose_backend
from specforge_lite.serving.launch import EngineContext, open_remote
from specforge_lite.serving.sglang import Sglang
from specforge_lite.serving.vllm import Vllm
from specforge_lite.types import TokenizedSample
from tests.capture_server import INFO, CaptureServer
from tests.fake_engine import FakeEngine

OpenEngine = Callable[..., RemoteEngine]


def sample(name: str, length: int = 6) -> TokenizedSample:
    ids = (torch.arange(length) * 7 + sum(map(ord, name))) % INFO.vocab_size
    return TokenizedSample(name, ids, torch.ones(length, dtype=torch.bool))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CaptureServer]:
    monkeypatch.setenv("SPECFORGE_CAPTURE", "")  # the server sets it; restored afterwards
    monkeypatch.setattr(transport, "TAKE_SECONDS", 0.3)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.02)
    running = CaptureServer(tmp_path / "run").start()
    yield running
    running.close()


@pytest.fixture
def open_engine(server: CaptureServer) -> Iterator[OpenEngine]:
    opened: list[RemoteEngine] = []

    def open_one(info: TargetInfo = INFO, urls: tuple[str, ...] = (), minutes: float = 1.0, **options) -> RemoteEngine:
        engine = RemoteEngine(Sglang(), info, urls or (server.url,), None, 4, minutes, **options)
        opened.append(engine)
        return engine

    yield open_one
    for engine in opened:
        engine.close()


def assert_equals_fake(engine: RemoteEngine, samples: list[TokenizedSample]) -> None:
    for got, want in zip(engine.capture(samples), FakeEngine(INFO).capture(samples), strict=True):
        assert got.sample_id == want.sample_id
        assert torch.equal(got.input_ids_L, want.input_ids_L)
        assert torch.equal(got.aux_LAH, want.aux_LAH)
        assert torch.equal(got.last_LH, want.last_LH)


def test_states_arrive_bit_for_bit_and_no_file_stays(server: CaptureServer, open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.probe()
    assert_equals_fake(engine, [sample(f"s{i}", 1 + i * 5) for i in range(12)])
    assert [path.name for path in server.directory.iterdir()] == [".server"]


def test_requests_in_flight_are_bounded_over_all_threads(server: CaptureServer, open_engine: OpenEngine) -> None:
    server.latency_s = 0.02
    engine = open_engine()
    threads = [threading.Thread(target=engine.capture, args=([sample(f"{t}{i}") for i in range(5)],)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.num_requests == 20
    assert server.most_in_flight == 4


@pytest.mark.parametrize("fault", ["http500", "drop", "lost", "corrupt", "cut", "full"])
def test_what_may_pass_is_asked_for_again(server: CaptureServer, open_engine: OpenEngine, fault: str) -> None:
    server.faults[fault] = 2
    engine = open_engine()
    assert_equals_fake(engine, [sample("a"), sample("b"), sample("c")])
    assert server.num_requests == 5
    engine.close()
    left = [path.name for path in server.directory.iterdir() if not path.name.startswith(".")]
    assert left == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("http500", "asked 6 times, HTTP 500: out of luck"),
        ("lost", "asked 6 times, .* did not appear within 0"),
        ("corrupt", "asked 6 times, checksum"),
        ("cut", "asked 6 times, .* bytes of data, expected"),
        ("full", "asked 6 times, no space left in .*; lower --requests-in-flight"),
    ],
)
def test_what_does_not_pass_is_an_error_in_the_end(
    server: CaptureServer, open_engine: OpenEngine, fault: str, message: str
) -> None:
    server.faults[fault] = 100
    with pytest.raises(CaptureError, match=f"sample a: {message}"):
        open_engine().capture([sample("a")])
    assert server.num_requests == 6


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no plugin", "the capture plugin is not at work in this server"),
        ("old plugin", "capture plugin 0.0.1, expected"),
        ("refused", "2 of 3 tokens were run"),
        ("http400", "HTTP 400: your fault"),
        ("wrong ids", "token 5 is .* in the reply, .* was sent"),
        ("wrong width", r"aux shape \(6, 3, 4\) != \(tokens, aux layers, hidden\) = \(6, 3, 8\)"),
        ("elsewhere", "on this host"),
    ],
)
def test_what_cannot_pass_is_an_error_at_once(
    server: CaptureServer, open_engine: OpenEngine, fault: str, message: str
) -> None:
    server.faults[fault] = 1 if fault != "elsewhere" else 100
    with pytest.raises(CaptureError, match=message):
        open_engine().capture([sample("a")])


def test_a_place_other_than_the_launched_servers_is_refused(server: CaptureServer) -> None:
    engine = RemoteEngine(Sglang(), INFO, [server.url], "tmpfs:/dev/shm/mine", 4, 1.0)
    with pytest.raises(CaptureError, match=r"stores to tmpfs:.*, expected tmpfs:/dev/shm/mine"):
        engine.capture([sample("a")])
    engine.close()


def test_samples_the_server_would_choke_on_are_not_sent(server: CaptureServer, open_engine: OpenEngine) -> None:
    engine = open_engine()
    mask = torch.ones(2, dtype=torch.bool)
    for ids, message in (([1, 97], "token ids 1..97, the vocabulary is 0..96"), ([-1, 5], "token ids -1..5")):
        with pytest.raises(CaptureError, match=message):
            engine.capture([TokenizedSample("bad", torch.tensor(ids), mask)])
    for length in (0, 65):
        with pytest.raises(CaptureError, match=f"{length} tokens, the target accepts 1 to 64"):
            engine.capture([sample("long", length)])
    assert server.num_requests == 0


def test_probe_takes_the_servers_limit_and_refuses_wrong_widths_layers_and_nan(
    server: CaptureServer, open_engine: OpenEngine
) -> None:
    server.facts["max_req_input_len"] = 40
    engine = open_engine()
    engine.probe()
    assert engine.info.max_length == 40
    with pytest.raises(CaptureError, match=r"aux shape \(16, 3, 8\) != .* = \(16, 3, 9\)"):
        open_engine(TargetInfo("sglang", 5, 9, 97, 64, (0, 1, 3))).probe()
    with pytest.raises(CaptureError, match=r"aux layers \[0, 1, 3\], expected \[0, 1, 2\]"):
        open_engine(TargetInfo("sglang", 5, 8, 97, 64, (0, 1, 2))).probe()
    server.faults["nan"] = 1
    with pytest.raises(CaptureError, match="not finite"):
        open_engine().probe()


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("version", "0.5.14", "sglang 0.5.14: supported are versions from 0.5.23"),
        ("version", "0.6.1", "sglang 0.6.1: supported are versions from 0.5.23 up to, not including, 0.6"),
        ("enable_return_aux_hidden_states", False, "without --enable-return-aux-hidden-states"),
        ("disable_radix_cache", False, "--disable-radix-cache"),
        ("chunked_prefill_size", 8192, "--chunked-prefill-size -1"),
        (
            "cuda_graph_config",
            {"decode": {"backend": "disabled"}, "prefill": {"backend": "breakable"}},
            r"CUDA graphs \(prefill: breakable\); start it with --cuda-graph-backend-decode disabled",
        ),
        ("cuda_graph_config", {"decode": {"backend": "full"}, "prefill": {"backend": "disabled"}}, "decode: full"),
        ("cuda_graph_config", None, "its report about itself is not understood"),
    ],
)
def test_probe_refuses_servers_that_cannot_capture(
    server: CaptureServer, open_engine: OpenEngine, fact: str, value: object, message: str
) -> None:
    server.facts[fact] = value
    with pytest.raises((EngineError, ConfigError), match=message):
        open_engine().probe()


def test_chunks_that_hold_a_whole_prompt_are_accepted(server: CaptureServer, open_engine: OpenEngine) -> None:
    server.facts |= {"chunked_prefill_size": 128, "prefill_max_requests": 1}
    open_engine().probe()
    server.facts["chunked_prefill_size"] = INFO.max_length - 1
    with pytest.raises(EngineError, match="sglang drops rows of chunks"):
        open_engine().probe()


def test_an_attached_server_that_comes_back_is_waited_for(server: CaptureServer, open_engine: OpenEngine) -> None:
    port = server.http.server_port
    engine = open_engine()
    engine.probe()
    server.close()
    again: list[CaptureServer] = []
    timer = threading.Timer(0.3, lambda: again.append(CaptureServer(server.directory, port).start()))
    timer.start()
    assert_equals_fake(engine, [sample("a"), sample("b")])
    timer.join()
    again[0].close()
    server.http = again[0].http  # for the fixture


def test_an_attached_server_that_stays_away_is_an_error_after_the_wait(
    server: CaptureServer, open_engine: OpenEngine
) -> None:
    engine = open_engine(minutes=0.01)
    server.close()
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer for 1s \(--dist-timeout\)"):
        engine.capture([sample("a")])
    assert 0.5 < time.monotonic() - start < 5


def test_with_several_servers_the_others_take_over(
    server: CaptureServer, open_engine: OpenEngine, tmp_path: Path
) -> None:
    second = CaptureServer(tmp_path / "second").start()
    engine = open_engine(urls=(server.url, second.url))
    engine.probe()
    assert_equals_fake(engine, [sample(f"s{i}") for i in range(8)])
    assert server.num_requests == second.num_requests == remote.NUM_PROBES + 4
    server.close()
    assert_equals_fake(engine, [sample(f"t{i}") for i in range(8)])
    second.close()
    server.http.server_close()


def test_close_ends_a_capture_that_hangs(server: CaptureServer, open_engine: OpenEngine) -> None:
    server.latency_s = 30
    engine = open_engine()
    errors: list[BaseException] = []

    def capture() -> None:
        try:
            engine.capture([sample("a")])
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=capture)
    thread.start()
    time.sleep(0.2)
    engine.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(errors) == 1
    with pytest.raises(EngineError, match="closed"):
        engine.capture([sample("a")])
    engine.close()


def section(tiny_target: Path, **values: object) -> TargetSection:
    return TargetSection(target_model_path=str(tiny_target), target_backend="sglang", **values)


def test_flags_of_a_launched_server_are_refused_when_attaching(tiny_target: Path) -> None:
    target = section(tiny_target, target_url=("h:1",), mem_frac=0.4)
    with pytest.raises(ConfigError, match="--mem-frac: the server at --target-url is not ours"):
        open_remote(Sglang(), target, EngineContext(64))


def test_auto_asks_the_server_what_it_is(server: CaptureServer, tiny_target: Path) -> None:
    target = section(tiny_target, target_url=(server.url,)).model_copy(update={"target_backend": "auto"})
    assert choose_backend(target) == "sglang"
    with pytest.raises(EngineError, match="nothing answers"):
        choose_backend(target.model_copy(update={"target_url": ("http://127.0.0.1:9",)}))


TARGET = TargetInfo("sglang", 8, 128, 4096, 512, (1, 3, 4))


def launch(gpu: bool, **values: object) -> Launch:
    where = {"python": "py", "host": "127.0.0.1", "port": 30000, "gpu": gpu}
    return Launch("of a test", "M", max_length=520, concurrency=32, **where, **values)


def test_sglang_flags() -> None:
    words = " ".join(Sglang().capture_command(launch(gpu=False, tp_size=2), TARGET))
    assert "--return-aux-hidden-state-layer-ids 1 3 4" in words
    assert "--disable-radix-cache --chunked-prefill-size -1" in words
    assert "--host 127.0.0.1 --port 30000 --tp-size 2" in words
    assert "--device cpu" in words
    gpu = " ".join(Sglang().capture_command(launch(gpu=True, mem_frac=0.4), TARGET))
    assert "--mem-fraction-static 0.4" in gpu
    assert "cpu" not in gpu
    for command in (words, gpu):
        assert "--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled" in command


def test_sglang_runs_whole_prompts_where_chunks_are_demanded() -> None:
    demanding = launch(True, engine_args=("moe_a2a_backend=flashinfer",))
    words = " ".join(Sglang().capture_command(demanding, TARGET))
    assert "--chunked-prefill-size 640 --prefill-max-requests 1" in words  # 520 tokens in pages of 128


def test_sglang_takes_an_attention_that_knows_float32_where_it_is_asked_for() -> None:
    assert "--attention-backend triton" in " ".join(Sglang().capture_command(launch(True, dtype="float32"), TARGET))
    assert "--attention-backend" not in " ".join(Sglang().capture_command(launch(True, dtype="bfloat16"), TARGET))


def test_vllm_flags_convert_layer_ids_and_add_the_last_state() -> None:
    words = Vllm().capture_command(launch(gpu=False), TARGET)
    config = words[words.index("--speculative-config") + 1]
    assert '"eagle_aux_hidden_state_layer_ids": [2, 4, 5, 8]' in config
    assert Vllm().output_layer_ids((2, 4, 5)) == (1, 3, 4)
    assert "--gpu-memory-utilization 0.4" in " ".join(Vllm().capture_command(launch(True, mem_frac=0.4), TARGET))


def test_engine_arguments_pass_through() -> None:
    assert engine_arg_words(("max_running_requests=32", "enable-metrics", "--x=a b=c")) == [
        "--max-running-requests", "32", "--enable-metrics", "--x", "a b=c",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="expected key=value"):
        engine_arg_words(("=3",))


def test_the_value_of_an_engine_argument() -> None:
    items = ("moe_a2a_backend=none", "--moe-a2a-backend=flashinfer", "enable-metrics", "last")
    assert engine_arg(items, "moe-a2a-backend") == "flashinfer"
    assert engine_arg(items, "enable-metrics") == engine_arg(items, "last") == ""
    assert engine_arg(items, "tp") is None


def test_cpu_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert cpu_thread_binding(2) == (4, "0,1,2,3|4,5,6,7")
    assert cpu_thread_binding(1) == (4, "0,1,2,3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpu_thread_binding(2) == (1, "0|4")
    with pytest.raises(ConfigError, match="tp_size 9: only 8 CPU cores"):
        cpu_thread_binding(9)
