"""What the plugin stores and what the trainer reads, byte for byte: the two ends share no code, so they are tested
against each other, and against files damaged by hand."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from specforge_lite.capture.remote import PLUGIN_VERSION
from specforge_lite.capture.transport import (
    FORMAT,
    LostSample,
    NoSpace,
    TmpfsTransport,
    check_space,
    decode,
    mooncake_address,
    open_transport,
)
from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.serving.environment import PLUGIN_DIR

sys.path.insert(0, str(PLUGIN_DIR))
from specforge_capture import VERSION, blob, sinks
from specforge_capture.writer import CaptureWriter

KEY = "0123456789abcdef" * 2
FACTS = {"key": KEY, "layer_ids": "1,3,4", "last_is_normed": "1"}


def states(length: int = 5, dtype: torch.dtype = torch.float32) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    aux = torch.randn(length, 3, 8, generator=generator).to(dtype)
    return list(range(7, 7 + length)), aux, torch.randn(length, 8, generator=generator).to(dtype)


def encoded(length: int = 5, dtype: torch.dtype = torch.float32) -> bytearray:
    return bytearray(b"".join(blob.Blob(*states(length, dtype), FACTS).buffers()))


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def take(transport: TmpfsTransport, key: str = KEY, timeout_s: float = 0.3):
    return asyncio.run(transport.take(key, timeout_s))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setenv(sinks.SWITCH, f"tmpfs:{directory}")
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 5, 1000])
def test_decode_returns_what_encode_was_given(length: int, dtype: torch.dtype) -> None:
    ids, aux, last = states(length, dtype)
    found = decode(encoded(length, dtype), KEY)
    assert found.input_ids_L.tolist() == ids
    assert torch.equal(found.aux_LAH, aux)
    assert found.aux_LAH.dtype == dtype
    assert torch.equal(found.last_LH, last)
    assert found.aux_layer_ids == (1, 3, 4)
    assert found.last_is_normed


def test_the_bytes_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "x").write_bytes(encoded())
    assert torch.equal(load_file(tmp_path / "x")["aux"], states()[1])


def test_every_damaged_byte_of_data_is_seen() -> None:
    good = encoded(1)
    data_start = 8 + int.from_bytes(good[:8], "little")
    for at in range(data_start, len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises(LostSample, match="checksum"):
            decode(bad, KEY)


def test_every_truncation_is_seen() -> None:
    good = encoded(1)
    for size in range(len(good)):
        with pytest.raises(LostSample):
            decode(good[:size], KEY)


def test_another_samples_bytes_and_other_formats_are_refused() -> None:
    with pytest.raises(LostSample, match="expected"):
        decode(encoded(), "f" * 32)
    header = json.dumps({"__metadata__": {"format": FORMAT}}).encode()
    with pytest.raises(LostSample, match="header"):
        decode(bytearray(len(header).to_bytes(8, "little") + header), KEY)


def test_a_partial_sample_is_never_written() -> None:
    ids, aux, last = states(5)
    with pytest.raises(ValueError, match="5 tokens, 4 aux rows, 5 last rows"):
        blob.Blob(ids, aux[:4], last, FACTS)


def test_versions_of_both_ends_agree() -> None:
    assert VERSION == PLUGIN_VERSION
    assert f'version = "{VERSION}"' in (PLUGIN_DIR / "pyproject.toml").read_text()
    assert blob.FORMAT == FORMAT


def test_tmpfs_takes_checks_and_deletes(place: Path) -> None:
    writer = CaptureWriter("sglang 0", (1, 3, 4), True).open()
    ids, aux, last = states()
    writer.submit(KEY, ids, aux, last)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / KEY).stat().st_mode) == 0o600
    assert writer.reply(KEY)["place"] == f"tmpfs:{place}"
    found = take(TmpfsTransport(str(place)))
    assert torch.equal(found.aux_LAH, aux)
    assert not (place / KEY).exists()
    found.aux_LAH.add_(1)  # a private copy of the pages: writable, and nobody else's


@pytest.mark.parametrize("has_xxhash", [True, False])
def test_both_checksums_are_read(has_xxhash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_xxhash:
        monkeypatch.setattr(blob, "xxhash", None)
    monkeypatch.setattr(blob, "CHUNK_BYTES", 100)
    good = encoded(20)
    assert decode(good, KEY).input_ids_L.tolist() == states(20)[0]
    good[-1] ^= 1
    with pytest.raises(LostSample, match="checksum"):
        decode(good, KEY)


@pytest.fixture
def slots_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots for small samples, too."""
    monkeypatch.setattr(sinks, "SLOT_BYTES", 0)


