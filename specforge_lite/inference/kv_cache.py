"""Keys and values in fixed slots, with room for a tree after the accepted tokens of every row.

    row b:   [ accepted tokens 0 .. lengths[b]-1 | nodes of the tree being verified | unused ]

A forward pass writes its tokens behind the accepted ones; `keep` then moves the nodes of the accepted path to the
front and forgets the others. Rows have their own lengths, so a batch needs no padding inside.

Letters: B rows, Q tokens of a forward pass, P path nodes, C capacity in slots, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotPlan:
    """Where the next forward pass writes; shared by all layers of a cache.

    `start` is the first slot written where it is the same for all rows, else None, and then `slots_BQ` tells them.
    `row`: only this row of the batch is written (its prompt), else all.
    """

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.lengths = [0] * batch_size
        self.lengths_B: Tensor | None = None  # the same on the device, where it is known there
        self.capacity = capacity
        self.row: int | None = None
        self.start: int | None = 0
        self.end = 0
        self.slots_BQ: Tensor | None = None

    def on_device(self, device: torch.device) -> Tensor:
        """lengths [B] on the device; uploaded only where nothing on the device knew them."""
        if self.lengths_B is None:
            self.lengths_B = upload(self.lengths, device)
        return self.lengths_B

    def begin(self, num_new: int, offset: int, row: int | None, device: torch.device) -> None:
        starts = [length + offset for length in (self.lengths if row is None else [self.lengths[row]])]
        self.row, self.end = row, max(starts) + num_new
        self.start = starts[0] if min(starts) == max(starts) else None
        self.slots_BQ = None
        if self.start is None:
            self.slots_BQ = self.on_device(device)[:, None] + torch.arange(offset, offset + num_new, device=device)


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values [B, kv_heads, C, d], allocated at the first write, grown by doubling."""

    is_sliding = False
    is_croppable = True

    def __init__(self, plan: SlotPlan) -> None:
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch_size = len(self.plan.lengths)
        self.keys, self.values = (
            x.new_zeros(batch_size, x.shape[1], self.plan.capacity, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, kv_heads, Q, d] at the planned slots; return everything up to the last slot written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._stored()
        if self.plan.capacity > keys.shape[2]:
            self.keys, self.values = keys, values = self._grown(keys), self._grown(values)
        return self._write(keys, key_states), self._write(values, value_states)

    def _stored(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        plan = self.plan
        if plan.row is not None:
            stored = stored[plan.row : plan.row + 1]
        if plan.start is None:
            rows_B1 = torch.arange(new.shape[0], device=new.device)[:, None]
            assert plan.slots_BQ is not None
            stored[rows_B1, :, plan.slots_BQ.to(new.device)] = new.transpose(1, 2)
        else:
            stored[:, :, plan.start : plan.end] = new
            if plan.start == 0:
                return new
        return stored[:, :, : plan.end]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self.plan.capacity, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def keep(self, source_BP: Tensor, target_BP: Tensor) -> None:
        """Move slots `source` to `target`, row by row; both read before anything is written."""
        if not self.is_initialized:  # a layer that shares another one's keys
            return
        device = self._stored()[0].device
        rows_B1 = torch.arange(source_BP.shape[0], device=device)[:, None]
        for stored in self._stored():
            if source_BP.shape[0] == 1:
                moved = stored[0].index_select(1, source_BP[0].to(device))
                stored[0].index_copy_(1, target_BP[0].to(device), moved)
            else:
                stored[rows_B1, :, target_BP.to(device)] = stored[rows_B1, :, source_BP.to(device)]

    def select_rows(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.index_select(0, rows.to(x.device)) for x in self._stored())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.plan.start or 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A transformers cache (`past_key_values`) for trees: `begin` before a forward pass, `keep` after it.

    capacity: slots per row to start with; it doubles when they run out.
    """

    def __init__(self, num_layers: int, batch_size: int, capacity: int, device: torch.device) -> None:
        self.plan = SlotPlan(batch_size, capacity)
        self.device = device
        self.slot_layers = [SlotLayer(self.plan) for _ in range(num_layers)]
        super().__init__(layers=[*self.slot_layers])

    @property
    def lengths(self) -> list[int]:
        """Accepted tokens of every row."""
        return self.plan.lengths

    def begin(self, num_new: int, offset: int = 0, row: int | None = None) -> None:
        """Plan a pass over `num_new` tokens per row, written `offset` slots behind the accepted ones."""
        self.plan.begin(num_new, offset, row, self.device)
        if self.plan.end > self.plan.capacity:
            self.plan.capacity = max(2 * self.plan.capacity, self.plan.end)

    @property
    def lengths_B(self) -> Tensor:
        """The same on the device, [B] int64."""
        return self.plan.on_device(self.device)

    def advance(self, counts: Sequence[int], row: int | None = None, counts_B: Tensor | None = None) -> None:
        """Accept the first `counts[b]` tokens of the last pass, as they lie. counts_B: the same on the device."""
        for b, count in zip(range(len(self.lengths)) if row is None else (row,), counts):
            self.lengths[b] += count
        if counts_B is None and min(counts) == max(counts) and row is None and self.plan.lengths_B is not None:
            self.plan.lengths_B = self.plan.lengths_B + counts[0]
        elif counts_B is not None and self.plan.lengths_B is not None:
            self.plan.lengths_B = self.plan.lengths_B + counts_B
        else:
            self.plan.lengths_B = None

    def keep(
        self, paths: Sequence[Sequence[int]], paths_BP: Tensor | None = None, counts_B: Tensor | None = None
    ) -> None:
        """Accept nodes `paths[b]` (ascending places in the tree of the last pass) and forget the others.

        paths_BP, counts_B: paths, filled up by `filled_paths`, and their lengths on the device.
        """
        if any(list(path) != list(range(len(path))) for path in paths):
            if paths_BP is None:
                paths_BP = upload(filled_paths(paths), self.device)
            source_BP = self.lengths_B[:, None] + paths_BP
            target_BP = self.lengths_B[:, None] + torch.arange(paths_BP.shape[1], device=self.device)
            for layer in self.slot_layers:
                layer.keep(source_BP, target_BP)
        self.advance([len(path) for path in paths], counts_B=counts_B)

    def select_rows(self, rows: Sequence[int], index_R: Tensor | None = None) -> None:
        """Drop all rows but these. index_R: the same on the device."""
        if index_R is None:
            index_R = upload(list(rows), self.device)
        self.plan.lengths[:] = [self.lengths[row] for row in rows]
        if self.plan.lengths_B is not None:
            self.plan.lengths_B = self.plan.lengths_B[index_R]
        for layer in self.slot_layers:
            layer.select_rows(index_R)


def filled_paths(paths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Paths made equally long: a shorter one is filled up with places that `keep` moves onto themselves."""
    width = max(len(path) for path in paths)
    return [[*path, *range(len(path), width)] for path in paths]


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """int64 tensor of host numbers, sent without a wait."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def slot_mask(
    lengths: Sequence[int], sees_BQN: Tensor, end: int, dtype: torch.dtype, lengths_B: Tensor | None = None
) -> Tensor:
    """Additive attention mask [B, 1, Q, end] for Q tokens per row written behind `lengths[b]` accepted ones.

    sees_BQN: which of the N slots behind the accepted ones each token sees (bool); accepted slots are all seen,
    slots of no row are not. 0 where seen, the dtype's lowest number elsewhere. lengths_B: lengths on the device.
    """
    hidden = torch.finfo(dtype).min
    num_rows, num_queries, num_slots = sees_BQN.shape
    device = sees_BQN.device
    if min(lengths) == max(lengths):
        mask = torch.zeros(num_rows, 1, num_queries, lengths[0] + num_slots, dtype=dtype, device=device)
        mask[:, 0, :, lengths[0] :].masked_fill_(~sees_BQN, hidden)
        return mask
    lengths_B = upload(lengths, device) if lengths_B is None else lengths_B
    place_BE = torch.arange(end, device=device) - lengths_B[:, None]
    index = place_BE.clamp(0, num_slots - 1)[:, None, :].expand(-1, num_queries, -1)
    seen = sees_BQN.gather(2, index) & (place_BE < num_slots)[:, None, :] | (place_BE < 0)[:, None, :]
    return torch.zeros(num_rows, 1, num_queries, end, dtype=dtype, device=device).masked_fill_(~seen[:, None], hidden)
