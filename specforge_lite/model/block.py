"""DFlash and DSpark: a draft that fills a whole block of tokens in one pass.

    context   c_t = hidden_norm(fc g_t)                 g_t: states of A target layers; c feeds every layer, unchanged
    block     [x_a, MASK, ..., MASK]                    embedded with the target's table, positions a .. a+B-1
    layer     keys of the context and of the block, queries of the block; then SwiGLU; pre-norm, no biases
    output    norm(h) -> the target's own head          dspark: + W2 W1[previous token], and a confidence

`model/block_plan.py` draws the mask and says which slot predicts which token. DFlash is the layout that SGLang and vLLM
call DFLASH (z-lab/dflash: slot 0 carries the anchor and predicts nothing); DSpark predicts from slot 0 on
(DeepSpec; Markov head "vanilla", confidence head with Markov features).

Trained: fc, hidden_norm, layers, norm, Markov and confidence head. Frozen, and the target's: embed_tokens, lm_head.

Letters: N tokens of a batch, C context tokens, n blocks, B slots, S = n*B, R counted slots, U labels, P predictions,
H width, G key heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from specforge_lite.core.errors import ConfigError
from specforge_lite.model.block_attention import BLOCK_ATTENTION, BlockAttention, choose_block_attention
from specforge_lite.model.block_loss import BlockLossWeights, BlockResults, BlockRows, block_loss
from specforge_lite.model.block_plan import BlockPlan, QueryRows, anchor_candidates, draw_anchors, plan_blocks
from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.layers import Projections, RMSNorm, SwiGLU, gated
from specforge_lite.model.rope import RotaryEmbedding, apply_rope
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch, StepOutput

INIT_STD = 0.02  # transformers' initializer_range, as DeepSpec has it


class BlockProjections(Projections):
    """q, k, v, o with a norm over the head width of q and k (Qwen3)."""

    def __init__(self, config: DraftConfig) -> None:
        width, head_dim = config.hidden_size, config.head_dim
        super().__init__(width, width, config.num_attention_heads, config.num_key_value_heads, head_dim)
        self.q_norm: RMSNorm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm: RMSNorm = RMSNorm(head_dim, config.rms_norm_eps)


class BlockLayer(nn.Module):
    """A pre-norm Qwen3 layer whose keys are the context's and the block's."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.self_attn = BlockProjections(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def keys_values(self, x_RH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rows -> (keys after norm and RoPE, values) [R, G, d]; of the context, or of slots after input_layernorm."""
        attention = self.self_attn
        k, v = (
            _linear(x_RH, p.weight).unflatten(-1, (-1, self.head_dim)) for p in (attention.k_proj, attention.v_proj)
        )
        return apply_rope(attention.k_norm(k), cos, sin), v

    def queries(self, x_RH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rows after input_layernorm -> queries [R, H, d]."""
        q = _linear(x_RH, self.self_attn.q_proj.weight).unflatten(-1, (-1, self.head_dim))
        return apply_rope(self.self_attn.q_norm(q), cos, sin)

    def finish(self, state_RH: Tensor, attended_RHd: Tensor, compiled: bool = False) -> Tensor:
        """Output projection and feed-forward, both added to the state."""
        state_RH = state_RH + _linear(attended_RHd.flatten(-2), self.self_attn.o_proj.weight)
        mlp, x = self.mlp, self.post_attention_layernorm(state_RH)
        gate_up = torch.cat([_linear(x, mlp.gate_proj.weight), _linear(x, mlp.up_proj.weight)], -1)
        return state_RH + _linear(gated(gate_up, mlp.activation, compiled), mlp.down_proj.weight)


class MarkovHead(nn.Module):
    """Bias of the logits by the token before: W2 W1[previous], rank r."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)


class ConfidenceHead(nn.Module):
    """Logit of the chance that a slot's token is accepted, from [state ; W1[previous]]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


class BlockDraft(Draft):
    """A DFlash or DSpark draft; parameter names are those of the exported checkpoint."""

    def __init__(self, config: DraftConfig, d2t: Tensor, t2d: Tensor) -> None:
        super().__init__()
        check_block_config(config)
        self.config = config
        width = config.hidden_size
        self.fc = nn.Linear(config.num_aux_layers * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, config.rms_norm_eps)
        self.layers = nn.ModuleList([BlockLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.markov_head = MarkovHead(config.vocab_size, config.markov_rank) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(width + config.markov_rank) if config.confidence_head else None
        self.rope = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )
        self.set_vocab(d2t, t2d)
        self.embed_tokens = None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def first_slot(self) -> int:
        """Slot of the first prediction."""
        return self.config.block_size - self.config.tokens_per_block

    @property
    def num_predictions(self) -> int:
        """Tokens a block drafts."""
        return self.config.tokens_per_block

    def num_training_steps(self, ttt_length: int) -> int:
        return self.num_predictions

    @property
    def block_layers(self) -> list[BlockLayer]:
        return [layer for layer in self.layers if isinstance(layer, BlockLayer)]

    # ------------------------------------------------------------------------------------------------------ inference

    def first_state(self, features: Tensor) -> Tensor:
        """[..., A*H] captured states -> context c [..., H]."""
        return self.hidden_norm(_linear(features, self.fc.weight))  # type: ignore[no-any-return]

    def block_input(self, anchors_n: Tensor) -> Tensor:
        """Anchor tokens [n] -> ids of their blocks [n, B]."""
        ids = anchors_n.new_full((len(anchors_n), self.config.block_size), int(self.config.mask_token_id or 0))
        ids[:, 0] = anchors_n
        return ids

    def markov_bias(self, previous_n: Tensor) -> Tensor | None:
        """Bias [n, V] of the logits that follow the tokens `previous_n`; None without a Markov head."""
        if self.markov_head is None:
            return None
        return linear(embedding(previous_n, self.markov_head.markov_w1.weight), self.markov_head.markov_w2.weight)

    def confidence(self, state_nH: Tensor, previous_n: Tensor) -> Tensor | None:
        """Confidence logits [n] of slots; None without a confidence head."""
        if self.confidence_head is None:
            return None
        parts = [state_nH]
        if self.markov_head is not None:
            parts.append(embedding(previous_n, self.markov_head.markov_w1.weight).to(state_nH.dtype))
        return self.confidence_head.proj(torch.cat(parts, -1))[..., 0]  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------------------- training

    def forward(self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings) -> StepOutput:
        """One training pass; `loss` is a sum, `weight_sum` what it is divided by. Step k of the per-step sums is
        prediction k of every block."""
        device = batch.input_ids_N.device
        mask_N = (batch.loss_mask_N if batch.host_mask_N is None else batch.host_mask_N).cpu()
        if ttt.collect_rows:
            anchors_n = anchor_candidates(mask_N, batch.doc_offsets)
        else:
            anchors_n = draw_anchors(
                mask_N, batch.doc_offsets, batch.sample_ids, ttt.num_anchors, ttt.anchor_seed, batch.epoch
            )
        plan = plan_blocks(mask_N, batch.doc_offsets, anchors_n, self.config.block_size, self.first_slot)
        return self.forward_plan(batch, target_head, ttt, plan, device)

    def forward_plan(
        self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings, plan: BlockPlan, device: torch.device
    ) -> StepOutput:
        """The pass over planned blocks."""
        backend = choose_block_attention(ttt.attention_backend, device.type)
        host_plan, plan = plan, plan.to(device, with_flex_masks=backend == "flex_attention")
        dtype = self.compute_dtype(ttt, device)
        h_RH = self._blocks(batch, target_head, ttt, plan, backend, dtype)
        labels_U = plan.labels_U
        previous_U = batch.input_ids_N[(labels_U - 1).clamp(min=0)]
        decay_P = torch.exp(-torch.arange(plan.num_predictions, device=device) / self.config.loss_gamma)
        with_teacher = self.config.algorithm == "dspark" or ttt.collect_rows
        weights = BlockLossWeights() if self.config.algorithm == "dspark" else BlockLossWeights(1.0, 0.0, 0.0)
        block_rows = BlockRows(
            label_places_R=plan.label_places_R,
            weights_R=decay_P[plan.prediction_R],
            label_tokens_U=batch.input_ids_N[labels_U],
            teacher_UH=batch.last_NH[(labels_U - 1).clamp(min=0)],
            weights=weights,
            needs_teacher=with_teacher,
        )
        markov = None
        if self.markov_head is not None:
            markov = (embedding(previous_U, self.markov_head.markov_w1.weight), self.markov_head.markov_w2.weight)
        head = self.confidence_head
        confidence = None if head is None else (head.proj.weight, head.proj.bias)
        loss, results = block_loss(h_RH, markov, confidence, block_rows, target_head, ttt.compile)
        return _summarize(batch, plan, host_plan, loss, results, block_rows.weights_R, ttt.collect_rows)

    def _blocks(
        self,
        batch: DraftBatch,
        target_head: TargetHead,
        ttt: TTTSettings,
        plan: BlockPlan,
        backend: str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Normed states [R, H] of the counted slots, in the order of their labels."""
        attend = BLOCK_ATTENTION[backend]
        c_CH = self.first_state(batch.aux_NG.index_select(0, plan.context_tokens_C).to(dtype))
        ids_nB = self.block_input(batch.input_ids_N[plan.anchors_n])
        state = target_head.embed(ids_nB.flatten()).to(dtype)
        context_rope = self.rope(plan.context_positions_C)
        slot_rope = self.rope(plan.slot_positions_S)
        layers = self.block_layers
        for index, layer in enumerate(layers):
            last = index == len(layers) - 1
            queries = plan.counted if last else plan.every
            run = (layer, state, c_CH, context_rope, slot_rope, queries, last, plan, attend, ttt.compile)
            state = (
                checkpoint(_run_layer, *run, use_reentrant=False)
                if ttt.activation_checkpointing and torch.is_grad_enabled()
                else _run_layer(*run)
            )
        return self.norm(state.index_select(0, plan.counted_back_R))  # type: ignore[no-any-return]


def _run_layer(
    layer: BlockLayer,
    state_SH: Tensor,
    c_CH: Tensor,
    context_rope: tuple[Tensor, Tensor],
    slot_rope: tuple[Tensor, Tensor],
    queries: QueryRows,
    last: bool,
    plan: BlockPlan,
    attend: BlockAttention,
    compiled: bool,
) -> Tensor:
    """One layer; the last computes the slots of `queries` only."""
    k_CGd, v_CGd = layer.keys_values(c_CH, *context_rope)
    x_SH = layer.input_layernorm(state_SH)
    k_SGd, v_SGd = layer.keys_values(x_SH, *slot_rope)
    cos, sin = slot_rope
    if last:
        state_SH, x_SH, cos, sin = (t.index_select(0, queries.slots_R) for t in (state_SH, x_SH, cos, sin))
    attended = attend(layer.queries(x_SH, cos, sin), k_CGd, v_CGd, k_SGd, v_SGd, queries, plan)
    return layer.finish(state_SH, attended, compiled)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight.to(x.dtype))


