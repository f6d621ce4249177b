"""What the plugin stores and what the trainer reads, byte for byte: the two ends share no code, so they are tested
against each other, and against files damaged by hand."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import sys
import time
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
    return bytearray(b"".join(blob.encode(*states(length, dtype), FACTS)))


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
    assert found.layer_ids == (1, 3, 4)
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
        blob.encode(ids, aux[:4], last, FACTS)


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

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
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
    sink.put(KEY, [memoryview(b"old")])
    monkeypatch.setattr(sinks, "UNCLAIMED_SECONDS", 0.0)
    time.sleep(0.01)
    sink.put("f" * 32, [memoryview(b"new")])
    assert sorted(p.name for p in place.iterdir()) == [".server", "f" * 32]


def test_a_new_server_clears_what_a_dead_one_left_but_not_a_living_ones(place: Path) -> None:
    place.mkdir(mode=0o700)
    for name in (KEY, f"{KEY}.part", "somebody's file"):
        (place / name).write_text("x")
    first = sinks.TmpfsSink(str(place))
    assert sorted(p.name for p in place.iterdir()) == [".server", "somebody's file"]
    first.put(KEY, [memoryview(b"x")])
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
