"""The K steps of a training pass over packed rows, for EAGLE-1 and EAGLE-3: their layers differ in what they read.

    step 0:    x = input of the layer for all key rows -> keys, values of every key row; queries of the needed rows
    step k:    rows that are needed no longer are dropped -> q, k, v -> attention over the step-0 keys and the row's own
               keys of steps 1..k -> o, added -> SwiGLU, added

A prediction is named by the token it predicts, u = t + 2 + k: its teacher is y_{u-1}, its embedding x_{u-1}, its RoPE
position u - 2. So the embedding's half of the input is made once per token, not once per (row, step).
`model/row_plan.py` says which rows are computed at all.

Letters: R needed rows of a step, N key rows, M predicted tokens, K steps, D draft width, E embedding rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specforge_lite.model.deferred_grad import DeferredWeight
from specforge_lite.model.draft import Attend, Draft, TTTSettings
from specforge_lite.model.layers import DraftLayer, gated
from specforge_lite.model.losses import TeacherChunks
from specforge_lite.model.rope import RotaryEmbedding, apply_rope
from specforge_lite.model.row_plan import RowPlan, StepRows, plan_rows, predictable_tokens
from specforge_lite.model.target_head import TargetHead
from specforge_lite.model.ttt_attention import Backend, attention_dtype, make_backend
from specforge_lite.types import DraftBatch, StepOutput


class EagleDraft(Draft):
    """A draft of one decoder layer, with all that EAGLE-1 and EAGLE-3 have in common."""

    rope: RotaryEmbedding

    @property
    def layer(self) -> DraftLayer:
        """The decoder layer."""
        raise NotImplementedError

    def add_common(self, d2t: Tensor, t2d: Tensor) -> None:
        """What every draft has beside its weights: RoPE, vocabulary map, embeddings of its own where it needs them."""
        self.rope = RotaryEmbedding.of(self.config)
        self.set_vocab(d2t, t2d)
        self.make_own_embeddings()

    # ------------------------------------------------------------------------------------------------------ inference

    def layer_input(self, state_BTD: Tensor, embeds_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """-> (what the layer projects to q, k, v; what attention is added to)."""
        raise NotImplementedError

    def layer_output(self, state_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """-> (h_{k+1}, input of the head)."""
        raise NotImplementedError

    def step(
        self, state_BTD: Tensor, embeds_BTD: Tensor, position_ids_BT: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        x, residual_BTD = self.layer_input(state_BTD, embeds_BTD.to(state_BTD.dtype))
        return self.layer_output(self.layer(x, residual_BTD, self.rope(position_ids_BT), attend))

    # ------------------------------------------------------------------------------------------------------- training

    def next_state(self, state_RD: Tensor) -> Tensor:
        """Output of the layer -> what the next step and the head read."""
        return state_RD

    def training_input(
        self, batch: DraftBatch, plan: RowPlan, embeds_ED: Tensor, ttt: TTTSettings
    ) -> tuple[LayerInput, Tensor]:
        """-> (what the layer reads in a pass with these embeddings, h_0 [N, D] of the key rows)."""
        raise NotImplementedError

    def teacher(self, target_head: TargetHead, last_MH: Tensor, ttt: TTTSettings) -> TeacherChunks:
        """What the target says about the predicted tokens; last_MH: its states before them."""
        raise NotImplementedError

    def losses(
        self, states_MKD: Tensor, weight_MK: Tensor, teacher: Any, target_head: TargetHead, ttt: TTTSettings
    ) -> tuple[Tensor, RowResults]:
        """-> (weighted sum, results) of the unrolled states; weight_MK: see `step_weights`."""
        raise NotImplementedError

    def forward(self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings) -> StepOutput:
        """One training pass of K steps; sums and counts, see `StepOutput`."""
        device = batch.input_ids_N.device
        dtype = self.compute_dtype(ttt, device)
        backend = make_backend(ttt.attention_backend, device.type)
        plan = plan_pass(batch, ttt).to(device, backend.plan)
        last_MH = batch.last_NH.index_select(0, plan.predicted_tokens - 1)
        teacher = self.teacher(target_head, last_MH, ttt)
        token_ids = batch.input_ids_N.index_select(0, plan.embed_tokens)
        embeds_ED = self.token_embeddings(token_ids, target_head).to(dtype)
        layer_input, state_ND = self.training_input(batch, plan, embeds_ED, ttt)
        states_MKD = unroll(self, layer_input, state_ND, plan, backend, ttt)
        loss, results = self.losses(states_MKD, step_weights(plan, ttt), teacher, target_head, ttt)
        return summarize(len(batch), plan, loss, results)


@dataclass
class LayerInput:
    """The part of a layer in which the drafts differ, for one training pass.

    enter: state h_k of some rows and the places of their embeddings -> (residual [R, D], x [R, D]). q, kv: what x is
    multiplied with, keys first. embed_q, embed_kv [E, ...]: what the embeddings add to the products, if anything.
    """

    enter: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    q: DeferredWeight
    kv: DeferredWeight
    embed_q: Tensor | None = None
    embed_kv: Tensor | None = None


def plan_pass(batch: DraftBatch, ttt: TTTSettings) -> RowPlan:
    """Plan a pass on the host."""
    host_mask_N = batch.loss_mask_N.cpu() if batch.host_mask_N is None else batch.host_mask_N
    mask_shift = 2 if ttt.loss_mask_alignment == "eagle" else 0
    predictable_N = predictable_tokens(host_mask_N, batch.doc_offsets, mask_shift)
    owned_N = None
    if ttt.sequence is not None:
        owned_N = ttt.sequence.own_rows(predictable_N, batch.doc_offsets, ttt.num_steps)
    return plan_rows(predictable_N, batch.doc_offsets, ttt.num_steps, owned_N=owned_N)


def step_weights(plan: RowPlan, ttt: TTTSettings) -> Tensor:
    """[M, K] fp64: step_decay^k where the row exists, else 0."""
    steps_K = torch.arange(ttt.num_steps, dtype=torch.float64, device=plan.head_places_MK.device)
    return (plan.head_places_MK >= 0) * ttt.step_decay**steps_K


Later = list[tuple[Tensor, Tensor]]  # keys and values of a row's own steps


@dataclass
class _Pass:
    """What all steps share. kv_first: step-0 keys (after RoPE) and values, [N, G, d] each."""

    layer: DraftLayer
    layer_input: LayerInput
    o: DeferredWeight
    gate_up: DeferredWeight
    down: DeferredWeight
    rope_P2h: Tensor
    backend: Backend
    compiled: bool
    kv_first: tuple[Tensor, Tensor]

    def rope(self, position_ids_R: Tensor) -> tuple[Tensor, ...]:
        """cos and sin of some rows, [R, 1, d / 2]."""
        return self.rope_P2h.index_select(0, position_ids_R).unsqueeze(1).unbind(2)

    def queries(self, x_RD: Tensor, embed_places_R: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
        """-> [R, H, d] after RoPE."""
        q_RO = self.layer_input.q(x_RD, _take(self.layer_input.embed_q, embed_places_R))
        return apply_rope(q_RO.to(self.rope_P2h.dtype).unflatten(-1, (-1, self.layer.head_dim)), *rope)

    def keys_values(self, x_RD: Tensor, embed_places_R: Tensor, rope: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """-> keys after RoPE and values, [R, G, d] each."""
        kv_RO = self.layer_input.kv(x_RD, _take(self.layer_input.embed_kv, embed_places_R))
        k_RGd, v_RGd = kv_RO.to(self.rope_P2h.dtype).unflatten(-1, (2, -1, self.layer.head_dim)).unbind(1)
        return apply_rope(k_RGd, *rope), v_RGd


def unroll(
    draft: EagleDraft, layer_input: LayerInput, state_ND: Tensor, plan: RowPlan, backend: Backend, ttt: TTTSettings
) -> Tensor:
    """-> states [M, K, D] that predict the tokens, zeros where a row does not exist. state_ND: h_0 of the key rows."""
    layer, dtype, device = draft.layer, state_ND.dtype, state_ND.device
    mlp, positions = layer.mlp, torch.arange(plan.num_positions, device=device)
    shared = _Pass(
        layer=layer,
        layer_input=layer_input,
        o=DeferredWeight([layer.self_attn.o_proj.weight], dtype),
        gate_up=DeferredWeight([mlp.gate_proj.weight, mlp.up_proj.weight], dtype),
        down=DeferredWeight([mlp.down_proj.weight], dtype),
        rope_P2h=draft.rope.table(positions).to(attention_dtype(dtype, device.type)),
        backend=backend,
        compiled=ttt.compile,
        kv_first=(state_ND, state_ND),
    )
    residual_ND, x_ND = layer_input.enter(state_ND, plan.key_embed_places)
    key, value = shared.keys_values(x_ND, plan.key_embed_places, shared.rope(plan.key_positions))
    if ttt.sequence is not None:
        assert plan.key_places is not None
        key, value = ttt.sequence.share(key, value, plan.key_places, plan.num_keys)
    shared.kv_first = (key, value)
    later: Later = []
    states: list[Tensor] = []
    for k, rows in enumerate(plan.steps):
        residual_RD = _rows(states[-1] if k else residual_ND, rows.from_previous)
        x_RD = None if k else _rows(x_ND, rows.from_previous)
        later = [(_rows(key, rows.from_previous), _rows(value, rows.from_previous)) for key, value in later]
        if ttt.activation_checkpointing:
            state_RD, later = checkpoint(_step, residual_RD, x_RD, later, rows, shared, use_reentrant=False)
        else:
            state_RD, later = _step(residual_RD, x_RD, later, rows, shared)
        states.append(draft.next_state(state_RD))
    return _head_inputs(states, plan.head_places_MK)


def _step(
    residual_RD: Tensor, x_RD: Tensor | None, later: Later, rows: StepRows, shared: _Pass
) -> tuple[Tensor, Later]:
    """-> (h_{k+1} before any norm, keys and values of the rows' own steps).

    Step 0 comes with x, the input of the layer; later steps with the state alone, and make a key and a value each.
    """
    rope = shared.rope(rows.position_ids)
    if x_RD is None:
        residual_RD, x_RD = shared.layer_input.enter(residual_RD, rows.embed_places)
        later = [*later, shared.keys_values(x_RD, rows.embed_places, rope)]
    q_RHd = shared.queries(x_RD, rows.embed_places, rope)
    keys, values = zip(shared.kv_first, *later)
    out_RHd = shared.backend.attend(q_RHd, keys, values, rows)
    state_RD = shared.o(out_RHd.flatten(1).to(residual_RD.dtype), residual_RD)
    gate_up = shared.gate_up(shared.layer.post_attention_layernorm(state_RD))
    return shared.down(gated(gate_up, shared.layer.mlp.activation, shared.compiled), state_RD), later


def _rows(x_RD: Tensor, places: Tensor | None) -> Tensor:
    """Rows of x by place; None: all."""
    return x_RD if places is None else x_RD.index_select(0, places)


def _take(table_EO: Tensor | None, places_R: Tensor) -> Tensor | None:
    return None if table_EO is None else table_EO.index_select(0, places_R)


def _head_inputs(states: list[Tensor], places_MK: Tensor) -> Tensor:
    """Rows of all steps by place -> [M, K, D], predicted token first; zeros for place -1."""
    rows_RD = torch.cat([*states, states[0].new_zeros(1, states[0].shape[1])])
    places = torch.where(places_MK >= 0, places_MK, len(rows_RD) - 1)
    return rows_RD.index_select(0, places.view(-1)).view(*places_MK.shape, rows_RD.shape[1])


@dataclass
class RowResults:
    """Per predicted token and step [M, K]: loss, hit, whether the row exists and counts; for evaluation alpha and the
    guess, a target id."""

    loss_MK: Tensor
    correct_MK: Tensor
    counted_MK: Tensor
    alpha_MK: Tensor | None = None
    guess_MK: Tensor | None = None


@torch.no_grad()
def summarize(num_tokens: int, plan: RowPlan, loss: Tensor, results: RowResults) -> StepOutput:
    """Sums per step, and the run of correct steps of each row t = u - 2 - k."""
    counted_MK, alpha_MK, guess_MK = results.counted_MK, results.alpha_MK, results.guess_MK
    exists_MK = plan.head_places_MK >= 0
    correct_MK = results.correct_MK & counted_MK
    rows_MK = torch.where(exists_MK, plan.head_rows_MK, num_tokens)  # one row more takes those that do not exist
    false_NK = torch.zeros(num_tokens + 1, counted_MK.shape[1], dtype=torch.bool, device=counted_MK.device)
    supervised_NK = false_NK.scatter(0, rows_MK, exists_MK)[:-1]
    correct_NK = false_NK.scatter(0, rows_MK, correct_MK)[:-1]
    runs_N = correct_NK.int().cumprod(1).sum(1)
    return StepOutput(
        loss=loss,
        loss_sum_K=torch.where(counted_MK, results.loss_MK, 0).sum(0, dtype=torch.float32),
        counted_K=counted_MK.sum(0, dtype=torch.float32),
        supervised_K=exists_MK.sum(0, dtype=torch.float32),
        correct_K=correct_MK.sum(0, dtype=torch.float32),
        run_sum=(runs_N * supervised_NK[:, 0]).sum(dtype=torch.float32),
        run_rows=supervised_NK[:, 0].sum(dtype=torch.float32),
        alpha_sum_K=None if alpha_MK is None else torch.where(counted_MK, alpha_MK, 0).sum(0),
        correct_NK=None if alpha_MK is None else correct_NK,
        supervised_NK=None if alpha_MK is None else supervised_NK,
        guess_NK=None if guess_MK is None else false_NK.long().scatter(0, rows_MK, guess_MK)[:-1],
    )
