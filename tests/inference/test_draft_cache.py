"""The draft's cache: true rows are computed once, and what it drafts is what a draft without a cache drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import embedding, scaled_dot_product_attention

from specforge_lite.inference import SpeculativeModel, TreeShape
from specforge_lite.inference.decode import Decoding
from specforge_lite.inference.drafter import Drafter
from specforge_lite.inference.output import StopRules
from specforge_lite.inference.verify import Sampling
from tests.inference_drafts import random_draft
from tests.speculative_cases import CHAIN, PROMPTS, TREE, oracle_for, own_answer
from tests.target_families import HIDDEN, VOCAB

# ------------------------------------------------------------------------------------------------ the draft's cache


def watched(speculative: SpeculativeModel, prompts: list[list[int]], shape: TreeShape, check) -> Decoding:
    """Decode 12 tokens; `check(text, tree, row)` sees every tree of every row with the text accepted before it."""
    rules = StopRules(max_new_tokens=12)
    decoding = Decoding(speculative.target, prompts, rules, Sampling(), None, None, tie_units=256)
    drafter = speculative.drafter
    assert drafter is not None
    propose = drafter.propose

    def checked(root_B, shape, *sampling):
        tree = propose(root_B, shape, *sampling)
        for row, index in enumerate(decoding.active):
            check(decoding.answers[index].all_tokens, tree, row)
        return tree

    drafter.propose = checked  # type: ignore[method-assign]
    try:
        with torch.inference_mode():
            for _chunks in decoding.steps(drafter, shape):
                pass
    finally:
        drafter.propose = propose  # type: ignore[method-assign]
    return decoding


class DenseDraft:
    """The draft without a cache: everything is recomputed from the text with one full causal attention."""

    def __init__(self, speculative: SpeculativeModel) -> None:
        self.draft, self.target = speculative.drafter.draft, speculative.target
        self.head = speculative.drafter.head

    def features(self, text: list[int]) -> torch.Tensor:
        output = self.target.model(torch.tensor([text]), output_hidden_states=True)
        if self.target.last_state:
            return output.hidden_states[-1]
        return torch.cat([output.hidden_states[i + 1] for i in self.target.aux_layer_ids], -1)

    def log_probs(self, text: list[int], path: list[int]) -> torch.Tensor:
        """After `text` and a drafted `path`: log-probabilities of the next token, [V] with -inf outside the draft's."""
        states = self.draft.first_state(self.features(text[:-1]))
        tokens = text[1:] + path
        for depth in range(len(path) + 1):
            inputs = torch.tensor([tokens[: len(text) - 1 + depth]])
            embeds = embedding(inputs, self.target.embedding_VH)
            positions = torch.arange(inputs.shape[1])[None]

            def attend(q, k, v):
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
                return scaled_dot_product_attention(q, k, v, is_causal=True)

            out, head_in = self.draft.step(states, embeds, positions, attend)
            states = torch.cat([states, out[:, -1:]], 1)
        logits = self.head(head_in[0, -1]).log_softmax(-1)
        full = torch.full((self.draft.config.vocab_size,), -torch.inf)
        full[torch.arange(len(logits)) + self.draft.d2t] = logits
        return full


def small_case(families, algorithm: str, family: str = "llama2", **options: Any) -> SpeculativeModel:
    draft = random_draft(HIDDEN, VOCAB, 60, algorithm=algorithm, aux_layer_ids=(0, 1, 2), seed=3, **options)
    return SpeculativeModel(families(family), draft)


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle1"])
def test_chains_are_those_of_a_draft_without_a_cache(families, algorithm: str) -> None:
    """Two texts of different lengths; every drafted token is the argmax of the uncached computation."""
    speculative = small_case(families, algorithm)
    dense = DenseDraft(speculative)
    checked = []

    def check(text, tree, row) -> None:
        tokens = tree.tokens_BQ[row].tolist()
        assert tokens[0] == text[-1]
        for depth in range(1, len(tokens)):
            scores = dense.log_probs(text, tokens[1:depth])
            assert float(scores.max() - scores[tokens[depth]]) < 1e-4
        checked.append(len(text))

    watched(speculative, PROMPTS[:2], CHAIN, check)
    assert len(checked) >= 10


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle1"])
@pytest.mark.parametrize("norm_output", [False, True])
def test_trees_are_those_of_a_plain_search_without_a_cache(families, algorithm: str, norm_output: bool) -> None:
    """EAGLE-2's search written plainly: same nodes, for every step of two texts."""
    options = {"norm_output": True, "fc_norm": True} if norm_output and algorithm == "eagle3" else {}
    speculative = small_case(families, algorithm, **options)
    dense = DenseDraft(speculative)
    shape = TreeShape(total_token=8, depth=2, top_k=3)
    checked = []

    def search(text: list[int]) -> set[tuple[int, ...]]:
        pool: list[tuple[float, tuple[int, ...]]] = []
        frontier: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for _level in range(shape.depth + 1):
            children = []
            for score, path in frontier:
                best = dense.log_probs(text, list(path)).topk(shape.top_k)
                children += [(score + v, (*path, i)) for v, i in zip(best.values.tolist(), best.indices.tolist())]
            pool += children
            frontier = sorted(children, reverse=True)[: shape.top_k]
        return {path for _, path in sorted(pool, reverse=True)[: shape.total_token - 1]}

    def check(text, tree, row) -> None:
        if len(checked) >= 8:
            return
        tokens, seen = tree.tokens_BQ[row].tolist(), tree.ancestors_BQQ[row]
        paths = {tuple(tokens[j] for j in seen[i].nonzero().flatten().tolist()[1:]) for i in range(1, len(tokens))}
        assert paths == search(text)
        checked.append(text)

    watched(speculative, PROMPTS[:2], shape, check)
    assert len(checked) == 8


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_true_rows_are_computed_once(families, shape: TreeShape) -> None:
    """The draft reads every position of the text once, and none again: prompt plus answer, less the last tokens that no
    proposal needed."""
    model = families("qwen2")
    texts = [own_answer(model, prompt, 30) for prompt in PROMPTS]
    draft = oracle_for(model, texts, lambda position: (0, 1, 0, 2, 9)[position % 5])
    speculative = SpeculativeModel(model, draft)
    rows_of: dict[int, int] = {}

    def check(text, tree, row) -> None:
        assert speculative.drafter.cache.lengths[row] == len(text) - 1  # row t for every token but the last
        rows_of[tuple(text[:3])] = len(text) - 1

    rows_before = speculative.drafter.num_true_rows
    watched(speculative, PROMPTS, shape, check)
    assert speculative.drafter.num_true_rows - rows_before == sum(rows_of.values())

    answers = speculative.speculative_generate(PROMPTS, max_new_tokens=30, shape=shape)
    assert answers.stats.draft_true_rows <= sum(len(text) - 1 for text in texts)


def test_the_drafter_counts_its_rows(families) -> None:
    speculative = small_case(families, "eagle3")
    drafter = speculative.drafter
    assert isinstance(drafter, Drafter)
    stats = speculative.speculative_generate(PROMPTS[1], max_new_tokens=6, shape=CHAIN, eos_token_id=[]).stats
    passes = stats.verification_passes
    assert stats.draft_speculative_rows == passes * (CHAIN.longest_path - 1)
    assert (
        stats.draft_forwards == passes * CHAIN.longest_path
    )  # of these one reads the prompt, the last pass's reads none
