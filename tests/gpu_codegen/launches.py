"""Counts of an 8B-shaped training pass on device `meta`: kernels launched, and copies between host and device.

On `meta` the package takes the paths of a GPU (it asks for "not a CPU"). An operator that is no view is taken for one
launch; torch's composite operators are counted by their parts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch

HIDDEN, VOCAB, DRAFT_VOCAB, LENGTH, BATCH, STEPS = 4096, 128256, 32000, 2048, 4, 7
VIEWS = {
    "view", "_unsafe_view", "detach", "t", "transpose", "permute", "slice", "expand", "unsqueeze", "squeeze", "select",
    "split", "split_with_sizes", "alias", "as_strided", "unbind", "empty", "empty_like", "new_empty", "unfold",
}  # fmt: skip


@dataclass
class Launches:
    """launches: by operator. blocking: copies from or to the device that the host waits for, by operator."""

    launches: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    blocking: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.launches.values())


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Launches) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func).split(".")[1]
        ins = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor.device.type == "meta" for tensor in (*ins, *outs)]
        if name in ("_to_copy", "copy_") and any(on_device) and not all(on_device):
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if non_blocking:
                self.counts.uploads += 1
            else:
                self.counts.blocking[name] += 1
        elif any(tensor.device.type == "meta" for tensor in outs):
            if name not in VIEWS:
                self.counts.launches[name] += 1
        elif name in ("_local_scalar_dense", "nonzero", "item") and any(on_device):
            self.counts.blocking[name] += 1
        return out


def meta_draft(algorithm: str = "eagle3") -> Draft:
    """An 8B-shaped draft without memory."""
    config = DraftConfig(
        hidden_size=HIDDEN, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=VOCAB,
        draft_vocab_size=VOCAB if algorithm == "eagle1" else DRAFT_VOCAB, algorithm=algorithm,
    )  # fmt: skip
    t2d = torch.arange(VOCAB) < config.draft_vocab_size
    with torch.device("meta"):
        shell = build_draft(config, torch.zeros(config.draft_vocab_size, dtype=torch.int64, device="cpu"), t2d)
    return shell.to("meta")


def meta_batch(turns: int) -> tuple[DraftBatch, TargetHead]:
    """Documents of `turns` questions and answers of equal length; 0: all supervised."""
    mask_BT = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if turns:
        mask_BT = (torch.arange(LENGTH) // (LENGTH // (2 * turns)) % 2 == 1).expand(BATCH, -1)
    mask, total = mask_BT.flatten(), BATCH * LENGTH
    make = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    batch = DraftBatch(
        torch.empty(total, dtype=torch.int64, device="meta"), mask.to("meta"), list(range(0, total + 1, LENGTH)),
        make(total, 3 * HIDDEN), make(total, HIDDEN), host_mask_N=mask,
    )  # fmt: skip
    return batch, TargetHead(make(VOCAB, HIDDEN), make(VOCAB, HIDDEN), torch.ones(HIDDEN, device="meta"), 1e-5)


def count_pass(
    turns: int = 8, algorithm: str = "eagle3", loss: str = "ce", num_steps: int = STEPS
) -> tuple[Launches, Launches]:
    """-> (forward, backward) with the backend `sdpa` in bf16."""
    draft, (batch, head) = meta_draft(algorithm), meta_batch(turns)
    settings = TTTSettings(num_steps=num_steps, attention_backend="sdpa", compute_dtype=torch.bfloat16, loss=loss)
    forward, backward = Launches(), Launches()
    with _Counting(forward):
        output = draft(batch, head, settings)
    with _Counting(backward):
        output.loss.backward()
    return forward, backward
