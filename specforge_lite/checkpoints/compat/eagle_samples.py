"""EAGLE-1's training samples: the folder that its `ge_data` scripts write and its trainer takes as `--tmpdir`.

    TMPDIR/**/data_0.ckpt, data_1.ckpt, ...  (or .pt)   torch.save of {"input_ids" [L], "loss_mask" [L],
                                                        "hidden_state" [L, H]: after the final norm}

They are read as they are, with `weights_only`. EAGLE's trainer evaluates on the last 5% of the files; so do we.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specforge_lite.capture.base import TargetInfo
from specforge_lite.core.errors import CaptureError, DataError
from specforge_lite.core.files import atomic_directory, exclusive, key_digest
from specforge_lite.core.log import info, progress
from specforge_lite.data.store import StoreWriter, TokenizedDataset
from specforge_lite.types import CapturedStates, TokenizedSample

TRAIN_SHARE = 0.95
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError)


def sample_files(directory: Path) -> list[Path]:
    """The sample files of a folder and its subfolders, by their numbers; none for any other folder."""
    found = [path for path in directory.rglob("*") if path.suffix in (".ckpt", ".pt") and path.is_file()]
    numbers = lambda path: [int(n) for n in re.findall(r"\d+", str(path.relative_to(directory)))]  # noqa: E731
    return sorted(found, key=lambda path: (numbers(path), str(path)))


class EagleSamples:
    """A `TargetEngine` that reads EAGLE's sample files, and the datasets (train, eval) that lie in them.

    Samples are cut to max_length, as EAGLE does. The ids are copied into cache_dir once, so that lengths and
    vocabulary counts are at hand. Raises DataError naming the first file that is no sample.
    """

    max_concurrency = 2

    def __init__(self, directory: Path, cache_dir: Path, max_length: int, vocab_size: int) -> None:
        self._directory = directory
        files = sample_files(directory)
        hidden = _read(files[0])["hidden_state"].shape[-1]
        self.info = TargetInfo("eagle-samples", 1, hidden, vocab_size, max_length, aux_layer_ids=(0,))
        sizes = [[str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        key = {"eagle_samples": sizes, "max_length": max_length}
        count = max(1, int(len(files) * TRAIN_SHARE))
        parts = [files[:count], files[count:]]
        self.datasets = [self._dataset(part, cache_dir, {**key, "part": n}) for n, part in enumerate(parts) if part]

    def _dataset(self, files: list[Path], cache_dir: Path, key: dict[str, Any]) -> TokenizedDataset:
        target = cache_dir / f"eagle_samples_{key_digest(key)[:16]}"
        cache_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(target, "EAGLE's samples"):  # ranks ask at the same time
            if not target.exists():
                info(f"reading the token ids of {len(files)} samples in {self._directory}")
                with atomic_directory(target) as temporary, progress(len(files), "read", "file") as bar:
                    writer = StoreWriter(temporary)
                    for number, path in enumerate(files, 1):
                        sample = _read(path)
                        ids, mask = (sample[name][: self.info.max_length] for name in ("input_ids", "loss_mask"))
                        writer.add(str(path.relative_to(self._directory)), number, ids.numpy(), mask.bool().numpy())
                        bar.update()
                    writer.finish(key)
        return TokenizedDataset.open(target)

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """The stored states; aux states, which EAGLE-1 does not read, are zeros."""
        found = []
        for sample in samples:
            stored = _read(self._directory / sample.sample_id)
            if len(stored["hidden_state"]) < len(sample):
                raise CaptureError(f"{self._directory / sample.sample_id}: changed since its ids were read")
            last_LH = stored["hidden_state"][: len(sample)]
            ids_L = stored["input_ids"][: len(sample)].long()
            aux_LAH = last_LH.new_zeros(len(sample), 1, self.info.hidden_size)
            found.append(CapturedStates(sample.sample_id, ids_L, aux_LAH, last_LH, self.info.aux_layer_ids, True))
        return found

    def close(self) -> None:
        """Nothing to stop."""


def _read(path: Path) -> dict[str, torch.Tensor]:
    """One sample without batch dimensions. Raises DataError with the file and what was expected."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        sample = {name: loaded[name] for name in ("input_ids", "loss_mask", "hidden_state")}
        for name, rank in (("input_ids", 1), ("loss_mask", 1), ("hidden_state", 2)):
            while sample[name].ndim > rank and sample[name].shape[0] == 1:
                sample[name] = sample[name][0]
        lengths = {len(tensor) for tensor in sample.values()}
        if len(lengths) != 1 or sample["hidden_state"].ndim != 2:
            raise ValueError(f"lengths {sorted(lengths)} of ids, mask and states differ")
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: no sample of EAGLE's ge_data (input_ids, loss_mask, hidden_state expected): {reason}"
        ) from None
    return sample
