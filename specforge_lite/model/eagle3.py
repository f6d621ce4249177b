"""EAGLE-3 (and 3.1): one decoder layer trained by unrolling it K times on its own output (training-time test).

    row t, step k:   token embedding  e(x_{t+1+k})      teacher  softmax(lm_head(y_{t+1+k}))      predicts x_{t+2+k}
                     state h_k[t]:  h_0 = fc(g_t);  h_{k+1} = output of the layer at step k, same row
                     RoPE position t+k

`model/eagle3_reference.py` is the same step written plainly. Letters: R rows, N key rows, M predicted tokens, K steps,
D draft width, E embedding rows, G aux width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from specforge_lite.model.deferred_grad import DeferredWeight
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.layers import DraftLayer, RMSNorm
from specforge_lite.model.losses import ask_teacher, chunked_cross_entropy, judge_rows
from specforge_lite.model.rope import RotaryEmbedding
from specforge_lite.model.target_head import TargetHead
from specforge_lite.model.unroll import EagleDraft, RowResults, begin_pass, step_weights, summarize, unroll
from specforge_lite.types import DraftBatch, StepOutput


class Eagle3Draft(EagleDraft):
    """EAGLE-3 draft; parameter names are those of the exported checkpoint."""

    def __init__(self, config: DraftConfig, d2t: Tensor, t2d: Tensor) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(config.num_aux_layers * config.target_hidden_size, width, bias=False)
        self.fc_norm = nn.ModuleList(
            [RMSNorm(config.target_hidden_size, eps) for _ in range(config.num_aux_layers if config.fc_norm else 0)]
        )
        self.midlayer = DraftLayer(config, 2 * width, input_norms=True)
        self.norm = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rope = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )
        self.set_vocab(d2t, t2d)
        self.make_own_embeddings()

    @property
    def layer(self) -> DraftLayer:
        return self.midlayer

    def first_state(self, features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.fc.weight.dtype
        features = features.to(dtype)
        if len(self.fc_norm):
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], -1)
        return linear(features, self.fc.weight.to(dtype))

    def layer_input(self, state_BTD: Tensor, embeds_BTD: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.midlayer
        return torch.cat([layer.input_layernorm(embeds_BTD), layer.hidden_norm(state_BTD)], -1), state_BTD

    def layer_output(self, state_BTD: Tensor) -> tuple[Tensor, Tensor]:
        head_input = self.norm(state_BTD)
        return (head_input if self.config.norm_output else state_BTD), head_input

    def logits(self, head_input: Tensor) -> Tensor:
        return self.lm_head(head_input)  # type: ignore[no-any-return]

    def forward(self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings) -> StepOutput:
        """One training pass of K steps; sums and counts, see `StepOutput`."""
        dtype = self.compute_dtype(ttt, batch.input_ids_N.device)
        plan, backend = begin_pass(batch, ttt)
        want_lse = ttt.collect_rows or ttt.loss != "ce"
        last_MH = batch.last_NH.index_select(0, plan.predicted_tokens - 1)
        teacher = ask_teacher(target_head, last_MH, self.target_ids, want_lse)

        embeds = self.token_embeddings(batch.input_ids_N.index_select(0, plan.embed_tokens), target_head).to(dtype)
        state_ND = self.first_state(batch.aux_NG.index_select(0, plan.key_tokens), dtype)
        after_step = self.norm if self.config.norm_output else None
        head_in_MKD = unroll(self, _Eagle3Input(self.midlayer, embeds), state_ND, plan, backend, ttt, after_step)
        if not self.config.norm_output:
            head_in_MKD = self.norm(head_in_MKD)

        # a position counts only if the teacher's token is in the draft vocabulary
        weight_MK = step_weights(plan, ttt) * self.t2d[teacher.argmax_M][:, None]
        head = self.lm_head.weight
        loss, loss_MK, correct_MK = chunked_cross_entropy(head_in_MKD, weight_MK, teacher, head, ttt.loss, ttt.compile)
        alpha_MK: Tensor | None = None
        if ttt.collect_rows:
            correct_MK, alpha_MK = judge_rows(head_in_MKD, teacher, head.to(dtype))
        return summarize(len(batch), plan, loss, RowResults(loss_MK, correct_MK, weight_MK > 0, alpha_MK))


class _Eagle3Input:
    """q, k, v read [embedding ; state], so each is a sum of two products; the embeddings' is made once."""

    def __init__(self, layer: DraftLayer, embeds_ED: Tensor) -> None:
        attention, width, dtype = layer.self_attn, embeds_ED.shape[1], embeds_ED.dtype
        q, kv = [attention.q_proj.weight], [attention.k_proj.weight, attention.v_proj.weight]
        embeds_ED = layer.input_layernorm(embeds_ED)
        self._embed_q = DeferredWeight([weight[:, :width] for weight in q], dtype)(embeds_ED)
        self._embed_kv = DeferredWeight([weight[:, :width] for weight in kv], dtype)(embeds_ED)
        self._q = DeferredWeight([weight[:, width:] for weight in q], dtype)
        self._kv = DeferredWeight([weight[:, width:] for weight in kv], dtype)
        self._norm = layer.hidden_norm

    def enter(self, state_RD: Tensor, _embed_places_R: Tensor) -> tuple[Tensor, Tensor]:
        return state_RD, self._norm(state_RD)

    def queries(self, x_RD: Tensor, embed_places_R: Tensor) -> Tensor:
        return self._q(x_RD, self._embed_q.index_select(0, embed_places_R))

    def keys_values(self, x_RD: Tensor, embed_places_R: Tensor) -> Tensor:
        return self._kv(x_RD, self._embed_kv.index_select(0, embed_places_R))
