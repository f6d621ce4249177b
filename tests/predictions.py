"""The draft's most probable token for every row and step, by plain unrolling of `Draft.step`.

The oracle of the guesses of an evaluation pass (`StepOutput.guess_NK`): each document is unrolled row by row with a
materialised mask, through the interface that decoding uses.

    row t, step k: state h_k[t], embedding of x_{t+1+k}, RoPE position t+k, predicts x_{t+2+k}
    attention: step-0 keys of rows <= t, and the keys of steps 1..k of row t itself

Letters: N tokens of a batch, T of a document, K steps, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_lite.model.draft import Draft
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch

ROWS_PER_CHUNK = 256  # rows whose logits exist at a time


@torch.no_grad()
def predict_tokens(draft: Draft, head: TargetHead, batch: DraftBatch, num_steps: int) -> Tensor:
    """[N, K] int64 target ids: the draft's most probable token. Rows whose x_{t+1+k} does not exist hold -1."""
    draft.use_target_head(head)
    features_NG = batch.last_NH if draft.config.algorithm == "eagle1" else batch.aux_NG
    documents = zip(batch.doc_offsets[:-1], batch.doc_offsets[1:])
    return torch.cat(
        [
            _predict_document(draft, head, batch.input_ids_N[start:stop], features_NG[start:stop], num_steps)
            for start, stop in documents
        ]
    )


def _predict_document(draft: Draft, head: TargetHead, ids_T: Tensor, features_TG: Tensor, num_steps: int) -> Tensor:
    """The same for one document."""
    num_rows = len(ids_T)
    dtype = next(draft.parameters()).dtype
    keys = TeacherForcedKeys()
    places_T = torch.arange(num_rows, device=ids_T.device)
    state = draft.first_state(features_TG[None].to(dtype))
    predicted = []
    for k in range(num_steps):
        exists_T = places_T + 1 + k < num_rows
        embeds = draft.token_embeddings(ids_T[(places_T + 1 + k).clamp(max=num_rows - 1)], head).to(dtype)
        state, head_in = draft.step(state, embeds[None], (places_T + k)[None], keys)
        chunks = [draft.logits(part).argmax(-1) for part in head_in[0].split(ROWS_PER_CHUNK)]
        predicted.append(torch.where(exists_T, draft.draft_to_target(torch.cat(chunks)), -1))
    return torch.stack(predicted, 1)


class TeacherForcedKeys:
    """`attend` of one document's steps: remembers keys and values; the first call is step 0."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        """Queries of step k [1, heads, T, d] against all keys so far; -> [1, heads, T, d]."""
        groups = q_BHTd.shape[1] // k_BGTd.shape[1]
        self._steps.append((k_BGTd.repeat_interleave(groups, 1), v_BGTd.repeat_interleave(groups, 1)))
        (key, value), *own = self._steps
        num_rows, scale = q_BHTd.shape[2], q_BHTd.shape[3] ** -0.5
        later = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q_BHTd.device).triu(1)
        scores = [(q_BHTd @ key.transpose(2, 3)).float().masked_fill(later, -torch.inf)]
        scores += [(q_BHTd * own_key).sum(-1, keepdim=True).float() for own_key, _ in own]
        weights = torch.softmax(torch.cat(scores, -1) * scale, -1).to(value.dtype)
        result = weights[..., :num_rows] @ value
        for place, (_, own_value) in enumerate(own):
            result = result + weights[..., num_rows + place, None] * own_value
        return result
