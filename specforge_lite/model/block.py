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
from torch.nn.functional import binary_cross_entropy_with_logits, embedding, linear
from torch.utils.checkpoint import checkpoint

from specforge_lite.core.errors import ConfigError
from specforge_lite.model.block_attention import BLOCK_ATTENTION, choose_block_attention
from specforge_lite.model.block_loss import BlockResults, BlockRows, block_loss
from specforge_lite.model.block_plan import BlockPlan, QueryRows, anchor_candidates, draw_anchors, plan_blocks
from specforge_lite.model.config_json import check_target_shape
from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.layers import DraftLayer, RMSNorm, project
from specforge_lite.model.rope import RotaryEmbedding
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch, StepOutput

LOSS_WEIGHTS = {"dspark": (0.1, 0.9), "dflash": (1.0, 0.0)}  # of cross-entropy and L1; that of confidence is 1


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
        self.layers = nn.ModuleList(
            [
                DraftLayer(config, width, norms=("input_layernorm",), head_norms=True)
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.markov_head = MarkovHead(config.vocab_size, config.markov_rank) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(width + config.markov_rank) if config.confidence_head else None
        self.rope = RotaryEmbedding.of(config)
        self.set_vocab(d2t, t2d)
        self.embed_tokens = None

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
    def block_layers(self) -> list[DraftLayer]:
        return [layer for layer in self.layers if isinstance(layer, DraftLayer)]

    # ------------------------------------------------------------------------------------------------------ inference

    def first_state(self, features: Tensor) -> Tensor:
        """[..., A*H] captured states -> context c [..., H]."""
        return self.hidden_norm(project(features, self.fc))  # type: ignore[no-any-return]

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
        mask_N = (batch.loss_mask_N if batch.host_mask_N is None else batch.host_mask_N).cpu()
        if ttt.collect_rows:
            anchors_n = anchor_candidates(mask_N, batch.doc_offsets)
        else:
            anchors_n = draw_anchors(
                mask_N, batch.doc_offsets, batch.sample_ids, ttt.num_anchors, ttt.anchor_seed, batch.epoch
            )
        plan = plan_blocks(mask_N, batch.doc_offsets, anchors_n, self.config.block_size, self.first_slot)
        return self.forward_plan(batch, target_head, ttt, plan, batch.input_ids_N.device)

    def forward_plan(
        self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings, host_plan: BlockPlan, device: torch.device
    ) -> StepOutput:
        """The pass over planned blocks."""
        backend = choose_block_attention(ttt.attention_backend, device.type)
        plan = host_plan.to(device, with_flex_masks=backend == "flex_attention")
        h_RH = self._blocks(batch, target_head, ttt, plan, backend, self.compute_dtype(ttt, device))
        before_U = (plan.labels_U - 1).clamp(min=0)
        decay_P = torch.exp(-torch.arange(plan.num_predictions, device=device) / self.config.loss_gamma)
        ce, l1 = LOSS_WEIGHTS[self.config.algorithm]
        rows = BlockRows(
            label_places_R=plan.label_places_R,
            weights_R=decay_P[plan.prediction_R],
            label_tokens_U=batch.input_ids_N[plan.labels_U],
            teacher_UH=batch.last_NH[before_U] if l1 or ttt.collect_rows else None,
            ce=ce,
            l1=l1,
        )
        markov = None
        if self.markov_head is not None:
            e_UE = embedding(batch.input_ids_N[before_U], self.markov_head.markov_w1.weight)
            markov = (e_UE, self.markov_head.markov_w2.weight)
        loss, results = block_loss(h_RH, markov, rows, target_head, ttt.compile)
        if self.confidence_head is not None:
            x_RF = h_RH.to(loss.dtype)
            if markov is not None:
                x_RF = torch.cat([x_RF, markov[0].to(loss.dtype)[plan.label_places_R]], 1)
            logit_R = project(x_RF, self.confidence_head.proj)[:, 0]
            terms_R = binary_cross_entropy_with_logits(logit_R, results.acceptance_R, reduction="none")
            loss = loss + (rows.weights_R * terms_R).sum()
        return _summarize(batch, plan, host_plan, loss, results, rows.weights_R, ttt.collect_rows)

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
        context_rope, (cos, sin) = self.rope(plan.context_positions_C), self.rope(plan.slot_positions_S)

        def run(layer: DraftLayer, state_SH: Tensor, asking: QueryRows) -> Tensor:
            """One layer; the last computes only the slots that are counted."""
            k_CGd, v_CGd = layer.keys_values(c_CH, *context_rope)
            x_SH = layer.input_layernorm(state_SH)
            k_SGd, v_SGd = layer.keys_values(x_SH, cos, sin)
            own = (state_SH, x_SH, cos, sin)
            if asking is plan.counted:
                own = tuple(t.index_select(0, asking.slots_R) for t in own)  # type: ignore[assignment]
            state_RH, x_RH, *rope = own
            attended = attend(layer.queries(x_RH, *rope), k_CGd, v_CGd, k_SGd, v_SGd, asking, plan)
            return layer.finish(state_RH, attended, ttt.compile)

        state = target_head.embed(self.block_input(batch.input_ids_N[plan.anchors_n]).flatten()).to(dtype)
        for layer in self.block_layers:
            asking = plan.counted if layer is self.layers[-1] else plan.every
            if ttt.activation_checkpointing and torch.is_grad_enabled():
                state = checkpoint(run, layer, state, asking, use_reentrant=False)
            else:
                state = run(layer, state, asking)
        return self.norm(state.index_select(0, plan.counted_back_R))  # type: ignore[no-any-return]


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
    zeros = torch.zeros(num_predictions, dtype=torch.float32, device=device)

    def by_prediction(values_R: Tensor) -> Tensor:
        return zeros.index_add(0, plan.prediction_R, values_R.float())

    counted_P = host_plan.counted_nP.sum(0).float().to(device)
    correct_nP = torch.zeros(len(plan.anchors_n), num_predictions, dtype=torch.bool, device=device)
    correct_nP[plan.counted_slots_R // plan.block_size, plan.prediction_R] = results.correct_R
    correct_NK = supervised_NK = None
    if collect_rows:
        false_NK = torch.zeros(len(batch), num_predictions, dtype=torch.bool, device=device)
        correct_NK = false_NK.index_copy(0, plan.anchors_n - 1, correct_nP)
        supervised_NK = false_NK.index_copy(0, plan.anchors_n - 1, plan.counted_nP)
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
    check_target_shape(config, f"a {kind} draft reads the target's embeddings and head")
    if config.block_size < 2:
        raise ConfigError(f"block_size: expected at least 2, found {config.block_size}")
    if config.mask_token_id is None or not 0 <= config.mask_token_id < config.vocab_size:
        raise ConfigError(
            f"mask_token_id: expected an unused id of the target's embedding table, 0..{config.vocab_size - 1},"
            f" found {config.mask_token_id}"
        )
    if kind == "dflash" and (config.markov_rank or config.confidence_head):
        raise ConfigError("markov_rank, confidence_head: a dflash draft has neither; algorithm dspark has both")
