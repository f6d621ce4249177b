"""Which drafted tokens the target accepts: exactly those that it would have produced itself.

Greedy: the path whose every token is the target's argmax after its parent. Sampling: the drafted children of a node
are distinct and fixed, so drawing the next token from the target's own distribution p, and walking on while the drawn
token is among the children, has the law of the published rule: try the children in turn, accept x with probability
p(x), else zero p(x) and renormalise, and take the bonus token from what is left. (Both give token x with probability
p(x); tests compare the two.)

Letters: B rows, Q nodes, P path nodes, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.tree import TokenTree

LOOK_AFTER_LEVELS = 3


@dataclass(frozen=True)
class Sampling:
    """How the target's next token is chosen. temperature 0 is greedy; top_p 0 or 1 and top_k 0 switch those off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # NaN is refused as well
            raise ConfigError(f"temperature: expected a number of at least 0, found {self.temperature}")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_p: expected 0..1, found {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected at least 0, found {self.top_k}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= 1e-5

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [..., V] -> probabilities in fp32; temperature, then top_k, then top_p, as transformers does."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if 0 < self.top_p < 1:
            ordered, places = logits.sort(-1, descending=False)
            # Drop the tail whose total is at most 1 - top_p; the most probable token always stays.
            drop = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            drop[..., -1] = False
            logits = logits.masked_fill(drop.scatter(-1, places, drop), -torch.inf)
        return logits.softmax(-1)

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token per row of logits [B, V] -> [B]."""
        if self.is_greedy:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]


@dataclass
class Verdict:
    """Accepted places of every row's tree, the root first, and the token that follows the last of them."""

    paths: list[list[int]]
    bonus: list[int]
    tokens: list[list[int]]  # the tokens of the path, the root's included
    near: list[list[bool]] = field(default_factory=list)  # may the token after a node be decided by rounding?


def accept_greedy(tree: TokenTree, logits_BQV: Tensor, tie_units: float = 0.0) -> Verdict:
    """The longest path of argmax tokens; one transfer to the host. tie_units: see `near_ties`; 0: not looked at."""
    choice_BQ = logits_BQV.argmax(-1)
    matches_BQ = tree.tokens_BQ == choice_BQ.gather(1, tree.parents_BQ)
    matches_BQ[:, 0] = True
    # Siblings are distinct, so the accepted nodes are one path and the deepest of them has all others as ancestors.
    on_path_BQ = ~(tree.ancestors_BQQ & ~matches_BQ[:, None, :]).any(-1)
    last_B1 = tree.depths_BQ.masked_fill(~on_path_BQ, -1).argmax(-1, keepdim=True)
    return _verdict(tree, on_path_BQ, choice_BQ.gather(1, last_B1), logits_BQV, tie_units)


def accept_sampled(
    tree: TokenTree, logits_BQV: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> Verdict:
    """Walk every row's tree by draws from the target's distribution; one level of all rows at a time. A chain whose
    tokens were drawn from the draft's distribution is accepted by the rule of speculative sampling."""
    if tree.draft_probs_BKV is None:
        _, bonus_B, on_path_BQ = sample_walk(tree, logits_BQV, sampling, generator)
    else:
        bonus_B, on_path_BQ = speculative_walk(tree, tree.draft_probs_BKV, logits_BQV, sampling, generator)
    return _verdict(tree, on_path_BQ, bonus_B[:, None], logits_BQV, 0.0)


def _verdict(tree: TokenTree, on_path_BQ: Tensor, bonus_B1: Tensor, logits_BQV: Tensor, tie_units: float) -> Verdict:
    """Bring paths, their tokens, what follows, and near ties to the host in one piece."""
    count = tree.max_path_nodes
    places_BP = on_path_BQ.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, :count]
    pieces = [on_path_BQ.sum(-1, keepdim=True), bonus_B1, places_BP, tree.tokens_BQ.gather(1, places_BP)]
    if tie_units:
        index_BPV = places_BP[:, :, None].expand(-1, -1, logits_BQV.shape[-1])
        pieces.append(near_ties(logits_BQV.gather(1, index_BPV), tie_units))
    rows = torch.cat(pieces, 1).tolist()
    return Verdict(
        paths=[row[2 : 2 + row[0]] for row in rows],
        bonus=[row[1] for row in rows],
        tokens=[row[2 + count : 2 + count + row[0]] for row in rows],
        near=[[bool(flag) for flag in row[2 + 2 * count :][: row[0]]] for row in rows] if tie_units else [],
    )


def speculative_walk(
    tree: TokenTree, q_BKV: Tensor, logits_BQV: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Of a chain whose tokens x_k were drawn from q_k -> (token after the accepted ones [B], their places [B, Q] bool).

    x_k is kept with probability min(1, p_k(x_k) / q_k(x_k)); behind the first that is not, the next token is drawn from
    max(p_k - q_k, 0), renormalised; behind the last one from p. (Leviathan et al. 2023, algorithm 1.)
    """
    num_drafted = q_BKV.shape[1]
    p_BQV = sampling.probabilities(logits_BQV)
    tokens_BK1 = tree.tokens_BQ[:, 1:, None]
    p_BK, q_BK = (probs.gather(2, tokens_BK1)[..., 0] for probs in (p_BQV[:, :num_drafted], q_BKV))
    uniform_BK = torch.rand(p_BK.shape, generator=generator, device=p_BK.device)
    kept_B = (uniform_BK * q_BK < p_BK).long().cumprod(1).sum(1)
    rows_B = torch.arange(len(kept_B), device=kept_B.device)
    rest_BV = p_BQV[rows_B, kept_B]
    refused_B = kept_B < num_drafted
    drafted_BV = q_BKV[rows_B, kept_B.clamp(max=num_drafted - 1)]
    residual_BV = torch.where(refused_B[:, None], (rest_BV - drafted_BV).clamp(min=0), rest_BV)
    empty_B1 = residual_BV.sum(1, keepdim=True) <= 0  # p = q up to rounding: the draw is from p
    bonus_B = torch.multinomial(torch.where(empty_B1, rest_BV, residual_BV), 1, generator=generator)[:, 0]
    return bonus_B, torch.arange(tree.num_nodes, device=kept_B.device) <= kept_B[:, None]


def sample_walk(
    tree: TokenTree, logits_BQV: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (last accepted place [B], token drawn after it [B], places of the path [B, Q] bool).

    The host looks once whether all rows have ended, not at every level: each look is a wait.
    """
    num_rows = len(tree.tokens_BQ)
    rows_B = torch.arange(num_rows, device=logits_BQV.device)
    place_B = torch.zeros_like(rows_B)
    drawn_B = torch.zeros_like(rows_B)
    walking_B = torch.ones_like(rows_B, dtype=torch.bool)
    is_child_BQ = torch.ones_like(tree.tokens_BQ, dtype=torch.bool)
    is_child_BQ[:, 0] = False  # the root is its own parent
    for level in range(tree.max_path_nodes):
        if level == LOOK_AFTER_LEVELS and not bool(walking_B.any()):
            break
        fresh_B = sampling.draw(logits_BQV[rows_B, place_B], generator)
        drawn_B = torch.where(walking_B, fresh_B, drawn_B)
        hit_BQ = is_child_BQ & (tree.parents_BQ == place_B[:, None]) & (tree.tokens_BQ == drawn_B[:, None])
        walking_B = walking_B & hit_BQ.any(-1)
        place_B = torch.where(walking_B, hit_BQ.to(torch.int64).argmax(-1), place_B)
    return place_B, drawn_B, tree.ancestors_BQQ[rows_B, place_B]


def near_ties(logits_V: Tensor, units: float) -> Tensor:
    """Logits [..., V] -> bool [...]: the best entry leads the next one by less than `units` units in the last place of
    the largest logit, so that passes of different shapes may disagree on the argmax."""
    finite = logits_V.masked_fill(logits_V == -torch.inf, 0.0)  # tokens that the generation config rules out
    margin = units * torch.finfo(logits_V.dtype).eps * finite.abs().amax(-1, keepdim=True)
    return (logits_V > logits_V.amax(-1, keepdim=True) - margin).sum(-1) > 1
