"""Small drafts of every layout, for the tests of export, contract and inference."""

from __future__ import annotations

import torch

from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.registry import build_draft

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


class OracleDraft(Draft):
    """Knows a text beforehand: for token x[p] at position p it ranks x[p+1] at place `rank_of(p)` (0: its first guess).

    It finds token and position in what `step` is given, so it is only right if the decoder feeds rows as the published
    alignment says: the row of position p reads the embedding of x[p+1] and predicts x[p+2].
    """

    def __init__(self, table_VD: torch.Tensor, texts: list[list[int]], rank_of, aux_layer_ids=(0, 1, 2)) -> None:
        super().__init__()
        vocab, width = table_VD.shape
        self.config = DraftConfig(
            hidden_size=width,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=vocab,
            draft_vocab_size=vocab,
            aux_layer_ids=aux_layer_ids,
        )
        self.set_vocab(torch.zeros(vocab, dtype=torch.int64), torch.ones(vocab, dtype=torch.bool))
        self.embed_tokens = None
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.table_VD, self.rank_of = table_VD.detach().clone(), rank_of
        self.next_token = {(p, text[p]): text[p + 1] for text in texts for p in range(len(text) - 1)}

    def first_state(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., : self.config.hidden_size] * 0

    def step(self, state_BTD, embeds_BTD, position_ids_BT, attend):
        assert embeds_BTD.shape[:2] == state_BTD.shape[:2] == position_ids_BT.shape
        tokens = torch.cdist(embeds_BTD.float(), self.table_VD[None].float()).argmin(-1)
        return state_BTD, torch.stack([position_ids_BT + 1, tokens], -1).to(state_BTD.dtype)

    def logits(self, head_input: torch.Tensor) -> torch.Tensor:
        vocab = self.config.vocab_size
        rows = []
        for position, token in head_input.flatten(0, -2).to(torch.int64).tolist():
            row = torch.rand(vocab, generator=torch.Generator().manual_seed(1000 * position + token))
            right = self.next_token.get((position, token))
            if right is not None:
                rank = self.rank_of(position)
                decoys = [(right + 1 + i) % vocab for i in range(rank)]
                row[right] = 4.0
                row[decoys] = 8.0 - torch.arange(rank, dtype=row.dtype) * 0.1
            rows.append(row)
        return torch.stack(rows).view(*head_input.shape[:-1], vocab)
