"""Small drafts of every layout, for the tests of export, contract and inference."""

from __future__ import annotations

import torch

from specforge_lite.drafts import Draft, DraftConfig, build_draft

NUM_TARGET_LAYERS = 8


def random_vocabulary(draft_size: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(d2t offsets, t2d) of a random subset of ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(size, generator=generator)[:draft_size].sort().values
    t2d = torch.zeros(size, dtype=torch.bool)
    t2d[ids] = True
    return ids - torch.arange(draft_size), t2d


def random_draft(
    hidden_size: int = 32,
    vocab_size: int = 100,
    draft_vocab_size: int = 40,
    algorithm: str = "eagle3",
    aux_layer_ids: tuple[int, ...] | None = (1, 3, 4),
    seed: int = 0,
    target_hidden_size: int = 0,
    norm_output: bool = False,
    fc_norm: bool = False,
    max_position_embeddings: int = 2048,
) -> Draft:
    """A draft with random weights (norm weights too, so that a swapped norm is seen)."""
    config = DraftConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        draft_vocab_size=vocab_size if algorithm == "eagle1" else draft_vocab_size,
        algorithm=algorithm,
        target_hidden_size=target_hidden_size,
        aux_layer_ids=aux_layer_ids if algorithm == "eagle3" else None,
        norm_output=norm_output,
        fc_norm=fc_norm,
        max_position_embeddings=max_position_embeddings,
    )
    torch.manual_seed(seed)
    draft = build_draft(config, *random_vocabulary(config.draft_vocab_size, vocab_size, seed))
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return draft.eval().requires_grad_(False)