def slots(place: Path) -> list[str]:
    return [name for name in names(place) if name.startswith(".slot-")]


@pytest.mark.usefixtures("slots_for_all")
def test_a_slot_is_written_again_only_when_nobody_reads_it(place: Path) -> None:
    """The first sample's tensors stay what they were while any of them lives; then its memory serves the next."""
    writer, transport = CaptureWriter("sglang 0", (1, 3, 4), True).open(), TmpfsTransport(str(place))
    kept = []
    for number, length in enumerate((50, 40, 60)):
        writer.submit(f"{number:032x}", *states(length))
        kept.append(take(transport, f"{number:032x}").last_LH[1:])  # a view of a view
    assert len(slots(place)) == 3
    for rows, length in zip(kept, (50, 40, 60)):
        assert torch.equal(rows, states(length)[2][1:])
    del rows, kept[0]
    for number in range(3, 9):  # of other lengths than the slot had
        writer.submit(f"{number:032x}", *states(10 * number))
        assert torch.equal(take(transport, f"{number:032x}").aux_LAH, states(10 * number)[1])
    assert len(slots(place)) == 3
    assert torch.equal(kept[0], states(40)[2][1:])


@pytest.mark.usefixtures("slots_for_all")
def test_a_sample_that_waits_is_not_written_over(place: Path) -> None:
    writer = CaptureWriter("sglang 0", (1, 3, 4), True).open()
    for number in range(5):
        writer.submit(f"{number:032x}", *states(number + 1))
    for number in range(5):
        assert torch.equal(take(TmpfsTransport(str(place)), f"{number:032x}").aux_LAH, states(number + 1)[1])


