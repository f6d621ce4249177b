"""What the tests of speculative decoding share: tiny targets by family, and the oracles."""

from __future__ import annotations

from typing import Any

import torch

from specforge_lite.inference import TreeShape
from tests.inference_drafts import OracleDraft

CHAIN, TREE = TreeShape.chain(4), TreeShape(total_token=20, depth=3, top_k=4)
CPU = torch.device("cpu")
PROMPTS = [[5, 17, 9, 33, 21, 8, 60, 2, 11], [7, 8, 9], [90, 100, *range(3, 26)]]


def own_answer(model: Any, prompt: list[int], max_new_tokens: int = 32, **options: Any) -> list[int]:
    """The oracle: transformers' greedy `generate`, prompt included."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
    )
    return output[0].tolist()


def oracle_for(model: Any, texts: list[list[int]], rank_of) -> OracleDraft:
    return OracleDraft(model.get_input_embeddings().weight, texts, rank_of)
