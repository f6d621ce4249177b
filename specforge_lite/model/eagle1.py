"""EAGLE-1: one decoder layer that predicts the target's next hidden state; tokens come out of the target's own head.

    row t, step 0:   input  fc [e(x_{t+1}) ; f_t]      output f'_t, learns f_{t+1}      head(f'_t) predicts x_{t+2}

f_t is the target's last hidden state after its final norm. EAGLE trains step 0 only, with noise on f; rows of a later
step k read e(x_{t+1+k}) and their own output, at RoPE position t + k, and learn f_{t+1+k}: that is what decoding does,
so evaluation unrolls them (and training may: that is HASS). Rows, masks and attention are those of `eagle3`.

    loss = v_weight * SmoothL1(f', f) (mean over H)  +  p_weight * CE(softmax(head(f)), head(f'))

EAGLE: Li et al. 2024, "Speculative Sampling Requires Rethinking Feature Uncertainty", section 3.2; noise and weights
as in SafeAILab/EAGLE `train/main.py`.

Letters: R needed rows of a step, N key rows, M predicted tokens, K steps, D width (= H), E embedding rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from specforge_lite.core.errors import ConfigError
from specforge_lite.model.draft import Attend, Draft, DraftConfig, TTTSettings
from specforge_lite.model.eagle3 import RowResults, pick_rows, summarize
from specforge_lite.model.frozen_head import frozen_head_cross_entropy
from specforge_lite.model.layers import Projections, RMSNorm, SwiGLU, gated
from specforge_lite.model.rope import RotaryEmbedding, apply_rope
from specforge_lite.model.row_plan import RowPlan, StepRows, plan_rows, predictable_tokens
from specforge_lite.model.target_head import TargetHead
from specforge_lite.model.ttt_attention import TttAttention, get_attention
from specforge_lite.types import DraftBatch, StepOutput

# Noise on f_t is uniform, (u - 0.5) * noise * 512 / L: EAGLE's constant, L the tokens of the sample.
NOISE_REFERENCE_LENGTH = 512


class Eagle1Layer(nn.Module):
    """A Llama layer without input norm: x -> attention, added -> post_attention_layernorm -> SwiGLU, added."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = Projections(
            width, width, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.mlp = SwiGLU(width, config.intermediate_size, config.hidden_act)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)