@torch.no_grad()
def _summarize(
    batch: DraftBatch,
    plan: BlockPlan,
    host_plan: BlockPlan,
    loss: Tensor,
    results: BlockResults,
    weights_R: Tensor,
    collect_rows: bool,
) -> StepOutput:
    """Sums per prediction. Row t = a - 1 carries anchor a, as in EAGLE's rows: it predicts x_{t+2+k}."""
    device, num_predictions = loss.device, plan.num_predictions

    def by_prediction(values_R: Tensor) -> Tensor:
        sums = torch.zeros(num_predictions, dtype=torch.float32, device=device)
        return sums.index_add_(0, plan.prediction_R, values_R.float())

    counted_P = host_plan.counted_nP.sum(0).float().to(device)
    first_slot = plan.block_size - num_predictions
    correct_nP = torch.zeros(len(plan.anchors_n), num_predictions, dtype=torch.bool, device=device)
    block_R = plan.counted_slots_R // plan.block_size
    correct_nP[block_R, plan.counted_slots_R % plan.block_size - first_slot] = results.correct_R
    correct_NK = supervised_NK = None
    if collect_rows:
        correct_NK, supervised_NK = (
            torch.zeros(len(batch), num_predictions, dtype=torch.bool, device=device) for _ in range(2)
        )
        correct_NK[plan.anchors_n - 1], supervised_NK[plan.anchors_n - 1] = correct_nP, plan.counted_nP
    return StepOutput(
        loss=loss,
        loss_sum_K=by_prediction(results.ce_R),
        counted_K=counted_P,
        supervised_K=counted_P,
        correct_K=by_prediction(results.correct_R),
        run_sum=correct_nP.int().cumprod(1).sum().float(),
        run_rows=torch.tensor(float(len(plan.anchors_n)), device=device),
        alpha_sum_K=by_prediction(results.acceptance_R) if collect_rows else None,
        correct_NK=correct_NK,
        supervised_NK=supervised_NK,
        weight_sum=weights_R.sum(),
    )


def check_block_config(config: DraftConfig) -> None:
    """Raise ConfigError for a shape that no engine serves."""
    kind = config.algorithm
    if config.draft_vocab_size != config.vocab_size:
        raise ConfigError(
            f"draft_vocab_size {config.draft_vocab_size} != vocab_size {config.vocab_size}: a {kind} draft uses the"
            " target's head and has its whole vocabulary"
        )
    if config.target_hidden_size != config.hidden_size:
        raise ConfigError(
            f"hidden_size {config.hidden_size} != target_hidden_size {config.target_hidden_size}: a {kind} draft reads"
            " the target's embeddings and head, so it is as wide as the target"
        )
    if config.block_size < 2:
        raise ConfigError(f"block_size: expected at least 2, found {config.block_size}")
    if config.mask_token_id is None or not 0 <= config.mask_token_id < config.vocab_size:
        raise ConfigError(
            f"mask_token_id: expected an unused id of the target's embedding table, 0..{config.vocab_size - 1},"
            f" found {config.mask_token_id}"
        )
    if kind == "dflash" and (config.markov_rank or config.confidence_head):
        raise ConfigError("markov_rank, confidence_head: a dflash draft has neither; algorithm dspark has both")
