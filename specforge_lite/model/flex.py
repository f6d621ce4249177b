"""torch's flex_attention over packed rows: block masks made on the host from key ranges, and one compiled kernel.

Letters: R query rows, T keys, I blocks of rows, J blocks of keys, H query heads, G key heads, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_lite.model.row_plan import StepRows
from specforge_lite.model.ttt_attention import Backend, Keys, Merged

FLEX_BLOCK = 128

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, row, key -> visible


@dataclass(frozen=True)
class FlexRows:
    """A step's block mask: for each block of rows, its blocks of keys (int32, as torch's BlockMask wants them), partly
    and wholly visible; and the other way round. sizes: int64 scalars that the mask function reads, on the device,
    so that they are no constants of a graph (and no elements of a vector: Inductor lowers no constant index here)."""

    kv_counts: Tensor
    kv_blocks: Tensor
    full_kv_counts: Tensor
    full_kv_blocks: Tensor
    q_counts: Tensor
    q_blocks: Tensor
    full_q_counts: Tensor
    full_q_blocks: Tensor
    sizes: list[Tensor]

    @classmethod
    def of(
        cls, first_R: Tensor, last_R: Tensor, own: Sequence[tuple[Tensor, Tensor]], num_keys: int, sizes: Sequence[int]
    ) -> FlexRows:
        """Made of key ranges, without a matrix of rows and keys: row r sees the keys first[r] .. last[r], and of each
        further range (first, last) [R], ascending, its own part."""
        first_J = torch.arange(-(-num_keys // FLEX_BLOCK)) * FLEX_BLOCK
        last_J = first_J + FLEX_BLOCK - 1
        partly, wholly = [], []
        for start in range(0, len(first_R), FLEX_BLOCK):
            rows = slice(start, start + FLEX_BLOCK)
            seen_J = torch.zeros_like(first_J, dtype=torch.bool)
            for first, last in ((first_R, last_R), *own):
                seen_J |= (first_J <= last[rows].max()) & (last_J >= first[rows].min())
            full_J = (first_J >= first_R[rows].max()) & (last_J <= last_R[rows].min())
            partly.append(seen_J & ~full_J)
            wholly.append(full_J)
        partly_IJ, wholly_IJ = torch.stack(partly), torch.stack(wholly)
        both = (partly_IJ, wholly_IJ, partly_IJ.T, wholly_IJ.T)
        tensors = [tensor for visible in both for tensor in _ordered(visible)]
        return cls(*tensors, sizes=[torch.tensor(size) for size in sizes])  # type: ignore[arg-type, misc]


def _ordered(visible: Tensor) -> tuple[Tensor, Tensor]:
    """bool [I, J] -> (how many of each row [1, 1, I], which ones, those first [1, 1, I, J]), int32."""
    order = torch.argsort(visible.to(torch.int8), dim=-1, descending=True, stable=True)
    return visible.sum(-1).int()[None, None], order.int()[None, None]


def run_flex(
    q_RHd: Tensor, k_TGd: Tensor, v_TGd: Tensor, visible: MaskFunction, rows: FlexRows, compiled: bool
) -> Tensor:
    """-> output [R, H, d]. compiled: through Inductor and Triton; else torch's own reference of it."""
    from torch.nn.attention.flex_attention import BlockMask

    mask = BlockMask(
        (len(q_RHd), len(k_TGd)), rows.kv_counts, rows.kv_blocks, rows.full_kv_counts, rows.full_kv_blocks,
        rows.q_counts, rows.q_blocks, rows.full_q_counts, rows.full_q_blocks, (FLEX_BLOCK, FLEX_BLOCK), visible,
    )  # fmt: skip
    out = _kernel(compiled)(
        q_RHd.transpose(0, 1)[None],
        k_TGd.transpose(0, 1)[None],
        v_TGd.transpose(0, 1)[None],
        block_mask=mask,
        enable_gqa=q_RHd.shape[1] != k_TGd.shape[1],
        # its kernel for few rows has no configuration for some sizes (33 to 127 rows at 4 query heads a key head)
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out[0].transpose(0, 1)


_COMPILED: dict[str, Callable[..., Tensor]] = {}


def _kernel(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention  # type: ignore[return-value]
    if "flex" not in _COMPILED:
        _COMPILED["flex"] = torch.compile(flex_attention, dynamic=True)
    return _COMPILED["flex"]


class Flex(Backend):
    """torch's flex_attention with one mask: a step-0 key by position and document, a later key by its own row."""

    def plan(self, rows: StepRows, step: int, num_keys: int) -> FlexRows | None:
        num_rows = len(rows.key_rows)
        if not num_rows:
            return None
        later = [num_keys + j * num_rows + torch.arange(num_rows) for j in range(step)]
        own, sizes = [(places, places) for places in later], [num_keys, num_rows]
        return FlexRows.of(rows.first_keys, rows.key_rows, own, num_keys + step * num_rows, sizes)

    def attend(self, q_RHd: Tensor, keys: Keys, values: Keys, rows: StepRows) -> Tensor:
        if len(q_RHd) == 0:
            return Merged(q_RHd.device.type).attend(q_RHd, keys, values, rows)
        plan: FlexRows = rows.kernel
        (num_keys, num_rows), key_row_R, first_key_R = plan.sizes, rows.key_rows, rows.first_keys

        def visible(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            step0 = (key <= key_row_R[row]) & (key >= first_key_R[row])
            return step0 | ((key >= num_keys) & ((key - num_keys) % num_rows == row))

        return run_flex(
            q_RHd, torch.cat(list(keys)), torch.cat(list(values)), visible, plan, self.device_type == "cuda"
        )
