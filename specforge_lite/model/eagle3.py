"""EAGLE-3 (and 3.1): one decoder layer trained by unrolling it K times on its own output (training-time test).

    row t, step k:   token embedding  e(x_{t+1+k})      teacher  softmax(lm_head(y_{t+1+k}))      predicts x_{t+2+k}
                     state h_k[t]:  h_0 = fc(g_t);  h_{k+1} = output of the layer at step k, same row
                     RoPE position t+k

In the code below a prediction is named by the token it predicts, u = t + 2 + k: its teacher is y_{u-1}, its embedding
x_{u-1}, its RoPE position u - 2. So the teacher and the embedding's half of q, k, v are made once per token, not once
per (row, step). `model/row_plan.py` says which rows are computed at all.

Letters: R needed rows of a step, N key rows, M predicted tokens, K steps, D draft width,
E embedding width, G aux width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from specforge_lite.model.deferred_grad import LateTable, LateWeight
from specforge_lite.model.draft import Attend, Draft, DraftConfig, TTTSettings
from specforge_lite.model.layers import Projections, RMSNorm, SwiGLU, gated
from specforge_lite.model.losses import Teacher, ask_teacher, judge_rows, ttt_cross_entropy
from specforge_lite.model.rope import RopeTables, RotaryEmbedding, apply_rope, split_rotated
from specforge_lite.model.row_plan import RowPlan, StepRows, plan_rows, predictable_tokens
from specforge_lite.model.target_head import TargetHead
from specforge_lite.model.ttt_attention import TttAttention, attention_dtype, get_attention
from specforge_lite.types import DraftBatch, StepOutput


class Eagle3Layer(nn.Module):
    """x = [input_layernorm(e) ; hidden_norm(h)] -> attention, added to the un-normed h -> SwiGLU, added."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Projections(
            2 * width, width, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.mlp = SwiGLU(width, config.intermediate_size, config.hidden_act)
        self.hidden_norm = RMSNorm(width, eps)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)


@dataclass
class LayerWeights:
    """The layer's matrices in the compute dtype, fused where they read the same input; made once per forward pass.

    qkv reads [embedding ; state]: `qkv_e` is its embedding half, `qkv_h` its state half.
    """

    qkv_e: LateWeight
    qkv_h: LateWeight
    o: LateWeight
    gate_up: LateWeight
    down: LateWeight


@dataclass
class Unrolling:
    """What all steps of one training pass share. kv_first: step-0 keys (after RoPE) and values, [N, G, d] each."""

    weights: LayerWeights
    embed_qkv: LateTable
    tables: RopeTables
    attention: TttAttention
    attention_dtype: torch.dtype
    kv_first: tuple[Tensor, Tensor]
    compiled: bool


