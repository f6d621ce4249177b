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

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from specforge_lite.inference.attention import grouped_attention
from specforge_lite.inference.kv_cache import SlotCache, slot_mask
from specforge_lite.inference.tree import Candidates, TokenTree, TreeShape, best_tree, chain_tree
from specforge_lite.inference.verify import Sampling
from specforge_lite.model.draft import Draft

Head = Callable[[Tensor], Tensor]


class Drafter:
    """A draft with its cache for one batch of texts.

    table_VD: token embeddings the draft reads (the target's). head: [..., D] -> draft logits; default: the draft's own.
    `num_forwards` counts calls of the network, `num_true_rows` rows with true features (each text position once),
    `num_speculative_rows` the others; `seconds` is time inside the network.
    """

    def __init__(self, draft: Draft, table_VD: Tensor, head: Head | None = None) -> None:
        self.draft = draft
        own_table = getattr(draft, "embed_tokens", None)
        self.table_VD = table_VD if own_table is None else own_table.weight
        self.head: Head = head or draft.logits
        draft.prepare_decoding()
        self.device = table_VD.device
        self.dtype = next(draft.parameters()).dtype
        self.target_ids_Vd = draft.target_ids if bool(draft.d2t.any()) else None
        self.num_forwards = self.num_true_rows = self.num_speculative_rows = 0
        self.seconds, self.clock = 0.0, time.perf_counter
        self.cache = SlotCache(1, 0, 0, self.device)
        self.state_B1D = torch.empty(0)
        self.logits_BVd = torch.empty(0)

    def start(self, batch_size: int, capacity: int) -> None:
        """Forget everything; expect `batch_size` texts."""
        width, vocab = self.draft.config.hidden_size, self.draft.config.draft_vocab_size
        self.cache = SlotCache(1, batch_size, capacity, self.device)
        self.state_B1D = torch.zeros(batch_size, 1, width, dtype=self.dtype, device=self.device)
        self.logits_BVd = torch.zeros(batch_size, vocab, dtype=self.dtype, device=self.device)

    def read_prompt(self, row: int, features_TG: Tensor, next_tokens_T: Tensor) -> None:
        """True rows of one text's prompt: features of its tokens, and the token after each."""
        num_rows = len(next_tokens_T)
        self.cache.begin(num_rows, row=row)
        state, head_in = self._step(self._first_state(features_TG[None]), next_tokens_T[None], None, causal=True)
        self._remember(state[:, -1:], head_in[:, -1:], row)
        self.cache.advance([num_rows], row=row)
        self.num_true_rows += num_rows

    def read_accepted(
        self, features_BMG: Tensor, next_tokens_BM: Tensor, counts: Sequence[int], counts_B: Tensor
    ) -> None:
        """True rows of the tokens just accepted; row b has `counts[b]` of them, the rest is padding. counts_B: the same
        on the device."""
        num_new = next_tokens_BM.shape[1]
        self.cache.begin(num_new)
        mask = None
        if num_new > 1 or self.cache.plan.start is None:
            causal_QQ = torch.ones(num_new, num_new, dtype=torch.bool, device=self.device).tril()
            mask = self._mask(causal_QQ.expand(len(counts), -1, -1))
        state, head_in = self._step(self._first_state(features_BMG), next_tokens_BM, mask)
        if min(counts) == num_new:
            state, head_in = state[:, -1:], head_in[:, -1:]
        else:
            rows, last = torch.arange(len(counts), device=self.device), counts_B - 1
            state, head_in = state[rows, last][:, None], head_in[rows, last][:, None]
        self._remember(state, head_in, None)
        self.cache.advance(counts, counts_B=counts_B)
        self.num_true_rows += sum(counts)

    def select_rows(self, rows: Sequence[int], index_R: Tensor) -> None:
        """Drop all texts but these. index_R: the same on the device."""
        self.cache.select_rows(rows, index_R)
        self.state_B1D, self.logits_BVd = self.state_B1D[index_R], self.logits_BVd[index_R]

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
            return self._propose_chain(root_B, shape, sampling, generator)
        return self._propose_tree(root_B, shape)

    # ------------------------------------------------------------------------------------------------------- proposals

    def _propose_chain(
        self, root_B: Tensor, shape: TreeShape, sampling: Sampling | None, generator: torch.Generator | None
    ) -> TokenTree:
        probabilities: list[Tensor] = []

        def choose(logits_BVd: Tensor) -> Tensor:
            if sampling is None or sampling.is_greedy:
                return self._to_target(logits_BVd.argmax(-1))
            probs_BVd = sampling.probabilities(logits_BVd)
            probabilities.append(self._over_target_vocab(probs_BVd))
            return self._to_target(torch.multinomial(probs_BVd, 1, generator=generator)[:, 0])

        drafted = [choose(self.logits_BVd)]
        state = self.state_B1D
        ones = torch.ones(len(root_B), 1, shape.longest_path, dtype=torch.bool, device=self.device)
        for level in range(shape.longest_path - 1):
            self.cache.begin(1, offset=level)
            mask = self._mask(ones[:, :, : level + 1]) if self.cache.plan.start is None else None
            state, head_in = self._step(state, drafted[-1][:, None], mask, offset=level, speculative=True)
            drafted.append(choose(self._logits(head_in)[:, -1]))
        tree = chain_tree(root_B, drafted)
        tree.draft_probs_BKV = torch.stack(probabilities, 1) if probabilities else None
        return tree

    def _propose_tree(self, root_B: Tensor, shape: TreeShape) -> TokenTree:
        """EAGLE-2: expand the `top_k` best nodes of each level, then keep the best of all (see `best_tree`)."""
        num_rows, top_k = len(root_B), min(shape.top_k, self.draft.config.draft_vocab_size)
        pool = Candidates()
        scores_BF, ids_BF = self._log_probs(self.logits_BVd).topk(top_k, -1)
        tokens_BF = self._to_target(ids_BF)
        pool.add(tokens_BF, scores_BF, torch.full_like(tokens_BF, -1))
        index_BF = torch.arange(top_k, device=self.device).expand(num_rows, -1)  # of the frontier, in the pool
        state_BFD = self.state_B1D.expand(-1, top_k, -1)
        itself_BFF = torch.eye(top_k, dtype=torch.bool, device=self.device).expand(num_rows, -1, -1)
        sees_BFN = itself_BFF
        # A path of longest_path tokens needs one expansion less; the root's children are there already.
        for level in range(shape.longest_path - 1):
            self.cache.begin(top_k, offset=level * top_k)
            state_out, head_in = self._step(state_BFD, tokens_BF, self._mask(sees_BFN), offset=level, speculative=True)
            child_scores, child_ids = self._log_probs(self._logits(head_in)).topk(top_k, -1)
            scores_BM = (scores_BF[:, :, None] + child_scores).flatten(1)
            tokens_BM = self._to_target(child_ids).flatten(1)
            first = pool.add(tokens_BM, scores_BM, index_BF.repeat_interleave(top_k, 1))
            if level == shape.longest_path - 2:
                break
            scores_BF, best_BF = scores_BM.topk(top_k, -1)
            tokens_BF, index_BF = tokens_BM.gather(1, best_BF), first + best_BF
            parent_BF = best_BF // top_k
            state_BFD = _rows(state_out, parent_BF)
            sees_BFN = torch.cat([_rows(sees_BFN, parent_BF), itself_BFF], -1)
        return best_tree(root_B, pool, shape)

    # --------------------------------------------------------------------------------------------------------- network

    def _step(
        self,
        state_BTD: Tensor,
        tokens_BT: Tensor,
        mask: Tensor | None,
        offset: int = 0,
        speculative: bool = False,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One pass of the layer over rows planned by `cache.begin`; `offset`: RoPE positions behind the true rows.
        True rows have consecutive positions, speculative ones of one level share theirs."""
        start = self.clock()
        positions_BT = self._positions(tokens_BT.shape[1], offset, speculative)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.slot_layers[0].update(k, v)
            return grouped_attention(q, keys, values, mask, causal)

        embeds_BTD = embedding(tokens_BT, self.table_VD).to(self.dtype)
        result = self.draft.step(state_BTD, embeds_BTD, positions_BT, attend)
        self.num_forwards += 1
        if speculative:
            self.num_speculative_rows += tokens_BT.numel()
        self.seconds += self.clock() - start
        return result

    def _positions(self, width: int, offset: int, speculative: bool) -> Tensor:
        """RoPE positions [B, width] of rows planned by `cache.begin`."""
        lengths = self.cache.lengths if self.cache.plan.row is None else [self.cache.lengths[self.cache.plan.row]]
        self.draft.cover_positions(max(lengths) + offset + width)
        if self.cache.plan.row is not None:
            return torch.arange(lengths[0], lengths[0] + width, device=self.device)[None]
        if speculative:
            return (self.cache.lengths_B + offset)[:, None].expand(-1, width)
        return self.cache.lengths_B[:, None] + torch.arange(width, device=self.device)

    def _first_state(self, features: Tensor) -> Tensor:
        start = self.clock()
        state = self.draft.first_state(features.to(self.dtype))
        self.seconds += self.clock() - start
        return state

    def _logits(self, head_in: Tensor) -> Tensor:
        start = self.clock()
        logits = self.head(head_in)
        self.seconds += self.clock() - start
        return logits

    def _remember(self, state_B1D: Tensor, head_in_B1D: Tensor, row: int | None) -> None:
        """Keep what the next proposal starts from: output state and logits of the last true row."""
        logits_BVd = self._logits(head_in_B1D)[:, -1]
        if row is None:
            self.state_B1D, self.logits_BVd = state_B1D, logits_BVd
        else:
            self.state_B1D[row], self.logits_BVd[row] = state_B1D[0], logits_BVd[0]

    def _mask(self, sees_BQN: Tensor) -> Tensor:
        return slot_mask(self.cache.lengths, sees_BQN, self.cache.plan.end, self.dtype, self.cache.plan.lengths_B)

    def _log_probs(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1).clamp_(max=0)

    def _over_target_vocab(self, probs_BVd: Tensor) -> Tensor:
        """Probabilities of draft ids as those of target ids [B, V]."""
        missing = len(self.table_VD) - probs_BVd.shape[1]
        if self.target_ids_Vd is None:  # the draft ids are the first target ids
            return torch.nn.functional.pad(probs_BVd, (0, missing)) if missing else probs_BVd
        return probs_BVd.new_zeros(len(probs_BVd), len(self.table_VD)).index_copy_(1, self.target_ids_Vd, probs_BVd)

    def _to_target(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self.target_ids_Vd is None else self.target_ids_Vd[draft_ids]


def _rows(x_BFD: Tensor, index_BM: Tensor) -> Tensor:
    """x[b, index[b, m]] -> [B, M, D]."""
    if x_BFD.shape[0] == 1:
        return x_BFD[:, index_BM[0]]
    return x_BFD.gather(1, index_BM[:, :, None].expand(-1, -1, x_BFD.shape[-1]))
