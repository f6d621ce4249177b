"""Hidden states captured once to disk, and trained from as if an engine answered.

    OFFLINE_DIR/train/                        (and eval/)
      dataset/                  tokens, masks and ids: a copy of the dataset cache
      states_00000.safetensors  aux [N, A, H] and last [N, H] of samples first .. last, back to back, N tokens
      states_00000.json         its samples, a checksum of each, size and sha256; written after it
      manifest.json             target, layers, dtype, number of shards; written last

A killed capture continues with the shards that are missing or damaged. Reading maps the shards and checks each sample
as it is read, so that opening a large directory costs nothing.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from specforge_lite.capture.base import TargetEngine, TargetInfo, check_aux_layer_ids
from specforge_lite.capture.prefetch import Prefetcher, SkipBudget
from specforge_lite.capture.settings import CaptureSection
from specforge_lite.core.errors import CaptureError, ConfigError, DataError
from specforge_lite.core.files import (
    atomic_directory,
    remove_leftovers,
    save_tensors,
    sha256_of,
    user_errors,
    write_json,
)
from specforge_lite.core.log import format_bytes, info, progress, warn
from specforge_lite.data.store import TokenizedDataset
from specforge_lite.types import CapturedStates, TokenizedSample

FORMAT_VERSION = 1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Left free on the disk besides the predicted size.
RESERVE_BYTES = 64 << 20
TOKENS_PER_CAPTURE = 8192


@dataclass(frozen=True)
class OfflinePlan:
    """What a capture will write. shards: (first, last + 1) sample of each. num_bytes: predicted size on disk."""

    shards: list[tuple[int, int]]
    num_tokens: int
    num_bytes: int


def plan_capture(lengths: np.ndarray, target: TargetInfo, config: CaptureSection) -> OfflinePlan:
    """Cut samples of the given lengths into shards; tokens x (aux layers + 1) x hidden x bytes per value."""
    bytes_per_token = (len(target.aux_layer_ids) + 1) * target.hidden_size * DTYPES[config.states_dtype].itemsize
    shard_bytes = config.shard_mb << 20
    shards: list[tuple[int, int]] = []
    start, filled = 0, 0
    for index, length in enumerate(lengths.tolist()):
        if filled and (filled + length) * bytes_per_token > shard_bytes:
            shards.append((start, index))
            start, filled = index, 0
        filled += length
    if filled:
        shards.append((start, len(lengths)))
    tokens = int(lengths.sum())
    return OfflinePlan(shards, tokens, tokens * bytes_per_token)


def check_room(
    directory: Path, datasets: dict[str, TokenizedDataset], target: TargetInfo, config: CaptureSection
) -> None:
    """Print what a capture will take; raise ConfigError if that, less what is done already, exceeds the free disk."""
    total = done = 0
    for part, dataset in datasets.items():
        total += plan_capture(dataset.lengths, target, config).num_bytes
        done += sum(path.stat().st_size for path in (directory / part).glob("states_*.safetensors"))
    needed = max(0, total - done)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    left = f", {format_bytes(done)} of it is there already" if done else ""
    info(f"hidden states will take {format_bytes(total)} in {directory}{left}; {format_bytes(free)} are free")
    if needed + RESERVE_BYTES > free:
        raise ConfigError(
            f"{directory}: needs {format_bytes(needed)} (+ {format_bytes(RESERVE_BYTES)} reserve),"
            f" {format_bytes(free)} are free; use --states-dtype bf16, fewer samples, or train online"
        )


# ------------------------------------------------------------------------------------------------------------- capture


def capture_offline(dataset: TokenizedDataset, engine: TargetEngine, directory: Path, config: CaptureSection) -> None:
    """Write the states of every sample of `dataset` below `directory`, continuing what a killed run left.

    Raises ConfigError when `directory` holds the states of something else, DataError when the disk gets full.
    """
    target = engine.info
    plan = plan_capture(dataset.lengths, target, config)
    identity = {
        "format": FORMAT_VERSION,
        "data": dataset.fingerprint,
        "dtype": config.states_dtype,
        "shard_mb": config.shard_mb,
        "target": {key: value for key, value in asdict(target).items() if key != "engine"},
    }
    _claim(directory, identity)
    remove_leftovers(directory, held=True)
    todo = {number: span for number, span in enumerate(plan.shards) if not _is_complete(directory, number)}
    copy = directory / "dataset"
    if not copy.exists():
        with user_errors(copy), atomic_directory(copy, held=True) as temporary:
            shutil.copytree(dataset.directory, temporary, dirs_exist_ok=True)
    if done := len(plan.shards) - len(todo):
        info(f"{directory}: {done} of {len(plan.shards)} shards are complete already")
    skips = SkipBudget(config.skip_budget, len(dataset))
    skips.check_lengths(dataset.lengths.tolist(), target.max_length, str(directory))
    total = sum(int(dataset.lengths[slice(*span)].sum()) for span in todo.values())
    with progress(total, "capture", unit="tok", unit_scale=True) as bar:
        for number, span in todo.items():
            with Prefetcher(engine, _groups(dataset, *span), config.prefetch_depth, skips) as captured:
                facts, tensors = _collect(dataset, captured, target, span, DTYPES[config.states_dtype], bar)
            path = _shard(directory, number)
            with user_errors(path):
                save_tensors(tensors, path)
                facts |= {"size": path.stat().st_size, "sha256": sha256_of(path)}
                write_json(path.with_suffix(".json"), facts)
    checksums = [checksum for n in range(len(plan.shards)) for checksum in _read_facts(directory, n)["checksums"]]
    num_missing = checksums.count(None)
    write_json(directory / "manifest.json", identity | {"num_shards": len(plan.shards), "num_missing": num_missing})
    info(f"{directory}: {len(dataset) - num_missing} samples, {plan.num_tokens} tokens in {len(plan.shards)} shard(s)")


def _claim(directory: Path, identity: dict[str, Any]) -> None:
    """Note what this directory is for; refuse one that is for something else."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "capture.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key, value in json.loads(json.dumps(identity)).items() if before.get(key) != value]
        if different:
            key = different[0]
            raise ConfigError(
                f"{directory}: holds states with {key} {before.get(key)}, asked for {identity[key]};"
                " choose another directory"
            )
    elif any(not path.name.startswith(".") for path in directory.iterdir()):
        raise ConfigError(f"{directory}: is not empty and holds no captured states; choose another directory")
    else:
        write_json(path, identity)


