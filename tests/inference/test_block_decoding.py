"""Decoding with a DSpark draft: block by block as the authors' own loop (tests/model/dspark/decode.json), greedy output
equal to the target's, sampling with the target's law."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_lite.inference.block_drafter import BlockDrafter
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TokenTree, TreeShape, chain_tree
from specforge_lite.inference.verify import Sampling, accept_sampled
from specforge_lite.model.block import BlockDraft
from tests.inference_drafts import random_draft
from tests.model.test_block_oracle import DATA, draft_config

CASES = json.loads((DATA / "decode.json").read_text())["runs"]


class Recorder(BlockDrafter):
    """Keeps what every block proposed."""

    blocks: list[dict[str, Any]]

    def propose(self, root_B: Any, *args: Any, **options: Any) -> TokenTree:
        tree = super().propose(root_B, *args, **options)
        record = {"start": self.cache.lengths[0], "anchor": int(root_B[0]), "proposed": tree.tokens_BQ[0, 1:].tolist()}
        self.blocks.append(record)
        return tree


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpeculativeModel:
    """The oracle's target and DSpark draft."""
    from specforge_lite.capture.hf import load_target_model

    folder: Path = tmp_path_factory.mktemp("target")
    config = json.loads((DATA / "decode_target_config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    save_file(load_file(DATA / "decode_target.safetensors"), folder / "model.safetensors", {"format": "pt"})
    target = load_target_model(str(folder), "float32", torch.device("cpu"), False)
    config = draft_config("config_vanilla.json")
    size = config.vocab_size
    draft = BlockDraft(config, torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool))
    weights = load_file(DATA / "decode_draft.safetensors")
    draft.load_state_dict(
        {n: w for n, w in weights.items() if n not in ("embed_tokens.weight", "lm_head.weight")}, strict=False
    )
    return SpeculativeModel(target, draft.eval())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['prompt'][0]}-{case['threshold']}")
def test_every_block_equals_the_authors_loop(model: SpeculativeModel, case: dict[str, Any]) -> None:
    assert isinstance(model.drafter, BlockDrafter)
    recorder = Recorder(model.drafter.draft, model.drafter.table_VD, model.drafter.head)
    recorder.blocks = []
    plain, model.drafter = model.drafter, recorder
    try:
        new = len(case["output"]) - len(case["prompt"])
        settings = GenerationSettings(
            max_new_tokens=new, shape=TreeShape.chain(4), confidence_threshold=case["threshold"]
        )
        output = model.run(case["prompt"], settings)
    finally:
        model.drafter = plain
    assert [*case["prompt"], *output.answers[0].tokens] == case["output"]
    # Their loop drafts once more when the text is as long as it may be.
    blocks = [block for block in case["blocks"] if block["start"] + 1 < len(case["output"])]
    assert recorder.blocks == [{name: block[name] for name in ("start", "anchor", "proposed")} for block in blocks]
    assert model.drafter is not None


def test_batches_and_growth_change_nothing(model: SpeculativeModel) -> None:
    """Rows of different lengths, a cache that grows: each answer is that of its prompt alone, and the target's own."""
    prompts = [case["prompt"] for case in CASES[:4]] + [CASES[0]["prompt"][:3]]
    settings = GenerationSettings(max_new_tokens=80)
    together = model.run(prompts, settings)
    for prompt, answer in zip(prompts, together.answers):
        assert answer.tokens == model.run(prompt, settings).answers[0].tokens
        assert answer.tokens == model.run(prompt, settings, speculative=False).answers[0].tokens


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_drawn_chains_keep_the_targets_law(top_p: float) -> None:
    """20,000 chains of two drawn tokens over six tokens: the first two tokens follow the target's distribution."""
    torch.manual_seed(0)
    size, num = 6, 20000
    sampling = Sampling(temperature=0.9, top_p=top_p)
    target_logits = torch.randn(size + 1, size)  # after the root; after token v
    draft_logits = target_logits + 1.5 * torch.randn(size + 1, size)
    generator = torch.Generator().manual_seed(1)
    root = torch.zeros(num, dtype=torch.int64)
    q0 = sampling.probabilities(draft_logits[:1]).expand(num, -1)
    x1 = torch.multinomial(q0, 1, generator=generator)[:, 0]
    q1 = sampling.probabilities(draft_logits[1 + x1])
    x2 = torch.multinomial(q1, 1, generator=generator)[:, 0]
    tree = chain_tree(root, [x1, x2], [q0, q1])
    logits = torch.stack([target_logits[0].expand(num, -1), target_logits[1 + x1], target_logits[1 + x2]], 1)
    verdict = accept_sampled(tree, logits, sampling, generator)
    firsts, seconds = [], []
    for tokens, bonus in zip(verdict.tokens, verdict.bonus):
        text = [*tokens[1:], bonus]
        firsts.append(text[0])
        seconds.append(text[1] if len(text) > 1 else -1)
    p0 = sampling.probabilities(target_logits[:1])[0]
    assert chi_square(torch.tensor(firsts), p0) < 20.5  # 5 degrees of freedom: p = 0.001
    given = torch.tensor(firsts)[torch.tensor(seconds) >= 0]
    after = torch.tensor(seconds)[torch.tensor(seconds) >= 0]
    for first in range(size):
        if (given == first).sum() > 500:
            assert chi_square(after[given == first], sampling.probabilities(target_logits[1 + first][None])[0]) < 20.5
    kept = sum(len(tokens) - 1 for tokens in verdict.tokens)
    q_first = sampling.probabilities(draft_logits[:1])[0]
    alpha = float(torch.minimum(p0, q_first).sum())
    accepted_first = sum(len(tokens) > 1 for tokens in verdict.tokens) / num
    assert abs(accepted_first - alpha) < 0.012
    assert kept > 0


@pytest.mark.parametrize("mode", ["sampled", "greedy"])
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_sampled_text_follows_the_targets_law_with_drawn_and_with_greedy_drafts(
    model: SpeculativeModel, kind: str, mode: str
) -> None:
    """768 continuations: the second and third token after a prompt, given the first, against the target."""
    if kind == "eagle3":
        draft = random_draft(64, 200, 60, aux_layer_ids=(0, 1, 2))
        sampler = SpeculativeModel(model.target.model, draft.eval())
    else:
        sampler = model
    prompt = CASES[0]["prompt"]
    settings = GenerationSettings(
        max_new_tokens=3, temperature=0.7, top_k=3, seed=5, shape=TreeShape.chain(2), draft_sampling=mode
    )
    texts: list[tuple[int, ...]] = []
    for repeat in range(24):
        output = sampler.run([prompt] * 32, replace(settings, seed=repeat))
        texts += [tuple(answer.tokens) for answer in output.answers]
    sampling = settings.sampling
    for length in (1, 2):
        for start in {text[:length] for text in texts}:
            following = torch.tensor([text[length] for text in texts if text[:length] == start])
            if len(following) < 200:
                continue
            with torch.inference_mode():
                logits = model.target.model(torch.tensor([[*prompt, *start]])).logits[0, -1]
            assert chi_square(following, sampling.probabilities(logits[None])[0]) < 16  # 2 degrees: p = 0.0003


def chi_square(tokens: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic of counts against p; tokens of probability 0 must not occur."""
    counts = torch.bincount(tokens, minlength=len(p)).double()
    expected = p.double() * len(tokens)
    assert not bool(counts[expected == 0].any())
    seen = expected > 0
    return float(((counts - expected).square()[seen] / expected[seen]).sum())
