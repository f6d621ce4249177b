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

from specforge_lite.model.deferred_grad import DeferredWeight
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.layers import DraftLayer, RMSNorm, project
from specforge_lite.model.losses import Teacher, ask_teacher, chunked_cross_entropy, judge_rows
from specforge_lite.model.row_plan import RowPlan
from specforge_lite.model.target_head import TargetHead
from specforge_lite.model.unroll import EagleDraft, LayerInput, RowResults
from specforge_lite.types import DraftBatch


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
        self.midlayer = DraftLayer(config, 2 * width, norms=("hidden_norm", "input_layernorm"))
        self.norm = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.add_common(d2t, t2d)

    @property
    def layer(self) -> DraftLayer:
        return self.midlayer

    def first_state(self, features: Tensor) -> Tensor:
        if len(self.fc_norm):
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], -1)
        return project(features, self.fc)

    def layer_input(self, state_BTD: Tensor, embeds_BTD: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.midlayer
        return torch.cat([layer.input_layernorm(embeds_BTD), layer.hidden_norm(state_BTD)], -1), state_BTD

    def layer_output(self, state_BTD: Tensor) -> tuple[Tensor, Tensor]:
        head_input = self.norm(state_BTD)
        return (head_input if self.config.norm_output else state_BTD), head_input

    def logits(self, head_input: Tensor) -> Tensor:
        return self.lm_head(head_input)  # type: ignore[no-any-return]

    def next_state(self, state_RD: Tensor) -> Tensor:
        return self.norm(state_RD) if self.config.norm_output else state_RD  # type: ignore[no-any-return]

    def training_input(
        self, batch: DraftBatch, plan: RowPlan, embeds_ED: Tensor, ttt: TTTSettings
    ) -> tuple[LayerInput, Tensor]:
        """q, k, v read [embedding ; state], so each is a sum of two products; the embeddings' is made once."""
        layer, width, dtype = self.midlayer, embeds_ED.shape[1], embeds_ED.dtype
        q, kv = [layer.self_attn.q_proj.weight], [layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
        embeds_ED = layer.input_layernorm(embeds_ED)
        layer_input = LayerInput(
            enter=lambda state_RD, _places_R: (state_RD, layer.hidden_norm(state_RD)),
            q=DeferredWeight([weight[:, width:] for weight in q], dtype),
            kv=DeferredWeight([weight[:, width:] for weight in kv], dtype),
            embed_q=DeferredWeight([weight[:, :width] for weight in q], dtype)(embeds_ED),
            embed_kv=DeferredWeight([weight[:, :width] for weight in kv], dtype)(embeds_ED),
        )
        return layer_input, self.first_state(batch.aux_NG.index_select(0, plan.key_tokens).to(dtype))

    def teacher(self, target_head: TargetHead, last_MH: Tensor, ttt: TTTSettings) -> Teacher:
        return ask_teacher(target_head, last_MH, self.target_ids, want_lse=ttt.collect_rows or ttt.loss != "ce")

    def losses(
        self, states_MKD: Tensor, weight_MK: Tensor, teacher: Teacher, target_head: TargetHead, ttt: TTTSettings
    ) -> tuple[Tensor, RowResults]:
        head_in_MKD = states_MKD if self.config.norm_output else self.norm(states_MKD)
        # a position counts only if the teacher's token is in the draft vocabulary
        weight_MK = weight_MK * self.t2d[teacher.argmax_M][:, None]
        head = self.lm_head.weight
        loss, loss_MK, correct_MK = chunked_cross_entropy(head_in_MKD, weight_MK, teacher, head, ttt.loss, ttt.compile)
        results = RowResults(loss_MK, correct_MK, weight_MK > 0)
        if ttt.collect_rows:
            guess_MK, results.correct_MK, results.alpha_MK = judge_rows(head_in_MKD, teacher, head)
            results.guess_MK = self.draft_to_target(guess_MK)
        return loss, results