def _collect(
    dataset: TokenizedDataset,
    captured: Prefetcher,
    target: TargetInfo,
    span: tuple[int, int],
    dtype: torch.dtype,
    bar: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and states of samples span[0] .. span[1]-1. checksums: one per sample, None for one that was refused."""
    tokens = int(dataset.lengths[slice(*span)].sum())
    aux = torch.zeros(tokens, len(target.aux_layer_ids), target.hidden_size, dtype=dtype)
    last = torch.zeros(tokens, target.hidden_size, dtype=dtype)
    start_of = {dataset.sample_id(index): start for index, start in _starts(dataset, *span)}
    checksums: dict[str, int | None] = dict.fromkeys(start_of)
    normed = True
    for samples, states in captured:
        for sample, state in zip(samples, states, strict=True):
            at = slice(start_of[sample.sample_id], start_of[sample.sample_id] + len(sample))
            aux[at], last[at] = state.aux_LAH.to("cpu", aux.dtype), state.last_LH.to("cpu", last.dtype)
            normed = state.last_is_normed
            checksums[sample.sample_id] = _checksum(aux[at], last[at])
            bar.update(len(sample))
    facts = {"first": span[0], "end": span[1], "last_is_normed": normed, "checksums": list(checksums.values())}
    return facts, {"aux": aux, "last": last}


def _groups(dataset: TokenizedDataset, first: int, end: int) -> Iterator[list[TokenizedSample]]:
    group: list[TokenizedSample] = []
    for index in range(first, end):
        group.append(dataset[index])
        if sum(len(sample) for sample in group) >= TOKENS_PER_CAPTURE:
            yield group
            group = []
    if group:
        yield group


def _starts(dataset: TokenizedDataset, first: int, end: int) -> Iterator[tuple[int, int]]:
    """(index, first token in its shard) of each sample of a shard."""
    lengths = dataset.lengths[first:end]
    return zip(range(first, end), (np.cumsum(lengths) - lengths).tolist(), strict=True)


def _is_complete(directory: Path, number: int) -> bool:
    """Whether the content of a shard has the hash of its sidecar."""
    path = _shard(directory, number)
    if not path.with_suffix(".json").exists():
        return False
    try:
        if _read_facts(directory, number)["sha256"] != sha256_of(path):
            raise DataError(f"{path}: its content changed since it was written")
    except DataError as error:
        warn(f"captured again: {error}")
        return False
    return True


def _shard(directory: Path, number: int) -> Path:
    return directory / f"states_{number:05d}.safetensors"


def _read_facts(directory: Path, number: int) -> dict[str, Any]:
    """Facts of a shard after checking its size. Raises DataError."""
    path = _shard(directory, number)
    try:
        facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size = path.stat().st_size
        if size != facts["size"]:
            raise DataError(f"{path}: {size} bytes, {facts['size']} were written")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {error}") from None
    return facts


def _checksum(aux: Tensor, last: Tensor) -> int:
    as_bytes = lambda x: memoryview(x.contiguous().view(torch.uint8).numpy())  # noqa: E731
    return zlib.crc32(as_bytes(last), zlib.crc32(as_bytes(aux)))


# ---------------------------------------------------------------------------------------------------------------- read


class OfflinePart:
    """The captured states of one dataset, by sample id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
            num_shards, target = manifest["num_shards"], manifest["target"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{directory}: no complete capture here ({error}); run scripts/capture_hidden_states.py"
            ) from None
        self.dataset = TokenizedDataset.open(directory / "dataset")
        self.info = TargetInfo(engine="offline", **{**target, "aux_layer_ids": tuple(target["aux_layer_ids"])})
        self._facts = [_read_facts(directory, number) for number in range(num_shards)]
        self._shards = [safe_open(_shard(directory, number), framework="pt") for number in range(num_shards)]
        # By sample id: its shard, first token there, index in the dataset, checksum.
        self._places: dict[str, tuple[int, int, int, int]] = {}
        for number, facts in enumerate(self._facts):
            starts = _starts(self.dataset, facts["first"], facts["end"])
            for (index, start), checksum in zip(starts, facts["checksums"], strict=True):
                if checksum is not None:
                    self._places[self.dataset.sample_id(index)] = (number, start, index, checksum)

    def holds(self, sample: TokenizedSample) -> bool:
        """Whether the states of this sample, these very tokens, are here."""
        place = self._places.get(sample.sample_id)
        return place is not None and torch.equal(self.dataset[place[2]].input_ids_L, sample.input_ids_L)

    def read(self, sample: TokenizedSample) -> CapturedStates:
        """States of a sample, copied out of the mapped shard. Raises DataError when they are not as written."""
        shard, start, _, checksum = self._places[sample.sample_id]
        aux, last = (self._shards[shard].get_slice(name)[start : start + len(sample)] for name in ("aux", "last"))
        if _checksum(aux, last) != checksum:
            path = _shard(self.directory, shard)
            raise DataError(f"{path}: states of sample {sample.sample_id} changed since they were written")
        normed = self._facts[shard]["last_is_normed"]
        return CapturedStates(sample.sample_id, sample.input_ids_L, aux, last, self.info.aux_layer_ids, normed)


class OfflineEngine:
    """A `TargetEngine` that reads captured states of one target; aux_layer_ids: some of the captured ones (None: all).

    Raises ConfigError for an aux layer that was not captured.
    """

    max_concurrency = 2

    def __init__(self, parts: Sequence[OfflinePart], aux_layer_ids: Sequence[int] | None = None) -> None:
        self.info = parts[0].info
        self._parts = parts
        for part in parts[1:]:
            if part.info != self.info:
                raise DataError(f"captured states of different targets: {part.info} and {self.info}")
        captured = self.info.aux_layer_ids
        wanted = captured if aux_layer_ids is None else check_aux_layer_ids(aux_layer_ids, self.info.num_layers)
        if missing := sorted(set(wanted) - set(captured)):
            raise ConfigError(
                f"aux_layer_ids {list(wanted)}: {parts[0].directory} holds layers {list(captured)}, not"
                f" {missing}; choose among these or capture again with --aux-layer-ids"
            )
        self._columns = [captured.index(layer) for layer in wanted]
        self.info = replace(self.info, aux_layer_ids=wanted)

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """Return the stored states. Raises CaptureError for a sample that was not captured."""
        states = []
        for sample in samples:
            part = next((part for part in self._parts if part.holds(sample)), None)
            if part is None:
                raise CaptureError(f"offline: sample {sample.sample_id} was not captured")
            states.append(part.read(sample))
        ids, columns = self.info.aux_layer_ids, self._columns
        if ids == self._parts[0].info.aux_layer_ids:
            return states
        return [replace(state, aux_LAH=state.aux_LAH[:, columns], aux_layer_ids=ids) for state in states]

    def close(self) -> None:
        """Nothing to stop."""
