"""The target of speculative decoding: any transformers causal LM, run over a prompt or over a tree of tokens.

No modelling code is touched: aux states come from forward hooks, the cache is `SlotCache`, the tree is an explicit
4D mask with explicit positions. Letters: B rows, T prompt tokens, Q tree nodes, H hidden size, G draft features
(A*H aux states, EAGLE-1: H), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specforge_lite.capture.base import check_aux_layer_ids
from specforge_lite.capture.hf import find_decoder
from specforge_lite.checkpoints.draft_files import unnamed_aux_layer_ids
from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.kv_cache import GROUPED, SlotCache, share_keys_of_groups
from specforge_lite.inference.output import Metered
from specforge_lite.inference.tree import TokenTree

MASKED_ATTENTION = ("eager", "sdpa", GROUPED)
ROUNDING_TOKENS = 16
# Layers whose cache holds one key per token; the state of any other kind cannot be taken back to an earlier token.
KEY_PER_TOKEN = ("full_attention", "sliding_attention", "chunked_attention")


class Target(Metered):
    """A causal LM that is asked for logits and draft features.

    aux_layer_ids: outputs of these layers are the features; None with `last_state`: the normed last hidden state
    (EAGLE-1). Raises ConfigError for a model that trees cannot be run on.
    """

    def __init__(self, model: Any, aux_layer_ids: Sequence[int] | None, last_state: bool = False) -> None:
        self.model = model.eval()
        self.decoder, layers = find_decoder(model)
        self.num_layers = len(layers)
        self.text_config = model.config.get_text_config()
        self.layer_types = attention_kinds(self.text_config)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.get_input_embeddings().weight.device
        check_runnable(model)
        share_keys_of_groups(model)
        self.last_state = last_state
        ids = aux_layer_ids if aux_layer_ids is not None else unnamed_aux_layer_ids(self.num_layers)
        self.aux_layer_ids = () if last_state else check_aux_layer_ids(ids, self.num_layers)
        self.keeps_some_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._listening = False
        self._taps: dict[int, Tensor] = {}
        for i in self.aux_layer_ids:
            layers[i].register_forward_hook(self._tap(i))
        if last_state:
            self.decoder.register_forward_hook(self._tap(-1))

    @property
    def embedding_VH(self) -> Tensor:
        """The target's raw embedding table, which the draft shares."""
        return self.model.get_input_embeddings().weight  # type: ignore[no-any-return]

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(getattr(self.text_config, "max_position_embeddings", None) or 1 << 30)

    def new_cache(self, batch_size: int, capacity: int) -> SlotCache:
        return SlotCache(self.num_layers, batch_size, capacity, self.device)

    def prefill(self, cache: SlotCache, row: int, prompt_T: Tensor) -> tuple[Tensor, Tensor]:
        """Run one row's prompt -> (logits after its last token [V], features [T, G]).

        One row at a time: no padding, and the very computation of the model's own `generate`.
        """
        cache.begin(len(prompt_T), row=row)
        positions = torch.arange(len(prompt_T), device=self.device)[None]
        logits, features = self._forward(prompt_T[None], positions, None, cache, last_only=True)
        cache.advance([len(prompt_T)], row=row)
        return logits[0, -1], features[0]

    def verify(self, cache: SlotCache, tree: TokenTree) -> tuple[Tensor, Tensor]:
        """Run a tree per row -> (logits [B, Q, V], features [B, Q, G]); `cache.keep` must follow.

        A root alone, behind texts of one length, runs without a mask, as the model's own `generate` does.
        """
        cache.begin(tree.num_nodes)
        positions_BQ = cache.lengths_B[:, None] + tree.depths_BQ
        no_mask = tree.num_nodes == 1 and cache.plan.start is not None
        masks = None if no_mask else self._masks(cache, tree.ancestors_BQQ, positions_BQ)
        return self._forward(tree.tokens_BQ, positions_BQ, masks, cache)

    def _masks(self, cache: SlotCache, sees_BQQ: Tensor, positions_BQ: Tensor) -> Any:
        """One additive 4D mask, or one per kind of layer where the model has several."""
        full = cache.mask(sees_BQQ, self.dtype)
        # A slot of an accepted token has its own index as position, that of a node its depth's.
        keys_BE = torch.arange(full.shape[-1], device=self.device).expand(len(full), -1)
        slots_BQ = cache.lengths_B[:, None] + torch.arange(positions_BQ.shape[1], device=self.device)
        keys_B1E = keys_BE.scatter(1, slots_BQ, positions_BQ)[:, None]
        masks = {}
        for kind in self.layer_types:
            masks[kind] = full
            if kind == "sliding_attention":
                near_BQE = keys_B1E > positions_BQ[:, :, None] - int(self.text_config.sliding_window)
            elif kind == "chunked_attention":
                chunk = int(self.text_config.attention_chunk_size)
                near_BQE = keys_B1E // chunk == positions_BQ[:, :, None] // chunk
            else:
                continue
            masks[kind] = full.masked_fill(~near_BQE[:, None], torch.finfo(self.dtype).min)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, mask: Any, cache: SlotCache, last_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        options = {"logits_to_keep": 1} if last_only and self.keeps_some_logits else {}
        self._taps.clear()
        self._listening = True
        try:
            output = self.forward(
                input_ids=tokens_BT, attention_mask=mask, position_ids=positions_BT, past_key_values=cache, **options
            )
        finally:
            self._listening = False
        taps = [self._taps[i].to(self.device) for i in (self.aux_layer_ids or (-1,)) if i in self._taps]
        self._taps.clear()
        return output.logits, torch.cat(taps, -1) if taps else output.logits[..., :0]

    def forward(self, **inputs: Any) -> Any:
        """One counted pass of the model."""
        self.num_forwards += 1
        with self.measured():
            return self.model(**inputs, use_cache=True)

    def _tap(self, key: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._listening:
                self._taps[key] = output if isinstance(output, Tensor) else output[0]

        return hook


def attention_kinds(text_config: Any) -> tuple[str, ...]:
    """Kinds of attention among the layers; raises ConfigError for one whose state cannot be rolled back."""
    kinds = getattr(text_config, "layer_types", None)
    if not kinds:
        windowed = getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"]
    for kind in kinds:
        if kind not in KEY_PER_TOKEN:
            raise ConfigError(
                f"{text_config.model_type}: layers of kind '{kind}' keep a state that cannot be taken back to an"
                f" earlier token; speculative decoding needs {', '.join(KEY_PER_TOKEN)}"
            )
    return tuple(dict.fromkeys(kinds))


def check_runnable(model: Any) -> None:
    """Raise ConfigError unless the model takes positions and an explicit 4D mask."""
    implementation = model.config._attn_implementation
    if implementation not in MASKED_ATTENTION:
        raise ConfigError(
            f"attn_implementation '{implementation}': a tree needs an explicit mask; load the target with"
            f" {' or '.join(MASKED_ATTENTION[:2])}"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"{type(model).__name__} takes no position_ids, and nodes of one depth share a position")


class ExactReplay:
    """The target's own greedy decoding of one row, continued on demand, to decide a near-tie.

    Passes of different shapes round differently (about 1e-6 of the logits in fp32), so a token whose logit leads by
    less than that is not decided by a tree pass. This repeats what `generate` does, prompt first and then token by
    token on a dynamic cache, up to the token in question.
    """

    def __init__(self, target: Target) -> None:
        from transformers import DynamicCache

        self.target = target
        self.cache = DynamicCache(config=target.model.config)
        self.num_done = 0
        self.logits_V = torch.empty(0)

    def logits_after(self, tokens: Sequence[int], num_prompt: int) -> Tensor:
        """Logits [V] after `tokens`, which must continue those of the last call."""
        while self.num_done < len(tokens):
            end = num_prompt if self.num_done == 0 else self.num_done + 1
            ids = torch.tensor([list(tokens[self.num_done : end])], device=self.target.device)
            options = {"logits_to_keep": 1} if self.target.keeps_some_logits else {}
            self.logits_V = self.target.forward(input_ids=ids, past_key_values=self.cache, **options).logits[0, -1]
            self.num_done = end
        return self.logits_V


@torch.inference_mode()
def rounding_units(target: Target, token_ids: Sequence[int]) -> float:
    """How far the logits of the same rows lie apart in passes of different shapes, on this device and in this dtype:
    the largest difference, in units in the last place of its row's largest logit.

    The text's last tokens are read in one pass, in a batch, and one at a time, as decoding reads them.
    """
    from transformers import DynamicCache

    ids_1T = torch.tensor([list(token_ids[-ROUNDING_TOKENS:])], device=target.device)
    cache = DynamicCache(config=target.model.config)
    singles = [target.model(input_ids=ids, past_key_values=cache, use_cache=True) for ids in ids_1T.T[:, None]]
    logits_TV = torch.cat([output.logits[0] for output in singles]).double()
    unit_T = torch.finfo(target.dtype).eps * logits_TV.abs().amax(-1)
    found = 0.0
    for rows in (1, 4):
        other_TV = target.model(input_ids=ids_1T.expand(rows, -1), use_cache=False).logits[-1].double()
        found = max(found, float(((other_TV - logits_TV).abs().amax(-1) / unit_T).max()))
    return found
