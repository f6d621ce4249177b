"""The draft vocabulary: the only module that knows how `d2t` and `t2d` are made and kept.

V target vocabulary, Vd draft vocabulary. d2t [Vd] int64: target id = draft id + d2t[draft id] (an offset, not an id;
SGLang and vLLM read it so). t2d [V] bool: target ids that have a draft id. Draft ids ascend with target ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specforge_lite.core import log
from specforge_lite.core.errors import DataError
from specforge_lite.core.files import save_tensors, user_errors

if TYPE_CHECKING:
    from specforge_lite.data.store import TokenizedDataset

COUNT_BLOCK = 1 << 22


@dataclass(frozen=True)
class VocabMap:
    """d2t int64 [Vd], t2d bool [V]; fingerprint of the dataset (data + tokenizer) it was counted on; coverage: share
    of that dataset's supervised tokens that the draft vocabulary holds, 0..1."""

    d2t: Tensor
    t2d: Tensor
    fingerprint: str
    coverage: float

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        metadata = {"fingerprint": self.fingerprint, "coverage": repr(self.coverage), "format": "1"}
        with user_errors(Path(path)):
            save_tensors({"d2t": self.d2t, "t2d": self.t2d}, Path(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> VocabMap:
        """Read what `save` wrote. Raises DataError if it is not a consistent map."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                facts = file.metadata() or {}
                d2t, t2d = file.get_tensor("d2t"), file.get_tensor("t2d")
            vocab_map = cls(d2t, t2d, facts["fingerprint"], float(facts["coverage"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path}: not a vocabulary map: {error}") from None
        check_vocab_map(d2t, t2d, str(path))
        return vocab_map


def check_vocab_map(d2t: Tensor, t2d: Tensor, source: str) -> None:
    """Raise DataError unless d2t and t2d have the right types and say the same."""
    if d2t.dtype != torch.int64 or d2t.ndim != 1 or t2d.dtype != torch.bool or t2d.ndim != 1:
        raise DataError(
            f"{source}: d2t {d2t.dtype} {list(d2t.shape)}, t2d {t2d.dtype} {list(t2d.shape)};"
            " expected int64 [Vd] and bool [V]"
        )
    target_ids = d2t + torch.arange(len(d2t))
    if not torch.equal(target_ids, t2d.nonzero().flatten()):
        raise DataError(f"{source}: d2t ({len(d2t)} ids) and t2d ({int(t2d.sum())} ids) name different target ids")


def count_supervised_tokens(dataset: TokenizedDataset, vocab_size: int) -> np.ndarray:
    """How often each target id is a supervised token, int64 [V]; reads the memory-mapped arrays once, in blocks."""
    input_ids, loss_mask = dataset.token_arrays()
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(input_ids), COUNT_BLOCK):
        ids = input_ids[start : start + COUNT_BLOCK]
        highest = int(ids.max())
        if highest >= vocab_size:
            raise DataError(f"token id {highest} in the data >= vocab_size {vocab_size} of the target")
        counts += np.bincount(ids[loss_mask[start : start + COUNT_BLOCK]], minlength=vocab_size)
    return counts


def build_vocab_map(
    counts: np.ndarray | TokenizedDataset, vocab_size: int, draft_vocab_size: int, fingerprint: str
) -> VocabMap:
    """Take the Vd most frequent supervised tokens (ties: lower id; unused ids fill up, lowest first).

    counts: int [V], or a dataset to count. Raises DataError where Vd is not in 1..V.
    """
    if not isinstance(counts, np.ndarray):
        counts = count_supervised_tokens(counts, vocab_size)
    if counts.shape != (vocab_size,):
        raise DataError(f"counts of {len(counts)} tokens != vocab_size {vocab_size}")
    if not 1 <= draft_vocab_size <= vocab_size:
        raise DataError(f"draft_vocab_size {draft_vocab_size} is not in 1..vocab_size {vocab_size}")
    # A stable sort by falling count leaves equal counts, zeros included, in the order of their ids.
    chosen = np.sort(np.argsort(-counts, kind="stable")[:draft_vocab_size])
    t2d = np.zeros(vocab_size, dtype=bool)
    t2d[chosen] = True
    total = int(counts.sum())
    coverage = float(counts[chosen].sum() / total) if total else 0.0
    d2t = torch.from_numpy(chosen.astype(np.int64)) - torch.arange(draft_vocab_size)
    return VocabMap(d2t, torch.from_numpy(t2d), fingerprint, coverage)


def open_or_build_vocab_map(
    dataset: TokenizedDataset, draft_vocab_size: int, vocab_size: int, cache_dir: str | Path
) -> VocabMap:
    """The map of a dataset, from the cache if it is there and whole; coverage is printed."""
    path = Path(cache_dir) / f"vocab-{dataset.fingerprint[:20]}-{vocab_size}-{draft_vocab_size}.safetensors"
    try:
        vocab_map = VocabMap.load(path)
        if vocab_map.fingerprint != dataset.fingerprint:
            raise DataError(f"{path}: counted on other data")
    except DataError as error:
        if path.exists():
            log.warn(f"vocabulary map is built again: {error}")
        vocab_map = build_vocab_map(dataset, vocab_size, draft_vocab_size, dataset.fingerprint)
        vocab_map.save(path)
    log.info(
        f"draft vocabulary: {draft_vocab_size:,} of {vocab_size:,} tokens cover {vocab_map.coverage:.2%}"
        " of the supervised tokens"
    )
    return vocab_map
