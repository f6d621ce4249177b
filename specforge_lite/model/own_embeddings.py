"""Token embeddings of a draft that is narrower or wider than its target, and so cannot share the target's."""

from __future__ import annotations

import torch

from specforge_lite.model.draft import Draft
from specforge_lite.model.target_head import TargetHead


@torch.no_grad()
def fit_own_embeddings(draft: Draft, target_head: TargetHead) -> None:
    """For a draft narrower or wider than its target: project the target's embedding on its main directions."""
    if draft.embed_tokens is None:
        return
    table = target_head.embed_VH.float()
    width = draft.config.hidden_size
    if width >= table.shape[1]:
        draft.embed_tokens.weight[:, : table.shape[1]] = table
        draft.embed_tokens.weight[:, table.shape[1] :] = 0
        return
    _, directions = torch.linalg.eigh(table.T @ table)  # ascending eigenvalues
    draft.embed_tokens.weight.copy_(table @ directions[:, -width:].flip(1))
