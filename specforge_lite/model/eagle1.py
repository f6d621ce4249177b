"""EAGLE-1: one decoder layer that predicts the target's next hidden state; tokens come out of the target's own head.

    row t, step 0:   input  fc [e(x_{t+1}) ; f_t]      output f'_t, learns f_{t+1}      head(f'_t) predicts x_{t+2}

f_t is the target's last hidden state after its final norm. EAGLE trains step 0 only, with noise on f; rows of a later
step k read e(x_{t+1+k}) and their own output, at RoPE position t + k, and learn f_{t+1+k}: that is what decoding does,
so evaluation unrolls them (and training may: that is HASS). Rows, masks and attention are those of EAGLE-3.

    loss = v_weight * SmoothL1(f', f) (mean over H)  +  p_weight * CE(softmax(head(f)), head(f'))

EAGLE: Li et al. 2024, "Speculative Sampling Requires Rethinking Feature Uncertainty", section 3.2; noise and weights
as in SafeAILab/EAGLE `train/main.py`.

Letters: R rows, N key rows, M predicted tokens, K steps, D width (= H), E embedding rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from specforge_lite.core.errors import ConfigError
from specforge_lite.model.config_json import check_target_shape
from specforge_lite.model.deferred_grad import DeferredWeight
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.layers import DraftLayer
from specforge_lite.model.losses import chunked_cross_entropy, judge_rows
from specforge_lite.model.row_plan import RowPlan
from specforge_lite.model.target_head import TargetHead
from specforge_lite.model.unroll import EagleDraft, LayerInput, RowResults
from specforge_lite.types import DraftBatch

# Noise on f_t is uniform, (u - 0.5) * noise * 512 / L: EAGLE's constant, L the tokens of the sample.
NOISE_REFERENCE_LENGTH = 512


class Eagle1Draft(EagleDraft):
    """EAGLE-1 draft; parameter names are those of the exported checkpoint. It has the whole vocabulary of the target.

    `fc` has no bias: SGLang's has one and vLLM's has none, so only a zero bias is served alike by both.
    """

    def __init__(self, config: DraftConfig, d2t: Tensor, t2d: Tensor) -> None:
        super().__init__()
        check_target_shape(config, "an EAGLE-1 draft predicts the target's hidden states and uses its head")
        self.config = config
        width = config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([DraftLayer(config, width)])
        self.add_common(d2t, t2d)
        self._target_head: list[TargetHead] = []  # in a list: not a parameter of the draft, not in its state_dict

    @property
    def layer(self) -> DraftLayer:
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def use_target_head(self, target_head: TargetHead) -> None:
        self._target_head = [target_head]

    def first_state(self, features: Tensor) -> Tensor:
        return features.to(self.fc.weight.dtype)

    def layer_input(self, state_BTD: Tensor, embeds_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(torch.cat([embeds_BTD, state_BTD], -1))
        return x, x

    def layer_output(self, state_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return state_BTD, state_BTD

    def logits(self, head_input: Tensor) -> Tensor:
        if not self._target_head:
            raise ConfigError("an EAGLE-1 draft has no head of its own: call use_target_head(target_head) first")
        return self._target_head[0].logits(head_input)

    def training_input(
        self, batch: DraftBatch, plan: RowPlan, embeds_ED: Tensor, ttt: TTTSettings
    ) -> tuple[LayerInput, Tensor]:
        """fc [embedding ; state] is a sum of two products; the embeddings' is made once for all steps. Evaluation
        (`ttt.collect_rows`, or a draft in eval mode) adds no noise to the states."""
        attention, width, dtype = self.layer.self_attn, embeds_ED.shape[1], embeds_ED.dtype
        state_ND = batch.last_NH.index_select(0, plan.key_tokens).to(dtype)
        if self.training and not ttt.collect_rows and ttt.noise:
            state_ND = state_ND + state_noise(state_ND, plan.key_doc_lengths, ttt.noise)
        # a bias only in drafts that others trained
        bias = None if self.fc.bias is None else self.fc.bias.to(dtype).expand(len(embeds_ED), -1)
        embed_fc = DeferredWeight([self.fc.weight[:, :width]], dtype)(embeds_ED, bias)
        fc = DeferredWeight([self.fc.weight[:, width:]], dtype)

        def enter(state_RD: Tensor, embed_places_R: Tensor) -> tuple[Tensor, Tensor]:
            x_RD = fc(state_RD, embed_fc.index_select(0, embed_places_R))
            return x_RD, x_RD

        q, kv = [attention.q_proj.weight], [attention.k_proj.weight, attention.v_proj.weight]
        return LayerInput(enter, DeferredWeight(q, dtype), DeferredWeight(kv, dtype)), state_ND

    def teacher(self, target_head: TargetHead, last_MH: Tensor, ttt: TTTSettings) -> FrozenTeacher:
        return FrozenTeacher(target_head, last_MH.to(self.compute_dtype(ttt, last_MH.device)))

    def losses(
        self, states_MKD: Tensor, weight_MK: Tensor, teacher: FrozenTeacher, target_head: TargetHead, ttt: TTTSettings
    ) -> tuple[Tensor, RowResults]:
        """The results hold the cross-entropy alone, the sum both terms with their weights."""
        tokens, loss_MK, correct_MK = chunked_cross_entropy(states_MKD, weight_MK, teacher, target_head)
        results = RowResults(loss_MK, correct_MK, weight_MK > 0)
        if ttt.collect_rows:
            results.guess_MK, results.correct_MK, results.alpha_MK = judge_rows(states_MKD, teacher, target_head)
        loss = ttt.v_weight * hidden_state_loss(states_MKD, weight_MK, teacher.target_MH) + ttt.p_weight * tokens
        return loss, results


@dataclass
class FrozenTeacher:
    """Of an EAGLE-1 draft, which has the whole vocabulary: made anew for each chunk, from the states y_(u-1) [M, H]."""

    target_head: TargetHead
    target_MH: Tensor

    def chunk(self, tokens: slice, want_lse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        logits_mV = self.target_head.logits(self.target_MH[tokens])
        accumulate = torch.promote_types(logits_mV.dtype, torch.float32)
        lse_m = torch.logsumexp(logits_mV.to(accumulate), -1) if want_lse else None
        return logits_mV, logits_mV.argmax(-1), lse_m


def hidden_state_loss(states_MKD: Tensor, weight_MK: Tensor, target_MD: Tensor) -> Tensor:
    """Weighted sum of SmoothL1 (beta 1), each the mean over D; fp32 or wider."""
    accumulate = torch.promote_types(states_MKD.dtype, torch.float32)
    target_MKD = target_MD.to(accumulate).unsqueeze(1).expand_as(states_MKD)
    per_row_MK = smooth_l1_loss(states_MKD.to(accumulate), target_MKD, reduction="none").mean(-1)
    return torch.where(weight_MK > 0, per_row_MK * weight_MK.to(accumulate), 0).sum()


def state_noise(state_ND: Tensor, doc_lengths_N: Tensor, noise: float) -> Tensor:
    """Uniform noise for every key row, its width inversely proportional to the tokens of the row's document."""
    scale_N = noise * NOISE_REFERENCE_LENGTH / doc_lengths_N
    return ((torch.rand_like(state_ND, dtype=torch.float32) - 0.5) * scale_N[:, None]).to(state_ND.dtype)
