"""Runs a DFlash or DSpark draft: one pass of the network drafts a whole chain.

    text accepted so far x_0 .. x_s, features known for x_0 .. x_{s-1}
    cache     keys and values of the context, tokens 0 .. s-1, one set a layer; appended, never recomputed
    pass      [x_s, MASK, ..., MASK] at positions s .. s+B-1; its own keys are written behind the context and forgotten
    chain     prediction k: argmax or a draw of head(h) + Markov(token before), left to right

With a confidence threshold the chain ends before the first token whose chance of being accepted is below it.

Letters: B rows, M new context tokens, S slots of a block, P predictions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from specforge_lite.inference.drafter import CachedDraft, Head
from specforge_lite.inference.kv_cache import grouped_attention
from specforge_lite.inference.tree import TokenTree, chain_tree
from specforge_lite.inference.verify import Sampling
from specforge_lite.model.block import BlockDraft


class BlockDrafter(CachedDraft):
    """A block draft. table_VD, head: the target's embeddings and output head. threshold (set before a call): least
    chance (0..1) of a token to be kept in the chain; 0 keeps all, and in a batch the longest chain decides."""

    draft: BlockDraft

    def __init__(self, draft: BlockDraft, table_VD: Tensor, head: Head) -> None:
        super().__init__(draft, table_VD, len(draft.layers))
        self.head = head

    def start(self, batch_size: int, capacity: int) -> None:
        super().start(batch_size, capacity + self.draft.config.block_size)

    def read_prompt(self, row: int, features_TG: Tensor, next_tokens_T: Tensor) -> None:
        self._append(features_TG[None], [len(features_TG)], row)

    def read_accepted(
        self, features_BMG: Tensor, next_tokens_BM: Tensor, counts: Sequence[int], counts_B: Tensor
    ) -> None:
        self._append(features_BMG, counts, None, counts_B)

    def propose_chain(
        self, root_B: Tensor, longest: int, sampling: Sampling | None, generator: torch.Generator | None
    ) -> TokenTree:
        drafted: list[Tensor] = []
        probabilities: list[Tensor] = []
        kept_B, previous_B = torch.ones_like(root_B, dtype=torch.bool), root_B
        count, first = min(longest, self.draft.num_predictions), self.draft.first_slot
        with self.measured():
            state_BPD = self._block(root_B)[:, first : first + count]
            base_BPV = self.head(state_BPD).float()
            for k in range(count):
                confidence_B = self.draft.confidence(state_BPD[:, k], previous_B) if self.threshold else None
                if confidence_B is not None:
                    kept_B = kept_B & (confidence_B.float().sigmoid() >= self.threshold)
                    if not bool(kept_B.any()):
                        break
                bias_BV = self.draft.markov_bias(previous_B)
                logits_BV = base_BPV[:, k] if bias_BV is None else base_BPV[:, k] + bias_BV.float()
                if sampling is None:
                    previous_B = logits_BV.argmax(-1)
                else:
                    probabilities.append(sampling.probabilities(logits_BV))
                    previous_B = torch.multinomial(probabilities[-1], 1, generator=generator)[:, 0]
                drafted.append(previous_B)
        return chain_tree(root_B, drafted, probabilities)

    def _append(
        self, features_BMG: Tensor, counts: Sequence[int], row: int | None, counts_B: Tensor | None = None
    ) -> None:
        """Keys and values of new context tokens, behind those that are there."""
        with self.measured():
            num_new = features_BMG.shape[1]
            self.cache.begin(num_new, row=row)
            c_BMD = self.draft.first_state(features_BMG.to(self.dtype))
            cos, sin = self.draft.rope(self.positions(num_new))
            for layer, stored in zip(self.draft.block_layers, self.cache.slot_layers):
                keys, values = layer.keys_values(c_BMD, cos, sin)
                stored.update(keys.transpose(1, 2), values.transpose(1, 2))
            self.cache.advance(counts, row=row, counts_B=counts_B)
            self.num_true_rows += sum(counts)

    def _block(self, root_B: Tensor) -> Tensor:
        """Normed states [B, S, D] of the block behind every text."""
        size = self.draft.config.block_size
        self.cache.begin(size)
        mask = None
        if self.cache.plan.start is None:
            seen = torch.ones(len(root_B), size, size, dtype=torch.bool, device=self.device)
            mask = self.cache.mask(seen, self.dtype)
        state = embedding(self.draft.block_input(root_B), self.table_VD).to(self.dtype)
        cos, sin = self.draft.rope(self.positions(size))
        for layer, stored in zip(self.draft.block_layers, self.cache.slot_layers):
            x = layer.input_layernorm(state)
            keys, values = layer.keys_values(x, cos, sin)
            keys, values = stored.update(keys.transpose(1, 2), values.transpose(1, 2))
            queries = layer.queries(x, cos, sin).transpose(1, 2)
            state = layer.finish(state, grouped_attention(queries, keys, values, mask, False).transpose(1, 2))
        self.num_forwards += 1
        self.num_speculative_rows += state.shape[0] * size
        return self.draft.norm(state)  # type: ignore[no-any-return]