@pytest.mark.usefixtures("slots_for_all")
def test_a_client_that_dies_frees_its_slots(place: Path) -> None:
    """It is killed between mapping and the rest of its life: the kernel frees lock and map."""
    writer = CaptureWriter("sglang 0", (1, 3, 4), True).open()
    writer.submit(KEY, *states(50))
    code = """
import asyncio, os, sys
from specforge_lite.capture.transport import TmpfsTransport
blob = asyncio.run(TmpfsTransport(sys.argv[1]).take(sys.argv[2], 5))
print("mapped", flush=True)
sys.stdin.read()
"""
    client = subprocess.Popen(
        [sys.executable, "-c", code, str(place), KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"mapped\n"
    writer.submit("1" * 32, *states(50))
    assert len(slots(place)) == 2
    client.kill()
    client.wait()
    writer.submit("2" * 32, *states(50))
    assert len(slots(place)) == 2


@pytest.mark.usefixtures("slots_for_all")
def test_free_slots_make_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full tmpfs: what only waits to be written again is given back before a sample is refused."""
    writer, transport = CaptureWriter("sglang 0", (1, 3, 4), True).open(), TmpfsTransport(str(place))
    writer.submit(KEY, *states(50))
    take(transport)
    pwrite, failures = os.pwrite, iter([True, False])

    def full_once(fd: int, data: memoryview, offset: int) -> int:
        if next(failures, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    other = TmpfsTransport(str(place))
    writer.submit("1" * 32, *states(50))  # a second slot
    held = take(other, "1" * 32)
    writer.submit("2" * 32, *states(10))
    take(transport, "2" * 32)
    monkeypatch.setattr(os, "pwrite", full_once)
    writer.submit("3" * 32, *states(20))
    assert torch.equal(take(transport, "3" * 32).aux_LAH, states(20)[1])
    assert torch.equal(held.aux_LAH, states(50)[1])


def test_only_large_samples_have_slots(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = blob.Blob(*states(50), {**CaptureWriter("sglang 0", (1, 3, 4), True)._facts, "key": KEY}).num_bytes
    monkeypatch.setattr(sinks, "SLOT_BYTES", size)
    writer, transport = CaptureWriter("sglang 0", (1, 3, 4), True).open(), TmpfsTransport(str(place))
    for number, length in enumerate((49, 50, 10)):
        writer.submit(f"{number:032x}", *states(length))
        take(transport, f"{number:032x}")
        assert len(slots(place)) == min(number, 1)
    assert names(place)[1:] == slots(place)


@pytest.mark.usefixtures("slots_for_all")
def test_idle_slots_are_deleted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, transport = CaptureWriter("sglang 0", (1, 3, 4), True).open(), TmpfsTransport(str(place))
    for number in range(4):
        writer.submit(f"{number:032x}", *states(50))
    for number in range(4):
        take(transport, f"{number:032x}")
    assert len(slots(place)) == 4
    monkeypatch.setattr(sinks, "IDLE_SLOT_SECONDS", 0.0)
    writer.submit(KEY, *states(50))
    assert len(slots(place)) == 1


@pytest.mark.usefixtures("slots_for_all")
def test_many_writers_at_once(place: Path) -> None:
    writer, transport = CaptureWriter("sglang 0", (1, 3, 4), True).open(), TmpfsTransport(str(place))

    def work(number: int) -> None:
        for turn in range(20):
            key, length = f"{number:016x}{turn:016x}", 1 + (number * 7 + turn) % 40
            writer.submit(key, *states(length))
            found = take(transport, key, 5)
            assert torch.equal(found.aux_LAH, states(length)[1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(slots(place)) <= 8 * 2


def test_a_late_file_is_waited_for(place: Path) -> None:
    place.mkdir(mode=0o700)

    async def both() -> torch.Tensor:
        transport = TmpfsTransport(str(place))
        waiting = asyncio.create_task(transport.take(KEY, 5))
        await asyncio.sleep(0.1)
        CaptureWriter("sglang 0", (1, 3, 4), True).open().submit(KEY, *states())
        return (await waiting).aux_LAH

    assert torch.equal(asyncio.run(both()), states()[1])


def test_a_file_that_never_comes_is_lost_after_the_timeout(place: Path) -> None:
    place.mkdir()
    start = time.monotonic()
    with pytest.raises(LostSample, match="did not appear"):
        take(TmpfsTransport(str(place)))
    assert 0.3 <= time.monotonic() - start < 2


def test_an_empty_file_is_lost_not_captured(place: Path) -> None:
    place.mkdir()
    (place / KEY).touch()
    with pytest.raises(LostSample, match="empty"):
        take(TmpfsTransport(str(place)))


def test_a_server_elsewhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(LostSample, match="on this host"):
        take(TmpfsTransport(str(tmp_path / "nowhere")))


def test_states_that_cannot_be_copied_are_told_at_once_and_nothing_is_raised(place: Path) -> None:
    """Whatever goes wrong in the server's own thread: the server goes on, and the client need not wait."""
    writer = CaptureWriter("sglang 0", (1, 3, 4), True).open()
    writer.submit(KEY, [1], None, None)  # no tensors at all
    assert [p.name for p in place.iterdir() if p.name.startswith(KEY)] == [f"{KEY}.FAILED"]
    with pytest.raises(LostSample):
        take(TmpfsTransport(str(place)))


def test_a_failure_that_cannot_be_told_is_not_raised_either(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CaptureWriter("sglang 0", (1, 3, 4), True).open()

    def broken(_sink: object, _key: str, _error: Exception) -> None:
        raise RuntimeError("the store is gone")

    monkeypatch.setattr(sinks.TmpfsSink, "fail", broken)
    writer.submit(KEY, [1], None, None)
    writer.fail(KEY, "layers differ")
    assert not [p for p in place.iterdir() if p.name.startswith(KEY)]


def test_no_space_is_told_through_a_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CaptureWriter("sglang 0", (1, 3, 4), True).open()

    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        writer.submit(KEY, *states())
    assert [p.name for p in place.iterdir() if p.name.startswith(KEY)] == [f"{KEY}.ENOSPC"]
    with pytest.raises(NoSpace):
        take(TmpfsTransport(str(place)))
    assert not [p for p in place.iterdir() if p.name.startswith(KEY)]


def test_a_partial_sample_is_told_at_once(place: Path) -> None:
    writer = CaptureWriter("sglang 0", (1, 3, 4), True).open()
    ids, aux, last = states()
    writer.submit(KEY, ids, aux[:2], last)
    start = time.monotonic()
    with pytest.raises(LostSample, match="FAILED"):
        take(TmpfsTransport(str(place)), timeout_s=10)
    assert time.monotonic() - start < 2


def test_keys_that_are_no_keys_write_nothing(place: Path) -> None:
    writer = CaptureWriter("sglang 0", (1, 3, 4), True).open()
    for key in ("../escape", "x" * 32, KEY + "0", ""):
        writer.submit(key, *states())
        writer.fail(key, "no")
    assert [p.name for p in place.iterdir()] == [".server"]
    assert list(place.parent.iterdir()) == [place]


def test_unclaimed_files_are_deleted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = sinks.TmpfsSink(str(place))
    sink.put(KEY, blob.Blob(*states(), FACTS))
    monkeypatch.setattr(sinks, "UNCLAIMED_SECONDS", 0.0)
    time.sleep(0.01)
    sink.put("f" * 32, blob.Blob(*states(), FACTS))
    assert names(place) == [".server", "f" * 32]


def test_a_new_server_clears_what_a_dead_one_left_but_not_a_living_ones(place: Path) -> None:
    place.mkdir(mode=0o700)
    for name in (KEY, f"{KEY}.ENOSPC", ".slot-1-00ff", "somebody's file"):
        (place / name).write_text("x")
    first = sinks.TmpfsSink(str(place))
    assert sorted(p.name for p in place.iterdir()) == [".server", "somebody's file"]
    first.put(KEY, blob.Blob(*states(), FACTS))
    sinks.TmpfsSink(str(place))
    assert (place / KEY).exists()


def test_a_directory_others_can_read_is_refused(place: Path) -> None:
    place.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="0700"):
        sinks.TmpfsSink(str(place))


def test_switch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sinks.SWITCH, raising=False)
    assert sinks.open_sink() is None
    monkeypatch.setenv(sinks.SWITCH, "nfs:/x")
    with pytest.raises(ValueError, match="expected tmpfs:DIRECTORY"):
        sinks.open_sink()


def test_space_is_checked_with_the_arithmetic(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(EngineError, match=r"MiB free, \d+ MiB needed"):
        check_space(tmp_path, 1 << 60)


@pytest.mark.parametrize(
    ("text", "full"),
    [("10.0.0.1:50051", "tcp://10.0.0.1:50051"), ("rdma://h:1/mlx5_0", "rdma://h:1/mlx5_0")],
)
def test_mooncake_addresses(text: str, full: str) -> None:
    assert mooncake_address(text) == full


@pytest.mark.parametrize("text", [None, "", "host", "http://h:1", "tcp://h", "tcp://h:x"])
def test_bad_mooncake_addresses_are_refused(text: str | None) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        mooncake_address(text)


def test_unknown_places_are_refused() -> None:
    with pytest.raises(EngineError, match="expected tmpfs:DIRECTORY"):
        open_transport("nfs:/x")
