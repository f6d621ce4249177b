"""Keys and values in fixed slots, with room for a tree after the accepted tokens of every row; and attention over them.

    row b:   [ accepted tokens 0 .. lengths[b]-1 | nodes of the tree being verified | unused ]

A forward pass writes its tokens behind the accepted ones; `keep` then moves the nodes of the accepted path to the
front and forgets the others. Rows have their own lengths, so a batch needs no padding inside.

Letters: B rows, Q tokens of a forward pass, K keys, P path nodes, C capacity in slots, H / G query / key heads, d head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "specforge_grouped"


@dataclass
class SlotPlan:
    """Where the next forward pass writes; shared by a cache and its layers.

    start: the first slot written where it is the same for all rows, else None, and then `slots_BQ` has them.
    end: one above the last slot. row: only this row of the batch is written (its prompt), else all.
    """

    lengths: list[int]
    capacity: int
    row: int | None = None
    start: int | None = 0
    end: int = 0
    slots_BQ: Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values [B, kv_heads, C, d], allocated at the first write, grown by doubling."""

    is_sliding = False
    is_croppable = True

    def __init__(self, plan: SlotPlan) -> None:
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        num_rows = len(self.plan.lengths)
        self.keys, self.values = (x.new_zeros(num_rows, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, kv_heads, Q, d] at the planned slots; return everything up to the last slot written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._stored()
        if self.plan.capacity > keys.shape[2]:
            room = (0, 0, 0, self.plan.capacity - keys.shape[2])
            self.keys, self.values = (torch.nn.functional.pad(x, room) for x in (keys, values))
            keys, values = self._stored()
        return self._write(keys, key_states), self._write(values, value_states)

    def _stored(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        plan = self.plan
        if plan.row is not None:
            stored = stored[plan.row : plan.row + 1]
        if plan.slots_BQ is not None:
            rows_B1 = torch.arange(new.shape[0], device=new.device)[:, None]
            stored[rows_B1, :, plan.slots_BQ.to(new.device)] = new.transpose(1, 2)
        else:
            stored[:, :, plan.start : plan.end] = new
            if plan.start == 0:
                return new
        return stored[:, :, : plan.end]

    def keep(self, source_BP: Tensor, target_BP: Tensor) -> None:
        """Move slots `source` to `target`, row by row; both read before anything is written."""
        if not self.is_initialized:  # a layer that shares another one's keys
            return
        for stored in self._stored():
            source, target = source_BP.to(stored.device), target_BP.to(stored.device)
            if len(source) == 1:
                stored[0].index_copy_(1, target[0], stored[0].index_select(1, source[0]))
            else:
                rows_B1 = torch.arange(len(source), device=stored.device)[:, None]
                stored[rows_B1, :, target] = stored[rows_B1, :, source]

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
    """A transformers cache (`past_key_values`) for trees: `begin` before a forward pass, `keep` or `advance` after it.

    capacity: slots per row to start with; it doubles when they run out.
    """

    def __init__(self, num_layers: int, batch_size: int, capacity: int, device: torch.device) -> None:
        self.plan = SlotPlan([0] * batch_size, capacity)
        self.device = device
        self._lengths_B: Tensor | None = None  # on the device, where it is known there
        self.slot_layers = [SlotLayer(self.plan) for _ in range(num_layers)]
        super().__init__(layers=[*self.slot_layers])

    @property
    def lengths(self) -> list[int]:
        """Accepted tokens of every row."""
        return self.plan.lengths

    @property
    def lengths_B(self) -> Tensor:
        """The same on the device, int64; uploaded only where nothing on the device knew them."""
        if self._lengths_B is None:
            self._lengths_B = upload(self.lengths, self.device)
        return self._lengths_B

    def begin(self, num_new: int, offset: int = 0, row: int | None = None) -> None:
        """Plan a pass over `num_new` tokens per row, written `offset` slots behind the accepted ones."""
        plan = self.plan
        starts = [length + offset for length in (self.lengths if row is None else [self.lengths[row]])]
        plan.row, plan.end = row, max(starts) + num_new
        plan.start, plan.slots_BQ = starts[0], None
        if min(starts) < max(starts):
            places_Q = torch.arange(offset, offset + num_new, device=self.device)
            plan.start, plan.slots_BQ = None, self.lengths_B[:, None] + places_Q
        if plan.end > plan.capacity:
            plan.capacity = max(2 * plan.capacity, plan.end)

    def mask(self, sees_BQN: Tensor, dtype: torch.dtype) -> Tensor:
        """The `slot_mask` of the planned pass."""
        lengths_B = None if self.plan.start is not None else self.lengths_B
        return slot_mask(self.lengths, sees_BQN, self.plan.end, dtype, lengths_B)

    def advance(self, counts: Sequence[int], row: int | None = None, counts_B: Tensor | None = None) -> None:
        """Accept the first `counts[b]` tokens of the last pass, as they lie. counts_B: the same on the device."""
        for b, count in zip(range(len(self.lengths)) if row is None else (row,), counts):
            self.lengths[b] += count
        step: Tensor | int | None = counts_B
        if step is None and row is None and min(counts) == max(counts):
            step = counts[0]
        known = self._lengths_B is not None and step is not None
        self._lengths_B = self.lengths_B + step if known and step is not None else None

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
        index_R = upload(rows, self.device) if index_R is None else index_R
        self.plan.lengths[:] = [self.lengths[row] for row in rows]
        if self._lengths_B is not None:
            self._lengths_B = self._lengths_B[index_R]
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


def grouped_attention(
    q_BHQd: Tensor, k_BGKd: Tensor, v_BGKd: Tensor, mask_B1QK: Tensor | None, causal: bool, scale: float | None = None
) -> Tensor:
    """[B, H, Q, d]. With a mask no kernel shares keys among the heads of a group but the one that copies them for each;
    so the queries of a group become rows of one head."""
    groups = q_BHQd.shape[1] // k_BGKd.shape[1]
    if mask_B1QK is None or groups == 1:
        return scaled_dot_product_attention(
            q_BHQd, k_BGKd, v_BGKd, attn_mask=mask_B1QK, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    rows = q_BHQd.unflatten(1, (-1, groups)).flatten(2, 3)
    out = scaled_dot_product_attention(rows, k_BGKd, v_BGKd, attn_mask=mask_B1QK.repeat(1, 1, groups, 1), scale=scale)
    return out.unflatten(2, (groups, -1)).flatten(1, 2)


def share_keys_of_groups(model: Any) -> None:
    """Let a model that runs transformers' `sdpa` use `grouped_attention` for the additive masks of trees; for all else
    (no mask, transformers' own bool masks) it calls `sdpa` as before."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        ours = attention_mask is not None and attention_mask.is_floating_point() and attention_mask.shape[1] == 1
        if not ours or options.get("position_bias") is not None or options.get("softcap") is not None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        out = grouped_attention(query, key, value, attention_mask, False, options.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(GROUPED, attend)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)