class Eagle3Draft(Draft):
    """EAGLE-3 draft; parameter names are those of the exported checkpoint."""

    def __init__(self, config: DraftConfig, d2t: Tensor, t2d: Tensor) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(config.num_aux_layers * config.target_hidden_size, width, bias=False)
        self.fc_norm = nn.ModuleList(
            [RMSNorm(config.target_hidden_size, eps) for _ in range(config.num_aux_layers if config.fc_norm else 0)]
        )
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rope = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )
        self.set_vocab(d2t, t2d)
        self.make_own_embeddings()

    # ------------------------------------------------------------------------------------------------------ inference

    def first_state(self, features: Tensor) -> Tensor:
        if len(self.fc_norm):
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], -1)
        return linear(features.to(self.fc.weight.dtype), self.fc.weight)

    def step(
        self, state_BTD: Tensor, embeds_BTD: Tensor, position_ids_BT: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        layer, head_dim = self.midlayer, self.config.head_dim
        x = torch.cat([layer.input_layernorm(embeds_BTD.to(state_BTD.dtype)), layer.hidden_norm(state_BTD)], -1)
        split = lambda y: y.unflatten(-1, (-1, head_dim))  # noqa: E731
        q, k, v = (split(p(x)) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))
        cos, sin = self.rope(position_ids_BT)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        attended = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        state = state_BTD + layer.self_attn.o_proj(attended)
        state = state + layer.mlp(layer.post_attention_layernorm(state))
        head_input = self.norm(state)
        return (head_input if self.config.norm_output else state), head_input

    def logits(self, head_input: Tensor) -> Tensor:
        return self.lm_head(head_input)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------------------- training

    def forward(self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings) -> StepOutput:
        """One training pass of K steps; sums and counts, see `StepOutput`."""
        device = batch.input_ids_N.device
        host_mask_N = batch.loss_mask_N if batch.host_mask_N is None else batch.host_mask_N
        predictable_N = predictable_tokens(host_mask_N, batch.doc_offsets, 2 if ttt.eagle_mask else 0)
        owned_N = None
        if ttt.sequence is not None:
            owned_N = ttt.sequence.own_rows(predictable_N, batch.doc_offsets, ttt.num_steps)
        plan, teacher, in_vocab_M = self._plan_and_ask(batch, target_head, predictable_N, owned_N, ttt)
        head_in_MKD = self._unroll(batch, target_head, plan, ttt)
        exists_MK = plan.head_places_KM.T >= 0  # no row before the start of a document
        counted_MK = exists_MK & in_vocab_M[:, None]
        decay_K = torch.tensor([ttt.step_decay**k for k in range(ttt.num_steps)], dtype=torch.float64).to(device)
        teacher_id_M = self.draft_id_of(teacher.argmax_M)
        loss, loss_MK, correct_MK = ttt_cross_entropy(
            head_in_MKD, counted_MK * decay_K, teacher.draft_logits_MVd, teacher_id_M, self.lm_head.weight, ttt.compile,
            ttt.loss, None if ttt.loss == "ce" else teacher.lse_M,
        )  # fmt: skip
        alpha_MK: Tensor | None = None
        if ttt.collect_rows:
            head = self.lm_head.weight.to(head_in_MKD.dtype)
            correct_MK, alpha_MK = judge_rows(head_in_MKD, teacher, teacher_id_M, head)
        results = RowResults(loss_MK, correct_MK & counted_MK, counted_MK, alpha_MK)
        return summarize(batch, predictable_N.to(device), plan, loss, results, owned_N)

    def _plan_and_ask(
        self,
        batch: DraftBatch,
        target_head: TargetHead,
        predictable_N: Tensor,
        owned_N: Tensor | None,
        ttt: TTTSettings,
    ) -> tuple[RowPlan, Teacher, Tensor]:
        """Which rows are computed, and what the target says about the tokens they predict: is it in the vocabulary?

        On a CPU tokens whose teacher is not are left out of the plan. On a GPU that would wait for the teacher, and
        between processes it would have to be told to all; there these few get weight 0.
        """
        device, want_lse = batch.input_ids_N.device, ttt.collect_rows or ttt.loss != "ce"
        if owned_N is not None:
            plan = plan_rows(predictable_N, batch.doc_offsets, ttt.num_steps, owned_N=owned_N).to(device)
            last_MH = batch.last_NH[plan.predicted_tokens - 1]
            teacher = ask_teacher(target_head, last_MH, self.target_ids, want_lse)
            return plan, teacher, self.t2d[teacher.argmax_M]
        tokens_M = predictable_N.nonzero().squeeze(1).to(device, non_blocking=True)
        teacher = ask_teacher(target_head, batch.last_NH[tokens_M - 1], self.target_ids, want_lse)
        in_vocab_M = self.t2d[teacher.argmax_M]
        counted_N = predictable_N
        if device.type == "cpu":
            counted_N = torch.zeros_like(predictable_N).index_fill_(0, tokens_M[in_vocab_M], True)
            teacher, in_vocab_M = select_tokens(teacher, in_vocab_M), in_vocab_M[in_vocab_M]
        return plan_rows(counted_N, batch.doc_offsets, ttt.num_steps).to(device), teacher, in_vocab_M

    def _unroll(self, batch: DraftBatch, target_head: TargetHead, plan: RowPlan, ttt: TTTSettings) -> Tensor:
        """Run the K steps; -> inputs of the head [M, K, D], zeros where a row does not exist."""
        dtype = ttt.compute_dtype or self.fc.weight.dtype
        shared, state_ND = self._begin(batch, target_head, plan, ttt, dtype)
        state_RD = take_rows(state_ND, plan.steps[0].from_previous)
        later: list[tuple[Tensor, Tensor]] = []
        states = []
        for k, rows in enumerate(plan.steps):
            if k and rows.from_previous is not None:
                state_RD = take_rows(state_RD, rows.from_previous)
                later = [(take_rows(key, rows.from_previous), take_rows(v, rows.from_previous)) for key, v in later]
            if ttt.activation_checkpointing:
                state_RD, own = checkpoint(self._train_step, state_RD, later, rows, shared, k, use_reentrant=False)
            else:
                state_RD, own = self._train_step(state_RD, later, rows, shared, k)
            later = [*later, own] if k else []
            if self.config.norm_output:
                state_RD = self.norm(state_RD)
            states.append(state_RD)
        head_in_MKD = gather_heads(states, plan.head_places_KM)
        return head_in_MKD if self.config.norm_output else self.norm(head_in_MKD)

    def _begin(
        self, batch: DraftBatch, target_head: TargetHead, plan: RowPlan, ttt: TTTSettings, dtype: torch.dtype
    ) -> tuple[Unrolling, Tensor]:
        """What is made once: weights, the embeddings' half of q, k, v, and h_0, key and value of every key row."""
        layer, device = self.midlayer, batch.input_ids_N.device
        weights = self._layer_weights(dtype)
        embeds = self.token_embeddings(batch.input_ids_N[plan.embed_tokens], target_head).to(dtype)
        shared = Unrolling(
            weights=weights,
            embed_qkv=LateTable(weights.qkv_e(layer.input_layernorm(embeds))),
            tables=self.rope.tables(plan.num_positions),
            attention=get_attention(ttt.attention_backend, device.type),
            attention_dtype=attention_dtype(dtype, device.type),
            kv_first=(torch.empty(0), torch.empty(0)),
            compiled=ttt.compile,
        )
        state_ND = self._first_state_packed(batch.aux_NG.index_select(0, plan.key_tokens).to(dtype))
        heads = (0, self.config.num_key_value_heads, self.config.num_key_value_heads)
        _, key, value = self._project(state_ND, plan.key_embed_places, plan.key_positions, heads, shared)
        if ttt.sequence is not None:
            assert plan.key_places is not None
            key, value = ttt.sequence.share(key, value, plan.key_places, plan.num_keys)
        shared.kv_first = (key, value)
        return shared, state_ND

    def _layer_weights(self, dtype: torch.dtype) -> LayerWeights:
        attention, mlp, width = self.midlayer.self_attn, self.midlayer.mlp, self.config.hidden_size
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        return LayerWeights(
            qkv_e=LateWeight([weight[:, :width] for weight in qkv], dtype),
            qkv_h=LateWeight([weight[:, width:] for weight in qkv], dtype),
            o=LateWeight([attention.o_proj.weight], dtype),
            gate_up=LateWeight([mlp.gate_proj.weight, mlp.up_proj.weight], dtype),
            down=LateWeight([mlp.down_proj.weight], dtype),
        )

    def _first_state_packed(self, aux_NG: Tensor) -> Tensor:
        if len(self.fc_norm):
            parts = aux_NG.chunk(len(self.fc_norm), -1)
            aux_NG = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], -1)
        return linear(aux_NG, self.fc.weight.to(aux_NG.dtype))

    def _project(
        self,
        state_RD: Tensor,
        embed_places_R: Tensor,
        position_ids_R: Tensor,
        heads: tuple[int, int, int],
        shared: Unrolling,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (after RoPE), v [R, heads, d] of some rows; `heads` says how many of each, 0 leaves one out."""
        all_heads = (self.config.num_attention_heads, *[self.config.num_key_value_heads] * 2)
        stop = self.config.head_dim * sum(all_heads)
        first = stop - self.config.head_dim * sum(heads) if heads[0] == 0 else 0
        stop = first + self.config.head_dim * sum(heads)
        embed_half = shared.embed_qkv.rows(embed_places_R, first, stop)
        qkv = shared.weights.qkv_h(self.midlayer.hidden_norm(state_RD), embed_half, first, stop)
        return split_rotated(qkv, shared.tables, position_ids_R, heads, shared.attention_dtype)

    def _train_step(
        self, state_RD: Tensor, later: list[tuple[Tensor, Tensor]], rows: StepRows, shared: Unrolling, k: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The layer over the needed rows of step k -> (h_{k+1} before any norm, this step's own key and value)."""
        layer, weights = self.midlayer, shared.weights
        groups = self.config.num_key_value_heads if k else 0  # keys and values of step 0 were made for all key rows
        heads = (self.config.num_attention_heads, groups, groups)
        q_RHd, key, value = self._project(state_RD, rows.embed_places, rows.position_ids, heads, shared)
        later = [*later, (key, value)] if k else []
        keys, values = [key for key, _ in later], [value for _, value in later]
        out_RHd = shared.attention(q_RHd, *shared.kv_first, keys, values, rows)
        state_RD = weights.o(out_RHd.flatten(1).to(state_RD.dtype), state_RD)
        gate_up = weights.gate_up(layer.post_attention_layernorm(state_RD))
        state_RD = weights.down(gated(gate_up, layer.mlp.activation, shared.compiled), state_RD)
        return state_RD, (key, value)


def take_rows(x_RD: Tensor, places: Tensor | None) -> Tensor:
    """Rows of x by place; None: all."""
    return x_RD if places is None else x_RD.index_select(0, places)


def pick_rows(x_RD: Tensor, places_M: Tensor) -> Tensor:
    """Rows of x by place; zeros for place -1."""
    return gather_heads([x_RD], places_M[None]).squeeze(1)


def gather_heads(states: list[Tensor], places_KM: Tensor) -> Tensor:
    """Rows places[k] of the k-th state [R_k, D] -> [M, K, D], predicted token first; zeros for place -1."""
    return _GatherHeads.apply(places_KM, *states)  # type: ignore[no-any-return]


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, places_KM: Tensor, *states: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(places_KM)
        ctx.num_rows = [len(state) for state in states]
        num_steps, num_tokens = places_KM.shape
        out_MKD = states[0].new_empty(num_tokens, num_steps, states[0].shape[1])
        for k, state in enumerate(states):
            if len(state):
                out_MKD[:, k] = state.index_select(0, places_KM[k].clamp(min=0))
        return out_MKD.masked_fill_((places_KM.T < 0).unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx, grad_MKD: Tensor):  # type: ignore[no-untyped-def, override]
        (places_KM,) = ctx.saved_tensors
        grads = []
        for k, num_rows in enumerate(ctx.num_rows):  # place -1 goes to one row more, which is cut off
            grad = grad_MKD.new_zeros(num_rows + 1, grad_MKD.shape[2])
            grads.append(grad.index_copy_(0, places_KM[k] % (num_rows + 1), grad_MKD[:, k])[:num_rows])
        return None, *grads


def select_tokens(teacher: Teacher, keep_M: Tensor) -> Teacher:
    """The teacher of some of its tokens."""
    if bool(keep_M.all()):
        return teacher
    lse = None if teacher.lse_M is None else teacher.lse_M[keep_M]
    return Teacher(teacher.draft_logits_MVd[keep_M], teacher.argmax_M[keep_M], lse)


@dataclass
class RowResults:
    """Per predicted token and step [M, K]: loss, hit, whether the row exists and counts, alpha."""

    loss_MK: Tensor
    correct_MK: Tensor
    counted_MK: Tensor
    alpha_MK: Tensor | None


@torch.no_grad()
def summarize(
    batch: DraftBatch,
    predictable_N: Tensor,
    plan: RowPlan,
    loss: Tensor,
    results: RowResults,
    owned_N: Tensor | None = None,
) -> StepOutput:
    """Sums per step, and the run of correct steps of each row t = u - 2 - k; of the rows `owned_N` only, if given."""
    correct_MK, counted_MK, alpha_MK = results.correct_MK, results.counted_MK, results.alpha_MK
    collect_rows = alpha_MK is not None
    num_tokens, num_steps = len(predictable_N), counted_MK.shape[1]
    device = predictable_N.device
    offsets = torch.tensor(batch.doc_offsets, device=device)
    tokens = torch.arange(num_tokens, device=device)
    start_N = offsets[torch.bucketize(tokens, offsets[1:], right=True).clamp(max=len(offsets) - 2)]
    rows_KN = tokens[None] - 2 - torch.arange(num_steps, device=device)[:, None]  # [k, u] -> t
    supervised_KN = predictable_N & (rows_KN >= start_N)
    if owned_N is not None:
        supervised_KN &= owned_N.to(device)[rows_KN.clamp(min=0)]

    def by_row(values_KU: Tensor) -> Tensor:  # [k, u] -> [t, k]
        out = torch.zeros(num_steps, num_tokens + num_steps + 2, dtype=torch.bool, device=device)
        for k in range(num_steps):
            out[k, : max(num_tokens - 2 - k, 0)] = values_KU[k, 2 + k :]
        return out[:, :num_tokens].T

    correct_KN = torch.zeros(num_steps, num_tokens, dtype=torch.bool, device=device)
    correct_KN[:, plan.predicted_tokens] = correct_MK.T
    correct_NK, supervised_NK = by_row(correct_KN & supervised_KN), by_row(supervised_KN)
    runs_N = correct_NK.int().cumprod(1).sum(1)
    starts = supervised_NK[:, 0]
    return StepOutput(
        loss=loss,
        loss_sum_K=torch.where(counted_MK, results.loss_MK, 0).sum(0).float(),
        counted_K=counted_MK.sum(0).float(),
        supervised_K=supervised_KN.sum(1).float(),
        correct_K=correct_MK.sum(0).float(),
        run_sum=(runs_N * starts).sum().float(),
        run_rows=starts.sum().float(),
        alpha_sum_K=None if alpha_MK is None else torch.where(counted_MK, alpha_MK, 0).sum(0),
        correct_NK=correct_NK if collect_rows else None,
        supervised_NK=supervised_NK if collect_rows else None,
    )
