"""A draft whose acceptance is known: right with set chances, and as costly as a network of its width."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.inference_drafts import OracleDraft

FAR = 1000  # rank of a miss that no tree catches


def rank_plan(chances: Sequence[float], seed: int = 0) -> Callable[[int], int]:
    """position -> rank of the right token there: 0 with chance chances[0], 1 with chances[1], ..., else far."""
    ranks = random.Random(seed).choices([*range(len(chances)), FAR], [*chances, 1 - sum(chances)], k=4096)
    return lambda position: ranks[position]


class RankedDraft(OracleDraft):
    """OracleDraft with all rows' logits made at once. Probabilities fall by rank as `chances` do, so that a tree is
    built as for a draft that knows how sure it may be."""

    def __init__(
        self, table_VD: Tensor, texts: list[list[int]], chances: Sequence[float], aux_layer_ids: tuple[int, ...]
    ) -> None:
        super().__init__(table_VD, texts, rank_plan(chances), aux_layer_ids)
        self.top_L = torch.tensor([*chances]).log()
        self.floor = float(torch.tensor((1 - sum(chances)) / len(table_VD)).log())
        self.square_V = self.table_VD.square().sum(-1)

    def step(self, state_BTD: Tensor, embeds_BTD: Tensor, position_ids_BT: Tensor, attend: object):  # type: ignore[no-untyped-def]
        tokens_BT = (self.square_V - 2 * embeds_BTD @ self.table_VD.T).argmin(-1)
        return state_BTD, torch.stack([position_ids_BT + 1, tokens_BT], -1).to(state_BTD.dtype)

    def logits(self, head_input: Tensor) -> Tensor:
        vocab = self.config.vocab_size
        flat = head_input.flatten(0, -2).to(torch.int64).tolist()
        logits_MV = torch.full((len(flat), vocab), self.floor)
        for row, (position, token) in enumerate(flat):
            right = self.next_token.get((position, token))
            rank = FAR if right is None else self.rank_of(position)
            first = (7 * position + token if right is None else right + 1) % vocab
            others = [(first + i) % vocab for i in range(len(self.top_L))]
            guesses = others if rank == FAR else [*others[:rank], right, *others[rank:]][: len(self.top_L)]
            logits_MV[row, guesses] = self.top_L
        return logits_MV.view(*head_input.shape[:-1], vocab)


def ranked_draft(
    table_VD: Tensor,
    texts: list[list[int]],
    chances: Sequence[float] = (0.64, 0.10, 0.055, 0.025, 0.02, 0.013, 0.01, 0.009),
    aux_layer_ids: tuple[int, ...] = (1, 3, 4),
) -> RankedDraft:
    """For a target with this embedding table that will write `texts` (prompts included)."""
    return RankedDraft(table_VD, texts, chances, aux_layer_ids)
