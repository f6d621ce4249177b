"""The cache: what it is keyed by, that damage is found, that two may build it, and what it says."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from specforge_lite.core import files
from specforge_lite.core.errors import DataError
from specforge_lite.core.sections import DataSection
from specforge_lite.data import cache, store
from specforge_lite.data.cache import open_or_build_dataset
from specforge_lite.data.conversations import to_conversation
from specforge_lite.data.store import CacheDamaged, StoreWriter, TokenizedDataset
from specforge_lite.data.vocab import count_supervised_tokens, open_or_build_vocab_map
from tests.data_tokenizers import byte_level, tokenize_conversation

ROWS = [{"id": f"r{i}", "prompt": f"Hi {i}", "response": "It is " * (i % 7 + 1)} for i in range(200)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", ROWS)


def section(tmp_path: Path, **options: Any) -> DataSection:
    return DataSection(cache_dir=tmp_path / "cache", **{"chat_template": "chatml", "max_length": 64, **options})


def caches(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))


# ------------------------------------------------------------------------------------------------------------- content


def test_samples_are_what_tokenization_gives(tmp_path: Path, data: Path) -> None:
    dataset = open_or_build_dataset(data, byte_level(), section(tmp_path))
    assert len(dataset) == 200
    for index in (0, 1, 137, -1):
        expected = tokenize_conversation(to_conversation(ROWS[index]), byte_level(), "chatml", 64)
        sample = dataset[index]
        assert sample.sample_id == expected.sample_id == ROWS[index]["id"]
        assert torch.equal(sample.input_ids_L, expected.input_ids_L)
        assert torch.equal(sample.loss_mask_L, expected.loss_mask_L)
        assert (sample.input_ids_L.dtype, sample.loss_mask_L.dtype) == (torch.int64, torch.bool)
    samples = dataset[:]
    assert dataset.lengths.tolist() == [len(sample) for sample in samples]
    assert dataset.supervised_counts.tolist() == [int(sample.loss_mask_L.sum()) for sample in samples]
    assert (dataset.line(0), dataset.line(199)) == (1, 200)
    with pytest.raises(IndexError):
        dataset[200]


def test_samples_can_be_written_to(tmp_path: Path, data: Path) -> None:
    dataset = open_or_build_dataset(data, byte_level(), section(tmp_path))
    dataset[0].input_ids_L.zero_()
    dataset[0].loss_mask_L.zero_()
    assert int(dataset[0].input_ids_L.sum()) > 0


def test_many_processes_give_the_same_bytes(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALL_FILE_BYTES", 0)
    one = open_or_build_dataset(data, byte_level(), section(tmp_path))
    two = open_or_build_dataset(data, byte_level(), section(tmp_path / "other", build_num_proc=2))
    assert one.fingerprint == two.fingerprint
    manifests = [json.loads((dataset.directory / "manifest.json").read_text()) for dataset in (one, two)]
    assert manifests[0] == manifests[1]


def test_memory_is_not_that_of_the_data(tmp_path: Path, data: Path) -> None:
    dataset = open_or_build_dataset(data, byte_level(), section(tmp_path))
    assert isinstance(dataset.token_arrays()[0], np.memmap)
    assert dataset.token_arrays()[0].dtype == np.int32


# --------------------------------------------------------------------------------------------------------------- key


def test_found_again_wherever_the_file_lies(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_or_build_dataset(data, byte_level(), section(tmp_path))
    moved = data.rename(tmp_path / "moved.json")
    monkeypatch.setattr(cache, "_build", None)  # would fail if it were called
    second = open_or_build_dataset(moved, byte_level(), section(tmp_path, build_num_proc=3))
    assert second.directory == first.directory


def test_every_option_and_every_byte_counts(tmp_path: Path, data: Path) -> None:
    tokenizer = byte_level()
    base = open_or_build_dataset(data, tokenizer, section(tmp_path))
    prints = {base.fingerprint}
    for options in (
        {"max_length": 32},
        {"train_only_last_turn": True},
        {"system_prompt": "Be"},
        {"chat_template": "qwen2.5"},
    ):
        prints.add(open_or_build_dataset(data, tokenizer, section(tmp_path, **options)).fingerprint)
    prints.add(open_or_build_dataset(data, byte_level(extra=("<x>",)), section(tmp_path)).fingerprint)
    data.write_text(data.read_text().replace("Hi 7", "Hi 8", 1))
    prints.add(open_or_build_dataset(data, tokenizer, section(tmp_path)).fingerprint)
    assert len(prints) == 7
    assert len(caches(tmp_path)) == 7
    same = open_or_build_dataset(
        data, tokenizer, section(tmp_path, fim_order="spm")
    )  # says nothing about conversations
    assert same.fingerprint in prints


def test_a_cache_of_something_else_is_refused(tmp_path: Path, data: Path) -> None:
    one = open_or_build_dataset(data, byte_level(), section(tmp_path))
    other = open_or_build_dataset(data, byte_level(), section(tmp_path, max_length=32))
    with pytest.raises(DataError, match="built with max_length 32, expected 64"):
        TokenizedDataset.open(other.directory, one.key)


def test_the_data_file_is_read_again_only_when_it_changed(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_or_build_dataset(data, byte_level(), section(tmp_path))
    monkeypatch.setattr(cache, "sha256_of", None)  # would fail if it were called
    assert open_or_build_dataset(data, byte_level(), section(tmp_path)).directory == first.directory
    monkeypatch.undo()
    os.utime(data, ns=(1, 1))
    assert open_or_build_dataset(data, byte_level(), section(tmp_path)).directory == first.directory


def test_a_start_reads_a_sample_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, and the first and last MiB of each file: not one byte more, however large the cache."""
    writer = StoreWriter(tmp_path)
    ids = np.arange(1 << 20, dtype=np.int32)
    for index in range(3):
        writer.add(str(index), index, ids, ids > 0)
    writer.finish({"a": 1})
    read: list[int] = []
    original = files.quick_fingerprint
    monkeypatch.setattr(store, "sha256_of", None)
    monkeypatch.setattr(store, "quick_fingerprint", lambda path: (read.append(1), original(path))[1])
    assert len(TokenizedDataset.open(tmp_path)) == 3
    assert len(read) == 7
    with open(tmp_path / "input_ids.bin", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(CacheDamaged, match=r"input_ids\.bin: missing, or changed since it was written"):
        TokenizedDataset.open(tmp_path)


def test_samples_longer_than_the_drafts_positions_are_counted(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_or_build_dataset(data, byte_level(), section(tmp_path))
    longest = int(dataset.lengths.max())
    capsys.readouterr()
    dataset.warn_beyond(longest)
    assert capsys.readouterr().err == ""
    dataset.warn_beyond(longest - 1)
    count = int((dataset.lengths == longest).sum())
    assert f"{count} of 200 samples are longer than the draft's {longest - 1} positions" in capsys.readouterr().err


def test_what_is_read_back_otherwise_than_written_is_found_when_it_is_built(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    writer.add("a", 1, np.arange(9, dtype=np.int32), np.ones(9, dtype=bool))
    writer.close()
    content = (tmp_path / "input_ids.bin").read_bytes()
    (tmp_path / "input_ids.bin").write_bytes(content[:-1] + b"x")
    with pytest.raises(CacheDamaged, match="read back otherwise than it was written"):
        writer.finish({})


# ---------------------------------------------------------------------------------------------------- damage, several


def test_damage_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS[:20])
    dataset = open_or_build_dataset(data, byte_level(), section(tmp_path))
    directory, chooser = dataset.directory, random.Random(0)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert len(before) == 8
    for name, content in before.items():
        position = chooser.randrange(len(content))
        flipped = bytes([content[position] ^ (1 << chooser.randrange(8))])
        for damaged in (content[:-1], content[:position] + flipped + content[position + 1 :], None):
            if damaged is None:
                (directory / name).unlink()
            else:
                (directory / name).write_bytes(damaged)
            with pytest.raises(CacheDamaged, match=name):
                TokenizedDataset.open(directory)
            capsys.readouterr()
            again = open_or_build_dataset(data, byte_level(), section(tmp_path))
            assert "cache is damaged and built again" in capsys.readouterr().err
            assert {path.name: path.read_bytes() for path in again.directory.iterdir()} == before
    assert caches(tmp_path) == [directory]
    assert not list((tmp_path / "cache").glob(".*tmp*"))


BUILD = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace
    from tokenizers import Tokenizer
    from specforge_lite.core.sections import DataSection
    from specforge_lite.data.cache import open_or_build_dataset

    backend = Tokenizer.from_file({tokenizer!r})
    tokenizer = SimpleNamespace(backend_tokenizer=backend, special_tokens_map={{}}, chat_template=None)
    section = DataSection(cache_dir=Path({cache!r}), chat_template="chatml", max_length=64)
    print("ready", flush=True)
    sys.stdin.readline()
    print(open_or_build_dataset({data!r}, tokenizer, section).fingerprint)
"""


def start_build(tmp_path: Path, data: Path) -> subprocess.Popen[str]:
    byte_level().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer": tmp_path / "tokenizer.json", "cache": tmp_path / "cache", "data": data}
    code = textwrap.dedent(BUILD).format(**{name: str(path) for name, path in names.items()})
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_at_once_and_one_that_is_killed(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{**ROWS[i % 200], "id": i} for i in range(2500)])
    victim, *others = [start_build(tmp_path, data) for _ in range(3)]
    for process in (victim, *others):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    assert victim.stdin is not None
    victim.stdin.write("\n")
    victim.stdin.flush()
    while not list((tmp_path / "cache").glob(".dataset-*.tmp-*/input_ids.bin")):  # in the middle of writing
        assert victim.poll() is None
    victim.kill()
    victim.communicate()
    results = []
    for process in others:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in others:
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        results.append(output.splitlines())
    assert results[0][-1] == results[1][-1]
    assert len(caches(tmp_path)) == 1
    assert not list((tmp_path / "cache").glob(".*tmp*"))
    waited = [any(line.startswith("waiting for another process") for line in result) for result in results]
    built = json.loads((caches(tmp_path)[0] / "manifest.json").read_text())
    assert built["stats"]["num_samples"] == 2500
    assert sum(waited) <= 1


def test_an_error_leaves_nothing_behind(tmp_path: Path, data: Path) -> None:
    with open(data, "a", encoding="utf-8") as file:
        file.write('{"prompt": 7}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:201: turn 1: expected text, found a number \(scripts/prepare"):
        open_or_build_dataset(data, byte_level(), section(tmp_path))
    assert caches(tmp_path) == []
    assert not list((tmp_path / "cache").glob(".*tmp*"))


def test_a_cache_directory_that_cannot_be_written(tmp_path: Path, data: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache.*: (File exists|Not a directory)"):
        open_or_build_dataset(data, byte_level(), section(tmp_path))


# ---------------------------------------------------------------------------------------------------------- statistics


def test_rows_without_anything_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    rows: list[Any] = [
        {"id": "fine", "prompt": "Hi", "response": "It is"},
        *[{"id": f"prompt{i}", "prompt": f"Hi {i}"} for i in range(7)],
        {"id": "long", "prompt": "0 " * 50, "response": "It"},
        {"id": "calls", "messages": tool},
        {"id": "fine", "prompt": "Hi again", "response": "It is " * 50},
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    dataset = open_or_build_dataset(data, byte_level(), section(tmp_path, chat_template="gemma"))
    assert [sample.sample_id for sample in dataset] == ["fine", "fine#11"]
    stats = dataset.stats
    assert (stats.num_rows, stats.num_samples, stats.num_truncated, stats.num_renamed) == (11, 2, 2, 1)
    assert stats.notes == {"without_span": 7, "span_cut_off": 1, "refused": 1}
    assert stats.examples["without_span"] == [f"prompt{i}" for i in range(5)]
    assert stats.num_tokens == int(dataset.lengths.sum())
    assert stats.supervised_share == dataset.supervised_counts.sum() / dataset.lengths.sum()
    captured = capsys.readouterr()
    assert "2 samples of 11 rows" in captured.out
    warnings = captured.err
    assert (
        "7 rows without an assistant span were left out (e.g. prompt0, prompt1, prompt2, prompt3, prompt4)" in warnings
    )
    assert "1 rows were left out: --max-length cuts off all of their answer (e.g. long)" in warnings
    assert "1 rows were left out: the chat template has no form for them (e.g. calls: template 'gemma' has" in warnings


def test_what_has_no_effect_and_what_is_lost_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"role": "assistant", "content": "It", "weight": 0.5, "reasoning_content": "Why"}
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": "Hi"}, answer]} for i in range(3)]
    dataset = open_or_build_dataset(write_rows(tmp_path / "d.jsonl", rows), byte_level(), section(tmp_path))
    assert len(dataset) == 3
    warnings = capsys.readouterr().err
    assert "fields without effect: weight 0.5 (3 rows); a turn with weight 0 is not trained" in warnings
    assert "3 rows are trained without the reasoning of their last answer" in warnings


def test_nothing_to_train_at_all(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"id": "p", "prompt": "Hi"}])
    with pytest.raises(DataError, match=r"d\.jsonl: nothing to train on: 1 rows without an assistant span"):
        open_or_build_dataset(data, byte_level(), section(tmp_path))
    assert caches(tmp_path) == []


def test_a_template_unlike_the_tokenizers_own_is_told(
    tmp_path: Path, data: Path, capsys: Any, tiny_target: Path
) -> None:
    from specforge_lite.core.hub import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_target))
    open_or_build_dataset(data, tokenizer, section(tmp_path, chat_template="chatml"))
    assert "renders other text" not in capsys.readouterr().err
    open_or_build_dataset(data, tokenizer, section(tmp_path, chat_template="qwen2.5"))
    assert "'qwen2.5' renders other text than the tokenizer's own (without a system prompt, at character" in (
        capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------------------------- formats, FIM


def test_fim_is_recognised_and_mixing_is_refused(tmp_path: Path, tiny_target: Path) -> None:
    from specforge_lite.core.hub import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_target))
    fim = [{"id": str(i), "prefix": "def f():\n", "middle": f"    return {i}\n", "suffix": ""} for i in range(3)]
    dataset = open_or_build_dataset(write_rows(tmp_path / "f.jsonl", fim), tokenizer, section(tmp_path))
    assert dataset.key["format"] == "fim"
    assert dataset.key["template"] == "fim-qwen2.5-coder-psm"
    sample = dataset[2]
    assert tokenizer.decode(sample.input_ids_L[sample.loss_mask_L]) == "    return 2\n<|endoftext|>"
    mixed = write_rows(tmp_path / "m.jsonl", [*fim, ROWS[0]])
    with pytest.raises(DataError, match=r"m\.jsonl:4: a chat row in a file of FIM rows; expected one format per file"):
        open_or_build_dataset(mixed, tokenizer, section(tmp_path))
    mixed = write_rows(tmp_path / "m.jsonl", [ROWS[0], fim[0]])
    with pytest.raises(DataError, match=r"m\.jsonl:2: a fill-in-the-middle row in a file of conversations"):
        open_or_build_dataset(mixed, tokenizer, section(tmp_path))
    with pytest.raises(DataError, match=r"f\.jsonl:1: a fill-in-the-middle row"):
        open_or_build_dataset(tmp_path / "f.jsonl", tokenizer, section(tmp_path, data_format="chat"))


# ------------------------------------------------------------------------------------------------------ vocabulary map


def test_vocabulary_map_of_a_dataset(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level()
    dataset = open_or_build_dataset(data, tokenizer, section(tmp_path))
    counts = [0] * 1000
    for sample in dataset:
        for token in sample.input_ids_L[sample.loss_mask_L].tolist():
            counts[token] += 1
    assert count_supervised_tokens(dataset, 1000).tolist() == counts
    capsys.readouterr()
    vocab_map = open_or_build_vocab_map(dataset, 6, 1000, tmp_path / "cache")
    best = sorted(sorted(range(1000), key=lambda i: (-counts[i], i))[:6])
    assert (vocab_map.d2t + torch.arange(len(vocab_map.d2t))).tolist() == best
    assert vocab_map.fingerprint == dataset.fingerprint
    share = sum(counts[i] for i in best) / sum(counts)
    assert f"draft vocabulary: 6 of 1,000 tokens cover {share:.2%} of the supervised tokens" in capsys.readouterr().out
    (file,) = (tmp_path / "cache").glob("vocab-*")
    stamp = file.stat().st_mtime_ns
    open_or_build_vocab_map(dataset, 6, 1000, tmp_path / "cache")
    assert file.stat().st_mtime_ns == stamp


def test_a_vocabulary_map_of_other_data_is_built_again(tmp_path: Path, data: Path, capsys: Any) -> None:
    dataset = open_or_build_dataset(data, byte_level(), section(tmp_path))
    vocab_map = open_or_build_vocab_map(dataset, 6, 1000, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("vocab-*")
    save_file({"d2t": vocab_map.d2t, "t2d": vocab_map.t2d}, file, {"fingerprint": "other", "coverage": "0.5"})
    again = open_or_build_vocab_map(dataset, 6, 1000, tmp_path / "cache")
    assert again.fingerprint == dataset.fingerprint
    assert "vocabulary map is built again" in capsys.readouterr().err
    os.truncate(file, 10)
    assert open_or_build_vocab_map(dataset, 6, 1000, tmp_path / "cache").coverage == vocab_map.coverage


def test_token_ids_beyond_the_targets_vocabulary(tmp_path: Path, data: Path) -> None:
    dataset = open_or_build_dataset(data, byte_level(), section(tmp_path))
    with pytest.raises(DataError, match=r"token id \d+ in the data >= vocab_size 100 of the target"):
        open_or_build_vocab_map(dataset, 6, 100, tmp_path / "cache")
