"""Trees, masks, cache slots and verification, against structures and distributions written out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.kv_cache import SlotCache, slot_mask
from specforge_lite.inference.tree import (
    Level,
    TokenTree,
    TreeShape,
    best_tree,
    chain_tree,
    tree_from_parents,
)
from specforge_lite.inference.verify import Sampling, accept_greedy, accept_sampled, near_ties, sample_walk

X, _ = True, False

# ------------------------------------------------------------------------------------------------------------- trees

#        0
#       / \
#      1   2
#     / \   \
#    3   4   5
#        |
#        6
PARENTS = [0, 0, 0, 1, 1, 2, 4]
ANCESTORS = [
    [X, _, _, _, _, _, _],
    [X, X, _, _, _, _, _],
    [X, _, X, _, _, _, _],
    [X, X, _, X, _, _, _],
    [X, X, _, _, X, _, _],
    [X, _, X, _, _, X, _],
    [X, X, _, _, X, _, X],
]


def hand_tree(num_rows: int = 1) -> TokenTree:
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5, 6]]).repeat(num_rows, 1)
    return tree_from_parents(tokens, torch.tensor([PARENTS]).repeat(num_rows, 1), max_depth=3)


def test_ancestors_and_depths_of_a_tree_drawn_by_hand() -> None:
    tree = hand_tree()
    assert tree.ancestors_BQQ[0].tolist() == ANCESTORS
    assert tree.depths_BQ[0].tolist() == [0, 1, 1, 2, 2, 2, 3]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_ancestors_of_any_tree(numbers: list[int]) -> None:
    parents = [0] + [number % (i + 1) for i, number in enumerate(numbers)]
    depth = [0] * len(parents)
    for i in range(1, len(parents)):
        depth[i] = depth[parents[i]] + 1
    tree = tree_from_parents(torch.zeros(1, len(parents), dtype=torch.int64), torch.tensor([parents]), max(depth))
    assert tree.depths_BQ[0].tolist() == depth
    for i in range(len(parents)):
        path, node = {0, i}, i
        while node:
            node = parents[node]
            path.add(node)
        assert tree.ancestors_BQQ[0, i].nonzero().flatten().tolist() == sorted(path)


def test_chain() -> None:
    tree = chain_tree(torch.tensor([7, 8]), [torch.tensor([1, 2]), torch.tensor([3, 4])])
    assert tree.tokens_BQ.tolist() == [[7, 1, 3], [8, 2, 4]]
    assert tree.parents_BQ.tolist() == [[0, 0, 1]] * 2
    assert tree.ancestors_BQQ[1].tolist() == [[X, _, _], [X, X, _], [X, X, X]]
    assert tree.depths_BQ[1].tolist() == [0, 1, 2]


def test_best_tree_keeps_the_highest_scores_and_their_parents() -> None:
    """Two levels; a certain child (score equal to its parent's) must not push its parent out."""
    pool = [
        Level(torch.tensor([[11, 12]]), torch.tensor([[-0.5, -1.0]]), torch.tensor([[-1, -1]])),
        Level(torch.tensor([[21, 22, 23, 24]]), torch.tensor([[-0.5, -3.0, -1.0, -4.0]]), torch.tensor([[0, 0, 1, 1]])),
    ]
    tree = best_tree(torch.tensor([99]), pool, TreeShape(total_token=5, depth=1, top_k=2))
    assert tree.tokens_BQ.tolist() == [[99, 11, 12, 21, 23]]
    assert tree.parents_BQ.tolist() == [[0, 0, 0, 1, 2]]
    small = best_tree(torch.tensor([99]), pool, TreeShape(total_token=2, depth=1, top_k=2))
    assert small.tokens_BQ.tolist() == [[99, 11]]  # not 21, which has the same score
    everything = best_tree(torch.tensor([99]), pool, TreeShape(total_token=60, depth=1, top_k=2))
    assert everything.tokens_BQ.tolist() == [[99, 11, 12, 21, 22, 23, 24]]


def test_shapes() -> None:
    assert TreeShape.chain(5) == TreeShape(total_token=6, depth=4, top_k=1)
    assert TreeShape.chain(5).longest_path == 5
    assert TreeShape().longest_path == 8
    assert TreeShape(total_token=3, depth=7, top_k=4).longest_path == 2
    assert TreeShape.from_steps(3, 4, 16) == TreeShape(total_token=16, depth=2, top_k=4)
    for bad in ({"total_token": 1}, {"depth": -1}, {"top_k": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            TreeShape(**bad)
    with pytest.raises(ConfigError, match="num_draft_tokens"):
        TreeShape.chain(0)


# ------------------------------------------------------------------------------------------------------------- cache


def test_mask_of_rows_with_different_lengths() -> None:
    """Row 0 has 1 accepted slot, row 1 has 3; two new tokens each, the second sees the first."""
    sees = torch.tensor([[X, _], [X, X]]).expand(2, -1, -1)
    mask = slot_mask([1, 3], sees, 5, torch.float32)
    low = torch.finfo(torch.float32).min
    expected = [
        [[[0, 0, low, low, low], [0, 0, 0, low, low]]],
        [[[0, 0, 0, 0, low], [0, 0, 0, 0, 0]]],
    ]
    assert mask.tolist() == expected
    even = slot_mask([2, 2], sees, 4, torch.float32)
    assert even.tolist() == [[[[0, 0, 0, low], [0, 0, 0, 0]]]] * 2


def numbered(values: list[list[int]]) -> torch.Tensor:
    """[B, 1 head, T, 1] keys whose value says which they are."""
    return torch.tensor(values, dtype=torch.float32)[:, None, :, None]


def write(cache: SlotCache, values: list[list[int]], offset: int = 0, row: int | None = None) -> list[list[int]]:
    cache.begin(len(values[0]), offset, row)
    keys, _values = cache.update(numbered(values), numbered(values) + 0.5, 0)
    return keys[:, 0, :, 0].tolist()


@pytest.mark.parametrize("capacity", [1, 16])
def test_slots_of_two_rows(capacity: int) -> None:
    cache = SlotCache(1, 2, capacity, torch.device("cpu"))
    assert write(cache, [[1, 2, 3]], row=0) == [[1, 2, 3]]
    cache.advance([3], row=0)
    assert write(cache, [[4]], row=1) == [[4]]
    cache.advance([1], row=1)
    assert write(cache, [[10, 11, 12], [20, 21, 22]]) == [[1, 2, 3, 10, 11, 12], [4, 20, 21, 22, 0, 0]]
    cache.keep([[0, 2], [0, 1, 2]])  # row 0 skips a node: its slots move
    assert cache.lengths == [5, 4]
    assert write(cache, [[30], [40]]) == [[1, 2, 3, 10, 12, 30], [4, 20, 21, 22, 40, 0]]
    cache.keep([[0], [0]])
    cache.select_rows([1])
    assert cache.lengths == [5]
    assert write(cache, [[50, 51, 52]]) == [[4, 20, 21, 22, 40, 50, 51, 52]]
    cache.keep([[0, 2]])
    assert write(cache, [[60]]) == [[4, 20, 21, 22, 40, 50, 52, 60]]
    values = cache.slot_layers[0].values[0, 0, :8, 0].tolist()
    assert values == [4.5, 20.5, 21.5, 22.5, 40.5, 50.5, 52.5, 60.5]


def test_levels_of_a_draft_tree_are_written_behind_each_other() -> None:
    cache = SlotCache(1, 1, 4, torch.device("cpu"))
    write(cache, [[1, 2]], row=0)
    cache.advance([2])
    write(cache, [[10, 11]], offset=0)
    assert write(cache, [[20, 21]], offset=2) == [[1, 2, 10, 11, 20, 21]]
    assert write(cache, [[3]]) == [[1, 2, 3]]  # nothing of the tree was accepted


# ------------------------------------------------------------------------------------------------------ verification


def logits_that_say(next_tokens: list[int], vocab: int = 10) -> torch.Tensor:
    """[1, Q, V]: after node i the target says next_tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor([next_tokens]), vocab).float()


@pytest.mark.parametrize(
    ("says", "path", "bonus"),
    [
        ([1, 4, 0, 0, 6, 0, 7], [0, 1, 4, 6], 7),  # all the way down
        ([1, 4, 0, 0, 8, 0, 7], [0, 1, 4], 8),
        ([2, 4, 5, 0, 6, 3, 7], [0, 2, 5], 3),
        ([2, 4, 3, 0, 6, 3, 7], [0, 2], 3),
        ([3, 4, 5, 0, 6, 3, 7], [0], 3),  # 3 is in the tree, but not below the root
    ],
)
def test_greedy_path(says: list[int], path: list[int], bonus: int) -> None:
    verdict = accept_greedy(hand_tree(), logits_that_say(says))
    assert (verdict.paths, verdict.bonus) == ([path], [bonus])
    assert verdict.tokens == [[[9, 1, 2, 3, 4, 5, 6][place] for place in path]]
    cold = Sampling(temperature=1e-3)  # as good as greedy
    assert accept_sampled(hand_tree(), logits_that_say(says), cold) == verdict


def test_greedy_paths_of_several_rows() -> None:
    logits = torch.cat([logits_that_say([1, 3, 0, 5, 0, 0, 0]), logits_that_say([7, 0, 0, 0, 0, 0, 0])])
    verdict = accept_greedy(hand_tree(2), logits)
    assert (verdict.paths, verdict.bonus) == ([[0, 1, 3], [0]], [5, 7])


def test_near_ties_are_those_within_rounding() -> None:
    eps = torch.finfo(torch.float32).eps
    rows = torch.tensor([[8.0, 8.0, 0.0], [8.0, 8.0 - 64 * eps, 0.0], [8.0, 7.99, 0.0], [0.0, 1.0, -1e5]])
    assert near_ties(rows, 16.0).tolist() == [True, True, False, False]
    assert near_ties(rows, 2e6).tolist() == [True, True, True, True]
    assert near_ties(rows, 4.0).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 7, 0.6)]
)
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(Sampling(temperature, top_p, top_k).probabilities(logits), expected.softmax(-1))


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 1.5}, {"top_k": -2}])
def test_bad_sampling(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)


# ------------------------------------------------------------------------------------ the law of what sampling emits

NUM_DRAWS, VOCAB = 100_000, 5


def markov_target(seed: int) -> torch.Tensor:
    """Logits [V, V] of the next token given the last."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def tree_of(kind: str) -> TokenTree:
    if kind == "chain":
        tokens, parents = [0, 3, 1, 2], [0, 0, 1, 2]
    else:  # the root's children 1, 3, 4; below them 0, 2 and 3; below that 1
        tokens, parents = [0, 1, 3, 4, 0, 2, 3, 1], [0, 0, 0, 0, 1, 1, 3, 4]
    return tree_from_parents(torch.tensor([tokens]), torch.tensor([parents]), 3)


def expand(tree: TokenTree, num_rows: int) -> TokenTree:
    return TokenTree(
        tree.tokens_BQ.expand(num_rows, -1),
        tree.parents_BQ.expand(num_rows, -1),
        tree.depths_BQ.expand(num_rows, -1),
        tree.ancestors_BQQ.expand(num_rows, -1, -1),
    )


def published_walk(
    tree: TokenTree, probs: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule as published, for NUM_DRAWS rows at once: try the children in turn, accept x with probability p(x), else
    zero p(x) and renormalise; the bonus comes from what is left. -> (last place, bonus)."""
    tokens, parents = tree.tokens_BQ[0].tolist(), tree.parents_BQ[0].tolist()
    place = torch.zeros(NUM_DRAWS, dtype=torch.int64)
    left = probs[tokens[0]].repeat(NUM_DRAWS, 1)
    for child in range(1, len(tokens)):  # sorted by level, so a node comes after its parent and its elder siblings
        trying = place == parents[child]
        accept = trying & (torch.rand(NUM_DRAWS, generator=generator) < left[:, tokens[child]])
        refused = trying & ~accept
        left[refused, tokens[child]] = 0
        left[refused] /= left[refused].sum(-1, keepdim=True)
        place[accept] = child
        left[accept] = probs[tokens[child]]
    return place, torch.multinomial(left, 1, generator=generator)[:, 0]


def first_three(
    tree: TokenTree, place: torch.Tensor, bonus: torch.Tensor, probs: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The first three tokens of every draw [N, 3], continued by plain sampling where the pass gave fewer."""
    tokens, parents = tree.tokens_BQ[0].tolist(), tree.parents_BQ[0].tolist()
    paths = []
    for node in range(len(tokens)):
        path = []
        while node:
            path.insert(0, tokens[node])
            node = parents[node]
        paths.append(path)
    lengths = torch.tensor([len(path) for path in paths])[place]
    emitted = torch.tensor([(path + [0] * 4)[:4] for path in paths])[place]
    emitted.scatter_(1, lengths[:, None], bonus[:, None])
    for position in (1, 2):
        drawn = torch.multinomial(probs[emitted[:, position - 1]], 1, generator=generator)[:, 0]
        emitted[:, position] = torch.where(lengths < position, drawn, emitted[:, position])
    return emitted[:, :3]


def chi_square(texts: torch.Tensor, root: int, probs: torch.Tensor) -> float:
    """Pearson's statistic over all texts of three tokens, as standard deviations from its mean."""
    expected, observed = [], []
    code = texts @ torch.tensor([VOCAB**2, VOCAB, 1])
    counts = torch.bincount(code, minlength=VOCAB**3).tolist()
    for index, (a, b, c) in enumerate(itertools.product(range(VOCAB), repeat=3)):
        probability = float(probs[root, a] * probs[a, b] * probs[b, c])
        expected.append(probability * len(texts))
        observed.append(counts[index])
    cells = [(o, e) for o, e in zip(observed, expected) if e >= 5]
    rest = sum(e for e in expected if e < 5)
    if rest:
        cells.append((sum(o for o, e in zip(observed, expected) if e < 5), rest))
    degrees = len(cells) - 1
    return (sum((o - e) ** 2 / e for o, e in cells) - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize("kind", ["chain", "tree"])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.2, top_p=0.9)], ids=str)
def test_sampled_text_follows_the_targets_distribution(kind: str, sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(1)
    table, tree = markov_target(seed=3), tree_of(kind)
    probs = sampling.probabilities(table)
    logits = table[tree.tokens_BQ[0]].expand(NUM_DRAWS, -1, -1)
    place, bonus, on_path = sample_walk(expand(tree, NUM_DRAWS), logits, sampling, generator)
    assert torch.equal(on_path, tree.ancestors_BQQ[0][place])
    assert chi_square(first_three(tree, place, bonus, probs, generator), 0, probs) < 4

    wrong = torch.where(bonus == 4, 0, bonus)  # the test can fail: a bonus token that is never 4
    if float(probs[:, 4].max()) > 0.05:
        assert chi_square(first_three(tree, place, wrong, probs, generator), 0, probs) > 40


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_sampled_walk_has_the_law_of_the_published_rule(kind: str) -> None:
    """Joint frequencies of (last accepted place, bonus token) agree, and both give the target's text."""
    generator = torch.Generator().manual_seed(2)
    table, tree = markov_target(seed=4), tree_of(kind)
    probs = table.softmax(-1)
    logits = table[tree.tokens_BQ[0]].expand(NUM_DRAWS, -1, -1)
    place, bonus, _on_path = sample_walk(expand(tree, NUM_DRAWS), logits, Sampling(1.0), generator)
    other_place, other_bonus = published_walk(tree, probs, generator)
    assert chi_square(first_three(tree, other_place, other_bonus, probs, generator), 0, probs) < 4
    cells = tree.num_nodes * VOCAB
    ours = torch.bincount(place * VOCAB + bonus, minlength=cells).double()
    published = torch.bincount(other_place * VOCAB + other_bonus, minlength=cells).double()
    both = ours + published
    kept = both >= 10
    statistic = float(((ours - published)[kept] ** 2 / both[kept]).sum())
    degrees = int(kept.sum())
    assert (statistic - degrees) / (2 * degrees) ** 0.5 < 4
