"""The tokenized dataset on disk: flat arrays that are memory-mapped, and a manifest that proves them whole.

    input_ids.bin int32 [N]   loss_mask.bin bool [N]   offsets.bin int64 [S+1]   supervised.bin int64 [S]
    lines.bin int64 [S]       sample_ids.bin utf-8     sample_id_offsets.bin int64 [S+1]     manifest.json

N tokens of all samples, S samples. Sample i is tokens offsets[i] .. offsets[i+1]-1, from line lines[i] of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from specforge_lite.core import log
from specforge_lite.core.errors import DataError
from specforge_lite.core.files import key_digest, quick_fingerprint, sha256_of
from specforge_lite.types import TokenizedSample

FORMAT = 2
NUM_EXAMPLES = 5
_DTYPES = {
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "offsets": np.int64,
    "supervised": np.int64,
    "lines": np.int64,
    "sample_ids": np.uint8,
    "sample_id_offsets": np.int64,
}


class CacheDamaged(DataError):
    """A cache whose bytes are not those that were written: truncated, changed, or without its manifest."""


# Kinds of rows that a person should know about before training, and what is said of them.
NOTES = {
    "without_span": "without an assistant span were left out",
    "span_cut_off": "were left out: --max-length cuts off all of their answer",
    "refused": "were left out: the chat template has no form for them",
    "lost_reasoning": "are trained without the reasoning of their last answer: the chat template has no place for it",
}


@dataclass
class DatasetStats:
    """What became of the rows of a file. notes: rows of each kind in NOTES; examples: the first few of them, an id and,
    where there is one, the reason. ignored: fields without effect -> rows that have them."""

    num_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_truncated: int = 0
    num_renamed: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)

    @property
    def supervised_share(self) -> float:
        return self.num_supervised / max(self.num_tokens, 1)

    def note(self, kind: str, example: str) -> None:
        self.notes[kind] = self.notes.get(kind, 0) + 1
        if len(self.examples.setdefault(kind, [])) < NUM_EXAMPLES:
            self.examples[kind].append(example)

    def summary(self) -> str:
        return (
            f"{self.num_samples:,} samples of {self.num_rows:,} rows, {self.num_tokens:,} tokens,"
            f" {self.supervised_share:.1%} supervised, {self.num_truncated:,} truncated"
        )

    def warnings(self) -> list[str]:
        """What a person should know before training on this."""
        lines = [
            f"{self.notes[kind]:,} rows {text} (e.g. {', '.join(self.examples[kind])})"
            for kind, text in NOTES.items()
            if kind in self.notes
        ]
        return lines + ignored_warning(self.ignored)


def ignored_warning(ignored: dict[str, int]) -> list[str]:
    """A line about fields without effect, where there are any."""
    fields = ", ".join(f"{name} ({count:,} rows)" for name, count in sorted(ignored.items()))
    return [f"fields without effect: {fields}; a turn with weight 0 is not trained"] if ignored else []


class StoreWriter:
    """Appends samples to the arrays of an empty directory; memory is that of the sample ids' hashes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, BinaryIO] = {name: open(directory / f"{name}.bin", "wb") for name in _DTYPES}  # noqa: SIM115
        self._hashes = {name: hashlib.sha256() for name in _DTYPES}
        self._num_id_bytes = 0
        self._seen: set[bytes] = set()
        self.stats = DatasetStats()
        self._put(offsets=[0], sample_id_offsets=[0])

    def add(self, sample_id: str, line: int, input_ids: np.ndarray, loss_mask: np.ndarray) -> None:
        """Append one sample: ids [L] and mask [L]. An id that came before gets its line number appended."""
        digest = hashlib.blake2b(sample_id.encode("utf-8"), digest_size=12).digest()
        if digest in self._seen:
            sample_id = f"{sample_id}#{line}"
            self.stats.num_renamed += 1
        self._seen.add(digest)
        name = np.frombuffer(sample_id.encode("utf-8"), dtype=np.uint8)
        supervised = int(loss_mask.sum())
        self.stats.num_samples += 1
        self.stats.num_tokens += len(input_ids)
        self.stats.num_supervised += supervised
        self._num_id_bytes += len(name)
        self._put(input_ids=input_ids, loss_mask=loss_mask, offsets=[self.stats.num_tokens], supervised=[supervised])
        self._put(lines=[line], sample_ids=name, sample_id_offsets=[self._num_id_bytes])

    def _put(self, **arrays: Any) -> None:
        for name, values in arrays.items():
            data = np.asarray(values, dtype=_DTYPES[name]).tobytes()
            self._files[name].write(data)
            self._hashes[name].update(data)

    def finish(self, key: dict[str, Any]) -> None:
        """Close the arrays, read them once to see that they are as written, and write the manifest."""
        self.close()
        files = {}
        for name, digest in self._hashes.items():
            path = self._directory / f"{name}.bin"
            if sha256_of(path) != digest.hexdigest():
                raise CacheDamaged(f"{path}: read back otherwise than it was written; is the disk sound?")
            files[name] = {"fingerprint": quick_fingerprint(path), "sha256": digest.hexdigest()}
        manifest = {"format": FORMAT, "key": key, "files": files, "stats": dataclasses.asdict(self.stats)}
        manifest["check"] = key_digest(manifest)
        (self._directory / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def close(self) -> None:
        """Close the arrays; may be called twice."""
        for file in self._files.values():
            file.close()


class TokenizedDataset(Sequence[TokenizedSample]):
    """A memory-mapped dataset of S samples.

    fingerprint: hash of data, tokenizer, template and options. lengths, supervised_counts: numpy int64 [S].
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.key: dict[str, Any] = manifest["key"]
        self.fingerprint = key_digest(self.key)
        self.stats = DatasetStats(**manifest["stats"])
        self._arrays = {name: _map(directory / f"{name}.bin", dtype) for name, dtype in _DTYPES.items()}
        self.lengths: np.ndarray = np.diff(self._arrays["offsets"])
        self.supervised_counts: np.ndarray = np.array(self._arrays["supervised"])

    @classmethod
    def open(cls, directory: str | Path, expected_key: dict[str, Any] | None = None) -> TokenizedDataset:
        """Open a finished cache after checking sizes, and the first and last MiB of every file (all of it was read when
        it was built; ranks would spend minutes on reading it again at every start).

        Raises CacheDamaged if it is not as written, DataError if it was built from something else.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        built = manifest["key"]
        if expected_key is not None and built != expected_key:
            name = next((name for name in expected_key if built.get(name) != expected_key[name]), "key")
            raise DataError(f"{directory}: built with {name} {built.get(name)!r}, expected {expected_key.get(name)!r}")
        for name, facts in manifest["files"].items():
            path = directory / f"{name}.bin"
            if not path.exists() or quick_fingerprint(path) != facts["fingerprint"]:
                raise CacheDamaged(f"{path}: missing, or changed since it was written")
        return cls(directory, manifest)

    def warn_beyond(self, num_positions: int) -> None:
        """Say, once for all ranks, how many samples are longer than the draft's `max_position_embeddings`."""
        num_longer = int((self.lengths > num_positions).sum())
        if num_longer and log.is_main_rank():
            log.warn(
                f"{num_longer:,} of {len(self):,} samples are longer than the draft's {num_positions:,} positions"
                f" (up to {int(self.lengths.max()):,} tokens): what is learned beyond is not served; use"
                f" --max-length {num_positions}, or a draft config with more max_position_embeddings"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        """The sample at an int index (ids int64 [L], mask bool [L], both private copies); a list for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        import torch

        index = int(index) % len(self)
        start, end = self._arrays["offsets"][index : index + 2].tolist()
        return TokenizedSample(
            sample_id=self.sample_id(index),
            input_ids_L=torch.from_numpy(self._arrays["input_ids"][start:end].astype(np.int64)),
            loss_mask_L=torch.from_numpy(np.array(self._arrays["loss_mask"][start:end])),
        )

    def sample_id(self, index: int) -> str:
        """Id of a sample without reading its tokens."""
        start, end = self._arrays["sample_id_offsets"][index : index + 2].tolist()
        return self._arrays["sample_ids"][start:end].tobytes().decode("utf-8")

    def line(self, index: int) -> int:
        return int(self._arrays["lines"][index])

    def token_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids [N] int32 and the loss mask [N] bool, memory-mapped, samples back to back."""
        return self._arrays["input_ids"], self._arrays["loss_mask"]


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = manifest.pop("check") == key_digest(manifest)
    except (OSError, ValueError, KeyError, AttributeError):
        complete = False
    if not complete:
        raise CacheDamaged(f"{path}: missing or changed since it was written")
    if manifest["format"] != FORMAT:
        raise DataError(f"{path}: cache format {manifest['format']}, expected {FORMAT}; delete the directory")
    return manifest
