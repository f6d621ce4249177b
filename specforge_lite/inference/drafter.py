"""Runs a draft network over the accepted text and lets it propose a tree.

    row t of the draft's cache: (features g_t of token x_t, embedding of x_{t+1}), RoPE position t, predicts x_{t+2}
    text accepted so far x_0 .. x_n, features known for x_0 .. x_{n-1}: rows 0 .. n-1, and row n-1 predicts x_{n+1}

A drafted token at depth k >= 1 becomes a speculative row of its own: (the draft's output for its parent, its embedding)
at RoPE position n-1+k. That is what training does: step k of row t has the position t+k and sees the true rows <= t and
its own earlier steps. When the target has verified a path, its true features come as new rows n, n+1, ... and
overwrite the speculative ones; a true row is computed once and never again.

Letters: B rows, M new true rows, F frontier nodes, K children, D draft width, G feature width, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.kv_cache import SlotCache, grouped_attention
from specforge_lite.inference.output import Metered
from specforge_lite.inference.tree import Level, TokenTree, TreeShape, best_tree, chain_tree
from specforge_lite.inference.verify import Sampling
from specforge_lite.model.draft import Draft

Head = Callable[[Tensor], Tensor]


class CachedDraft(Metered):
    """A draft with its cache for one batch of texts; what all kinds of drafts have in common.

    table_VD: the token embeddings it reads. threshold: see `BlockDrafter`. `num_true_rows` counts rows with true
    features (each text position once), `num_speculative_rows` the others.
    """

    def __init__(self, draft: Draft, table_VD: Tensor, num_layers: int) -> None:
        self.draft, self.table_VD, self.device = draft, table_VD, table_VD.device
        self.dtype = next(draft.parameters()).dtype
        self.num_true_rows = self.num_speculative_rows = 0
        self.num_layers, self.threshold = num_layers, 0.0
        self.cache = SlotCache(num_layers, 0, 0, self.device)

    def start(self, batch_size: int, capacity: int) -> None:
        """Forget everything; expect `batch_size` texts."""
        self.cache = SlotCache(self.num_layers, batch_size, capacity, self.device)

    def read_prompt(self, row: int, features_TG: Tensor, next_tokens_T: Tensor) -> None:
        """True rows of one text's prompt: features of its tokens, and the token after each."""
        raise NotImplementedError

    def read_accepted(
        self, features_BMG: Tensor, next_tokens_BM: Tensor, counts: Sequence[int], counts_B: Tensor
    ) -> None:
        """True rows of the tokens just accepted; row b has `counts[b]` of them, the rest is padding. counts_B: the same
        on the device."""
        raise NotImplementedError

    def select_rows(self, rows: Sequence[int], index_R: Tensor) -> None:
        """Drop all texts but these. index_R: the same on the device."""
        self.cache.select_rows(rows, index_R)

    def propose(
        self,
        root_B: Tensor,
        shape: TreeShape,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenTree:
        """A tree of continuations of every text; root_B [B]: its last token.

        sampling: a chain is drawn from the draft's own distribution, which the tree then carries; None: its argmax.
        """
        if shape.is_chain:
            return self.propose_chain(root_B, shape.longest_path, sampling, generator)
        return self.propose_tree(root_B, shape)

    def propose_chain(
        self, root_B: Tensor, longest: int, sampling: Sampling | None, generator: torch.Generator | None
    ) -> TokenTree:
        raise NotImplementedError

    def propose_tree(self, root_B: Tensor, shape: TreeShape) -> TokenTree:
        raise ConfigError(f"top_k {shape.top_k}: a {self.draft.config.algorithm} draft proposes chains (top_k 1)")

    def positions(self, width: int) -> Tensor:
        """Consecutive RoPE positions [B, width] behind the true rows, for a pass planned by `cache.begin`."""
        places = torch.arange(width, device=self.device)
        row = self.cache.plan.row
        return (self.cache.lengths_B[:, None] if row is None else self.cache.lengths[row]) + places.expand(1, -1)


class Drafter(CachedDraft):
    """An EAGLE draft. table_VD: the target's; a draft of another width has its own. head: [..., D] -> draft logits;
    default: the draft's own."""

    def __init__(self, draft: Draft, table_VD: Tensor, head: Head | None = None) -> None:
        own_table = getattr(draft, "embed_tokens", None)
        super().__init__(draft, table_VD if own_table is None else own_table.weight, 1)
        self.head: Head = head or draft.logits
        self.target_ids_Vd = draft.target_ids
        # What the next proposal starts from: output state and logits of every text's last true row.
        self.state_B1D = torch.empty(0)
        self.logits_BVd = torch.empty(0)

    def start(self, batch_size: int, capacity: int) -> None:
        super().start(batch_size, capacity)
        config = self.draft.config
        self.state_B1D = torch.zeros(batch_size, 1, config.hidden_size, dtype=self.dtype, device=self.device)
        self.logits_BVd = torch.zeros(batch_size, config.draft_vocab_size, dtype=self.dtype, device=self.device)

    def read_prompt(self, row: int, features_TG: Tensor, next_tokens_T: Tensor) -> None:
        num_rows = len(next_tokens_T)
        self.cache.begin(num_rows, row=row)
        state, head_in = self._read(features_TG[None], next_tokens_T[None], None, causal=True)
        self.state_B1D[row], self.logits_BVd[row] = state[0, -1:], self._logits(head_in[:, -1:])[0, -1]
        self.cache.advance([num_rows], row=row)
        self.num_true_rows += num_rows

    def read_accepted(
        self, features_BMG: Tensor, next_tokens_BM: Tensor, counts: Sequence[int], counts_B: Tensor
    ) -> None:
        num_new = next_tokens_BM.shape[1]
        self.cache.begin(num_new)
        mask = None
        if num_new > 1 or self.cache.plan.start is None:
            causal_QQ = torch.ones(num_new, num_new, dtype=torch.bool, device=self.device).tril()
            mask = self.cache.mask(causal_QQ.expand(len(counts), -1, -1), self.dtype)
        state, head_in = self._read(features_BMG, next_tokens_BM, mask)
        rows, last = torch.arange(len(counts), device=self.device), counts_B - 1
        self.state_B1D = state[rows, last][:, None]
        self.logits_BVd = self._logits(head_in[rows, last])
        self.cache.advance(counts, counts_B=counts_B)
        self.num_true_rows += sum(counts)

    def select_rows(self, rows: Sequence[int], index_R: Tensor) -> None:
        super().select_rows(rows, index_R)
        self.state_B1D, self.logits_BVd = self.state_B1D[index_R], self.logits_BVd[index_R]

    def propose_chain(
        self, root_B: Tensor, longest: int, sampling: Sampling | None, generator: torch.Generator | None
    ) -> TokenTree:
        state, logits_BVd = self.state_B1D, self.logits_BVd
        drafted: list[Tensor] = []
        probabilities: list[Tensor] = []
        ones = torch.ones(len(root_B), 1, longest, dtype=torch.bool, device=self.device)
        for level in range(longest):
            if level:
                self.cache.begin(1, offset=level - 1)
                mask = self.cache.mask(ones[:, :, :level], self.dtype) if self.cache.plan.start is None else None
                state, head_in = self._guess(state, drafted[-1][:, None], mask, level - 1)
                logits_BVd = self._logits(head_in)[:, -1]
            if sampling is None:
                drafted.append(self.target_ids_Vd[logits_BVd.argmax(-1)])
                continue
            probs_BVd = sampling.probabilities(logits_BVd)
            over_target_BV = probs_BVd.new_zeros(len(root_B), len(self.table_VD))
            probabilities.append(over_target_BV.index_copy_(1, self.target_ids_Vd, probs_BVd))
            drafted.append(self.target_ids_Vd[torch.multinomial(probs_BVd, 1, generator=generator)[:, 0]])
        return chain_tree(root_B, drafted, probabilities)

    def propose_tree(self, root_B: Tensor, shape: TreeShape) -> TokenTree:
        """EAGLE-2: expand the `top_k` best nodes of each level, then keep the best of all (see `best_tree`)."""
        num_rows, top_k = len(root_B), min(shape.top_k, self.draft.config.draft_vocab_size)
        scores_BF, ids_BF = _log_probs(self.logits_BVd).topk(top_k, -1)
        tokens_BF = self.target_ids_Vd[ids_BF]
        levels = [Level(tokens_BF, scores_BF, torch.full_like(tokens_BF, -1))]
        num_nodes = top_k
        index_BF = torch.arange(top_k, device=self.device).expand(num_rows, -1)  # of the frontier, among all nodes
        state_BFD = self.state_B1D.expand(-1, top_k, -1)
        itself_BFF = torch.eye(top_k, dtype=torch.bool, device=self.device).expand(num_rows, -1, -1)
        sees_BFN = itself_BFF
        # A path of longest_path tokens needs one expansion less; the root's children are there already.
        for level in range(shape.longest_path - 1):
            self.cache.begin(top_k, offset=level * top_k)
            state_out, head_in = self._guess(state_BFD, tokens_BF, self.cache.mask(sees_BFN, self.dtype), level)
            child_scores, child_ids = _log_probs(self._logits(head_in)).topk(top_k, -1)
            scores_BM = (scores_BF[:, :, None] + child_scores).flatten(1)
            tokens_BM = self.target_ids_Vd[child_ids].flatten(1)
            levels.append(Level(tokens_BM, scores_BM, index_BF.repeat_interleave(top_k, 1)))
            if level == shape.longest_path - 2:
                break
            scores_BF, best_BF = scores_BM.topk(top_k, -1)
            tokens_BF, index_BF = tokens_BM.gather(1, best_BF), num_nodes + best_BF
            num_nodes += tokens_BM.shape[1]
            parent_BF = best_BF // top_k
            state_BFD = _rows(state_out, parent_BF)
            sees_BFN = torch.cat([_rows(sees_BFN, parent_BF), itself_BFF], -1)
        return best_tree(root_B, levels, shape)

    # --------------------------------------------------------------------------------------------------------- network

    def _read(
        self, features: Tensor, tokens_BT: Tensor, mask: Tensor | None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """A pass over true rows planned by `cache.begin`."""
        with self.measured():
            state_BTD = self.draft.first_state(features.to(self.dtype))
            return self._step(state_BTD, tokens_BT, self.positions(tokens_BT.shape[1]), mask, causal)

    def _guess(self, state_BTD: Tensor, tokens_BT: Tensor, mask: Tensor | None, level: int) -> tuple[Tensor, Tensor]:
        """A pass over speculative rows of one level, which share their RoPE position."""
        self.num_speculative_rows += tokens_BT.numel()
        with self.measured():
            positions_BT = (self.cache.lengths_B + level)[:, None].expand_as(tokens_BT)
            return self._step(state_BTD, tokens_BT, positions_BT, mask)

    def _step(
        self, state_BTD: Tensor, tokens_BT: Tensor, positions_BT: Tensor, mask: Tensor | None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.slot_layers[0].update(k, v)
            return grouped_attention(q, keys, values, mask, causal)

        self.num_forwards += 1
        embeds_BTD = embedding(tokens_BT, self.table_VD).to(self.dtype)
        return self.draft.step(state_BTD, embeds_BTD, positions_BT, attend)

    def _logits(self, head_in: Tensor) -> Tensor:
        with self.measured():
            return self.head(head_in)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).clamp_(max=0)


def _rows(x_BFD: Tensor, index_BM: Tensor) -> Tensor:
    """x[b, index[b, m]] -> [B, M, D]."""
    return x_BFD.gather(1, index_BM[:, :, None].expand(-1, -1, x_BFD.shape[-1]))
