"""Trees of drafted tokens: chains, and EAGLE-2's dynamic trees chosen from the draft's own probabilities.

    node 0 is the root: the last token that is certain. Node i > 0 continues node parents[i] < i.
    A path from the root is a guess at the text; its nodes are verified in one pass of the target.

Letters: B rows, Q nodes, F frontier nodes, K children per frontier node, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError


@dataclass(frozen=True)
class TreeShape:
    """Size of the tree that a pass verifies, in EAGLE's terms.

    total_token: nodes verified at once, the root included. top_k: frontier width and children per node. depth: how
    often the frontier is expanded after the root's own children, so the longest path drafts depth + 1 tokens.
    top_k 1 is a chain.
    """

    total_token: int = 60
    depth: int = 7
    top_k: int = 10

    def __post_init__(self) -> None:
        for name, least in (("total_token", 2), ("depth", 0), ("top_k", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, found {getattr(self, name)}")

    @classmethod
    def chain(cls, num_draft_tokens: int) -> TreeShape:
        """A chain of that many drafted tokens."""
        if num_draft_tokens < 1:
            raise ConfigError(f"num_draft_tokens: expected at least 1, found {num_draft_tokens}")
        return cls(total_token=num_draft_tokens + 1, depth=num_draft_tokens - 1, top_k=1)

    @classmethod
    def from_steps(cls, num_steps: int, top_k: int, num_verify: int) -> TreeShape:
        """SGLang's `--speculative-num-steps`, `--speculative-eagle-topk`, `--speculative-num-draft-tokens`."""
        return cls(total_token=num_verify, depth=num_steps - 1, top_k=top_k)

    @property
    def is_chain(self) -> bool:
        return self.top_k == 1

    @property
    def longest_path(self) -> int:
        """Most drafted tokens that one pass can accept."""
        return min(self.depth + 1, self.total_token - 1)


@dataclass
class TokenTree:
    """One tree per row. tokens_BQ, parents_BQ (the root's is itself), depths_BQ int64; ancestors_BQQ bool: node i has
    j among its ancestors or is j. longest_path: no node is deeper; None: not known."""

    tokens_BQ: Tensor
    parents_BQ: Tensor
    depths_BQ: Tensor
    ancestors_BQQ: Tensor
    longest_path: int | None = None
    draft_probs_BKV: Tensor | None = None  # of a chain whose tokens were drawn: what each was drawn from

    @property
    def num_nodes(self) -> int:
        return self.tokens_BQ.shape[1]

    @property
    def max_path_nodes(self) -> int:
        """Nodes of the longest path, the root included."""
        deepest = self.num_nodes - 1 if self.longest_path is None else self.longest_path
        return min(deepest + 1, self.num_nodes)


def chain_tree(root_B: Tensor, drafted: Sequence[Tensor], probabilities: Sequence[Tensor] = ()) -> TokenTree:
    """The chain root, drafted[0], drafted[1], ... (each [B] target ids); probabilities: what each was drawn from."""
    tokens_BQ = torch.stack([root_B, *drafted], 1)
    num_rows, num_nodes = tokens_BQ.shape
    depths_Q = torch.arange(num_nodes, device=root_B.device)
    return TokenTree(
        tokens_BQ,
        parents_BQ=(depths_Q - 1).clamp_(min=0).expand(num_rows, -1),
        depths_BQ=depths_Q.expand(num_rows, -1),
        ancestors_BQQ=(depths_Q <= depths_Q[:, None]).expand(num_rows, -1, -1),
        longest_path=num_nodes - 1,
        draft_probs_BKV=torch.stack([*probabilities], 1) if probabilities else None,
    )


def tree_from_parents(tokens_BQ: Tensor, parents_BQ: Tensor, max_depth: int) -> TokenTree:
    """A tree whose nodes are sorted so that parents[i] < i, the root first and its own parent; no deeper than
    `max_depth`."""
    num_nodes = tokens_BQ.shape[1]
    # (I + P) to a power of at least the depth reaches every ancestor; squaring gets there in log2 steps.
    reached_BQQ = torch.nn.functional.one_hot(parents_BQ, num_nodes).to(torch.float32)
    reached_BQQ.diagonal(dim1=1, dim2=2).fill_(1)
    steps = 1
    while steps < max_depth:
        reached_BQQ = (reached_BQQ @ reached_BQQ).clamp_(max=1)
        steps *= 2
    ancestors_BQQ = reached_BQQ > 0
    return TokenTree(tokens_BQ, parents_BQ, ancestors_BQQ.sum(-1) - 1, ancestors_BQQ, max_depth)


class Level(NamedTuple):
    """Drafted nodes that were proposed together: tokens, cumulative log-probabilities, and parents, counted over the
    nodes of all levels in their order (-1: the root). A parent comes before its children."""

    tokens_BM: Tensor
    scores_BM: Tensor
    parents_BM: Tensor


def best_tree(root_B: Tensor, levels: Sequence[Level], shape: TreeShape) -> TokenTree:
    """The root and the `total_token - 1` drafted nodes of highest score.

    A child never scores above its parent and stands behind it, so a stable sort keeps the selection closed under
    parents even where scores are equal (a probability of exactly 1).
    """
    tokens_BM, scores_BM, parents_BM = (torch.cat(parts, 1) for parts in zip(*levels))
    count = min(shape.total_token - 1, tokens_BM.shape[1])
    chosen_BQ = scores_BM.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    parents_BQ = parents_BM.gather(1, chosen_BQ)
    # Place of the parent among the chosen, plus one for the root; -1, the root's, becomes 0.
    places_BQ = torch.searchsorted(chosen_BQ, parents_BQ.contiguous()) + 1
    places_BQ = torch.where(parents_BQ < 0, 0, places_BQ)
    tokens_BQ = torch.cat([root_B[:, None], tokens_BM.gather(1, chosen_BQ)], 1)
    parents_BQ = torch.cat([places_BQ.new_zeros(len(root_B), 1), places_BQ], 1)
    return tree_from_parents(tokens_BQ, parents_BQ, shape.longest_path)