@dataclass
class PackedWeights:
    """The matrices in the compute dtype, fused where they read the same input; made once per forward pass.

    fc_e, fc_h: the halves of fc that read embedding and state.
    """

    fc_e: Tensor
    fc_h: Tensor
    q: Tensor
    kv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class Eagle1Draft(Draft):
    """EAGLE-1 draft; parameter names are those of the exported checkpoint. It has the whole vocabulary of the target.

    `fc` has no bias: SGLang's has one and vLLM's has none, so only a zero bias is served alike by both.
    """

    def __init__(self, config: DraftConfig, d2t: Tensor, t2d: Tensor) -> None:
        super().__init__()
        if config.target_hidden_size != config.hidden_size:
            raise ConfigError(
                f"hidden_size {config.hidden_size} != target_hidden_size {config.target_hidden_size}: an EAGLE-1 draft"
                " predicts the target's hidden states, so it is as wide as the target"
            )
        if config.draft_vocab_size != config.vocab_size:
            raise ConfigError(
                f"draft_vocab_size {config.draft_vocab_size} != vocab_size {config.vocab_size}: an EAGLE-1 draft uses"
                " the target's head and has its whole vocabulary"
            )
        self.config = config
        width = config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([Eagle1Layer(config)])
        self.rope = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )
        self.set_vocab(d2t, t2d)
        self.make_own_embeddings()
        self._target_head: list[TargetHead] = []  # in a list: not a parameter of the draft, not in its state_dict

    @property
    def layer(self) -> Eagle1Layer:
        layer = self.layers[0]
        assert isinstance(layer, Eagle1Layer)
        return layer

    # ------------------------------------------------------------------------------------------------------ inference

    def use_target_head(self, target_head: TargetHead) -> None:
        self._target_head = [target_head]

    def first_state(self, features: Tensor) -> Tensor:
        return features.to(self.fc.weight.dtype)

    def step(
        self, state_BTD: Tensor, embeds_BTD: Tensor, position_ids_BT: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        layer, attention = self.layer, self.layer.self_attn
        x = self.fc(torch.cat([embeds_BTD.to(state_BTD.dtype), state_BTD], -1))
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.config.head_dim)) for p in projections)
        cos, sin = self.rope(position_ids_BT)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        attended = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        x = x + attention.o_proj(attended)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x, x

    def logits(self, head_input: Tensor) -> Tensor:
        if not self._target_head:
            raise ConfigError("an EAGLE-1 draft has no head of its own: call use_target_head(target_head) first")
        return self._target_head[0].logits(head_input)

    # ------------------------------------------------------------------------------------------------------- training

    def forward(self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings) -> StepOutput:
        """One training pass; `loss_sum_K` holds the cross-entropy alone, `loss` both terms with their weights.

        Evaluation (`ttt.collect_rows`, or a draft in eval mode) adds no noise.
        """
        device = batch.input_ids_N.device
        host_mask_N = batch.loss_mask_N if batch.host_mask_N is None else batch.host_mask_N
        predictable_N = predictable_tokens(host_mask_N, batch.doc_offsets, 2 if ttt.eagle_mask else 0)
        plan = plan_rows(predictable_N, batch.doc_offsets, ttt.num_steps).to(device)
        states_MKD = self._unroll(batch, target_head, plan, ttt)
        target_MD = batch.last_NH[plan.predicted_tokens - 1].to(states_MKD.dtype)
        counted_MK = plan.head_places_KM.T >= 0  # no row before the start of a document
        decay_K = torch.tensor([ttt.step_decay**k for k in range(ttt.num_steps)], dtype=torch.float64).to(device)
        weight_MK = counted_MK * decay_K
        tokens = frozen_head_cross_entropy(states_MKD, weight_MK, target_MD, target_head, ttt.collect_rows)
        values = hidden_state_loss(states_MKD, weight_MK, target_MD)
        loss = ttt.v_weight * values + ttt.p_weight * tokens.loss
        results = RowResults(tokens.loss_MK, tokens.correct_MK & counted_MK, counted_MK, tokens.alpha_MK)
        return summarize(batch, predictable_N.to(device), plan, loss, results)

    def _unroll(self, batch: DraftBatch, target_head: TargetHead, plan: RowPlan, ttt: TTTSettings) -> Tensor:
        """Run the K steps; -> predicted states [M, K, D], zeros where a row does not exist."""
        dtype = ttt.compute_dtype or self.fc.weight.dtype
        attention = get_attention(ttt.attention_backend, batch.input_ids_N.device.type)
        weights = self._pack(dtype)
        embeds = self.token_embeddings(batch.input_ids_N[plan.embed_tokens], target_head).to(dtype)
        bias = None if self.fc.bias is None else self.fc.bias.to(dtype)  # only in drafts that others trained
        embed_fc = linear(embeds, weights.fc_e, bias)

        state_RD = batch.last_NH[plan.key_tokens].to(dtype)
        if self.training and not ttt.collect_rows and ttt.noise:
            state_RD = state_RD + state_noise(state_RD, plan, batch.doc_offsets, ttt.noise)
        x_ND = torch.addmm(embed_fc[plan.key_embed_places], state_RD, weights.fc_h.T)
        kv_first = self._keys(x_ND, plan.key_positions, weights)
        x_RD = x_ND if plan.steps[0].from_previous is None else x_ND[plan.steps[0].from_previous]
        later: list[tuple[Tensor, Tensor]] = []
        outputs = []
        for k, rows in enumerate(plan.steps):
            if k:
                if rows.from_previous is not None:
                    state_RD = state_RD[rows.from_previous]
                    later = [(key[rows.from_previous], value[rows.from_previous]) for key, value in later]
                x_RD = torch.addmm(embed_fc[rows.embed_places], state_RD, weights.fc_h.T)
                later = [*later, self._keys(x_RD, rows.position_ids, weights)]
            arguments = (x_RD, kv_first, later, rows, weights, attention)
            if ttt.activation_checkpointing:
                state_RD = checkpoint(self._train_step, *arguments, use_reentrant=False)
            else:
                state_RD = self._train_step(*arguments)
            outputs.append(pick_rows(state_RD, plan.head_places_KM[k]))
        return torch.stack(outputs, dim=1)

    def _pack(self, dtype: torch.dtype) -> PackedWeights:
        attention, mlp = self.layer.self_attn, self.layer.mlp
        fc_e, fc_h = (part.contiguous() for part in self.fc.weight.to(dtype).split(self.config.hidden_size, 1))
        return PackedWeights(
            fc_e,
            fc_h,
            attention.q_proj.weight.to(dtype),
            torch.cat([attention.k_proj.weight, attention.v_proj.weight]).to(dtype),
            attention.o_proj.weight.to(dtype),
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).to(dtype),
            mlp.down_proj.weight.to(dtype),
        )

    def _keys(self, x_TD: Tensor, position_ids_T: Tensor, weights: PackedWeights) -> tuple[Tensor, Tensor]:
        """Keys (after RoPE) and values of some rows, [T, G, d] each."""
        key, value = linear(x_TD, weights.kv).unflatten(-1, (2, -1, self.config.head_dim)).unbind(1)
        return apply_rope(key, *self.rope(position_ids_T)), value

    def _train_step(
        self,
        x_RD: Tensor,
        kv_first: tuple[Tensor, Tensor],
        later: list[tuple[Tensor, Tensor]],
        rows: StepRows,
        weights: PackedWeights,
        attention: TttAttention,
    ) -> Tensor:
        """The layer over the needed rows of one step: outputs of fc -> predicted states [R, D]."""
        q_RHd = linear(x_RD, weights.q).unflatten(-1, (-1, self.config.head_dim))
        q_RHd = apply_rope(q_RHd, *self.rope(rows.position_ids))
        out_RHd = attention(q_RHd, *kv_first, [key for key, _ in later], [value for _, value in later], rows)
        x_RD = torch.addmm(x_RD, out_RHd.flatten(1), weights.o.T)
        gate_up = linear(self.layer.post_attention_layernorm(x_RD), weights.gate_up)
        return torch.addmm(x_RD, gated(gate_up, self.layer.mlp.activation), weights.down.T)


def hidden_state_loss(states_MKD: Tensor, weight_MK: Tensor, target_MD: Tensor) -> Tensor:
    """Weighted sum of SmoothL1 (beta 1), each the mean over D; fp32 or wider."""
    accumulate = torch.promote_types(states_MKD.dtype, torch.float32)
    target_MKD = target_MD.to(accumulate).unsqueeze(1).expand_as(states_MKD)
    per_row_MK = smooth_l1_loss(states_MKD.to(accumulate), target_MKD, reduction="none").mean(-1)
    return torch.where(weight_MK > 0, per_row_MK * weight_MK.to(accumulate), 0).sum()


def state_noise(state_ND: Tensor, plan: RowPlan, doc_offsets: list[int], noise: float) -> Tensor:
    """Uniform noise for every key row, its width inversely proportional to the tokens L of the row's document."""
    offsets = torch.tensor(doc_offsets, device=state_ND.device)
    document_N = torch.bucketize(plan.key_tokens, offsets[1:], right=True)
    scale_N = (noise * NOISE_REFERENCE_LENGTH / offsets.diff())[document_N]
    return ((torch.rand_like(state_ND, dtype=torch.float32) - 0.5) * scale_N[:, None]).to(state_ND.dtype)
