"""The vocabulary map: counted by hand, for any counts, and fast enough."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from specforge_lite.core.errors import DataError
from specforge_lite.data.vocab import VocabMap, build_vocab_map, check_vocab_map


def test_by_hand() -> None:
    #                  id  0  1  2  3  4  5  6  7
    counts = np.array([0, 5, 0, 2, 9, 2, 0, 2])
    vocab_map = build_vocab_map(counts, 8, 3, "f")  # 9 and 5, then the lowest of those with 2
    assert (vocab_map.d2t + torch.arange(len(vocab_map.d2t))).tolist() == [1, 3, 4]
    assert vocab_map.d2t.tolist() == [1, 2, 2]
    assert vocab_map.d2t.dtype == torch.int64
    assert vocab_map.t2d.tolist() == [False, True, False, True, True, False, False, False]
    assert vocab_map.coverage == 16 / 20
    assert vocab_map.fingerprint == "f"


def test_unused_ids_fill_up_lowest_first() -> None:
    counts = np.array([0, 5, 0, 0, 9, 0, 0, 2])
    vocab_map = build_vocab_map(counts, 8, 6, "f")
    assert (vocab_map.d2t + torch.arange(len(vocab_map.d2t))).tolist() == [0, 1, 2, 3, 4, 7]
    assert vocab_map.coverage == 1.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_any_counts(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(counts)))
    vocab_map = build_vocab_map(np.array(counts), len(counts), size, "f")
    chosen = sorted(sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:size])  # the plain definition
    assert (vocab_map.d2t + torch.arange(len(vocab_map.d2t))).tolist() == chosen
    assert vocab_map.t2d.nonzero().flatten().tolist() == chosen
    check_vocab_map(vocab_map.d2t, vocab_map.t2d, "x")
    assert vocab_map.coverage == pytest.approx(sum(counts[i] for i in chosen) / max(sum(counts), 1))


def test_impossible_sizes() -> None:
    for size in (0, 9):
        with pytest.raises(DataError, match=rf"draft_vocab_size {size} is not in 1\.\.vocab_size 8"):
            build_vocab_map(np.zeros(8, dtype=np.int64), 8, size, "f")
    with pytest.raises(DataError, match="counts of 7 tokens != vocab_size 8"):
        build_vocab_map(np.zeros(7, dtype=np.int64), 8, 2, "f")


def test_save_and_load(tmp_path: Path) -> None:
    vocab_map = build_vocab_map(np.arange(10), 10, 4, "print")
    vocab_map.save(tmp_path / "map.safetensors")
    loaded = VocabMap.load(tmp_path / "map.safetensors")
    assert torch.equal(loaded.d2t, vocab_map.d2t)
    assert torch.equal(loaded.t2d, vocab_map.t2d)
    assert (loaded.fingerprint, loaded.coverage) == ("print", vocab_map.coverage)
    assert [path.name for path in tmp_path.iterdir()] == ["map.safetensors"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    vocab_map = build_vocab_map(np.arange(10), 10, 4, "print")
    vocab_map.save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], b"not safetensors"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a vocabulary map"):
            VocabMap.load(path)
    metadata = {"fingerprint": "print", "coverage": "1.0"}
    save_file({"d2t": vocab_map.d2t, "t2d": ~vocab_map.t2d}, path, metadata)
    with pytest.raises(DataError, match=r"d2t \(4 ids\) and t2d \(6 ids\) name different target ids"):
        VocabMap.load(path)
    save_file({"d2t": vocab_map.d2t.int(), "t2d": vocab_map.t2d}, path, metadata)
    with pytest.raises(DataError, match=r"d2t torch\.int32"):
        VocabMap.load(path)


def test_a_large_vocabulary_is_quick() -> None:
    counts = np.random.default_rng(0).zipf(1.3, 128_256) % 1000
    build_vocab_map(counts, 128_256, 32_000, "f")
    start = time.process_time()
    vocab_map = build_vocab_map(counts, 128_256, 32_000, "f")
    assert time.process_time() - start < 0.2
    assert vocab_map.d2t.shape == (32_000,)
