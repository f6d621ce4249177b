"""The shape of a draft, as its config.json says it, and what every draft network offers to training and inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.model.device import usable_dtype
from specforge_lite.model.layers import ACTIVATIONS
from specforge_lite.model.target_head import TargetHead
from specforge_lite.types import DraftBatch, StepOutput

if TYPE_CHECKING:
    from specforge_lite.model.sequence import SequenceGroup

# attend(q [B, heads, T, d], k [B, kv_heads, T, d], v, both after RoPE) -> [B, heads, T, d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSSES = ("ce", "lk", "lk_alpha")
AUX_IDS_KEY = "eagle_aux_hidden_state_layer_ids"
POSITIVE = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim",
    "target_hidden_size", "max_position_embeddings",
)  # fmt: skip
ARCHITECTURES = {
    "eagle3": "LlamaForCausalLMEagle3",
    "eagle1": "LlamaForCausalLMEagle",
    "dflash": "DFlashDraftModel",
    "dspark": "Qwen3DSparkModel",
}


@dataclass(frozen=True)
class DraftConfig:
    """Shape of a draft network. `hidden_size` is D, `target_hidden_size` H, `vocab_size` V, `draft_vocab_size` Vd.

    aux_layer_ids: 0-based target layers whose OUTPUT feeds `fc` (our convention everywhere; `export` converts).
    norm_output, fc_norm: the two changes of EAGLE-3.1.
    DFlash and DSpark: num_hidden_layers layers fill blocks of block_size slots, whose empty ones read the row
    mask_token_id of the target's embedding; prediction k weighs exp(-k / loss_gamma). DSpark: rank of the Markov head,
    and whether there is a confidence head.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    draft_vocab_size: int
    algorithm: str = "eagle3"
    target_hidden_size: int = 0  # 0: the same as hidden_size
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    aux_layer_ids: tuple[int, ...] | None = None
    num_aux_layers: int = 3
    norm_output: bool = False
    fc_norm: bool = False
    num_hidden_layers: int = 1
    block_size: int = 0
    mask_token_id: int | None = None
    markov_rank: int = 0
    confidence_head: bool = False
    loss_gamma: float = 4.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        derived: dict[str, Any] = {
            "target_hidden_size": self.target_hidden_size or self.hidden_size,
            "head_dim": self.head_dim or self.hidden_size // max(self.num_attention_heads, 1),
        }
        if self.aux_layer_ids is not None:
            derived |= {"aux_layer_ids": tuple(self.aux_layer_ids), "num_aux_layers": len(self.aux_layer_ids)}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        check_choice("algorithm", self.algorithm, ARCHITECTURES)
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a positive number, found {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads"
                f" {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim}: RoPE needs an even number")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ConfigError(f"draft_vocab_size {self.draft_vocab_size} is not in 1..vocab_size {self.vocab_size}")

    @property
    def tokens_per_block(self) -> int:
        """Tokens that a block drafts: a dflash block's first slot only carries the anchor. 0: another kind of draft."""
        return self.block_size - (self.algorithm == "dflash")

    @classmethod
    def from_target(cls, target: Any, draft_vocab_size: int | None = None, algorithm: str = "eagle3") -> DraftConfig:
        """Derive a draft shape from a transformers config: one Llama layer as wide as the target.

        Default draft vocabulary: 32000, or the whole vocabulary where that is smaller. Nested text configs
        (Gemma 3, multimodal) are looked into.
        """
        target = target.get_text_config() if hasattr(target, "get_text_config") else target
        if getattr(target, "is_heterogeneous", False):  # Gemma 4: layers of two head widths; the last is full attention
            target = target.per_layer_config[target.num_hidden_layers - 1]
        heads, kv_heads, head_dim = _llama_heads(target)
        theta, scaling = _plain_rope(target, head_dim)
        whole = algorithm != "eagle3"
        try:
            return cls(
                algorithm=algorithm,
                hidden_size=target.hidden_size,
                intermediate_size=_dense_width(target),
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=head_dim,
                vocab_size=target.vocab_size,
                draft_vocab_size=target.vocab_size if whole else draft_vocab_size or min(32000, target.vocab_size),
                rms_norm_eps=getattr(target, "rms_norm_eps", None) or 1e-5,
                max_position_embeddings=getattr(target, "max_position_embeddings", None) or 2048,
                rope_theta=theta,
                rope_scaling=scaling,
                bos_token_id=target.bos_token_id,
                eos_token_id=target.eos_token_id,
                pad_token_id=target.pad_token_id,
            )
        except ConfigError as error:
            raise ConfigError(f"derived from {target.model_type}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready, in our own convention (not the exported config.json)."""
        ids = self.aux_layer_ids
        return {**dataclasses.asdict(self), "aux_layer_ids": None if ids is None else list(ids)}

    def replace(self, **changes: Any) -> DraftConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError for a value that is none of the known ones."""
    if value not in known:
        raise ConfigError(f"{name}: unknown value '{value}'{suggest(value, known)}")


def _llama_heads(target: Any) -> tuple[int, int, int]:
    """(heads, key/value heads, head width) of a Llama layer for this target.

    An MLA target (DeepSeek-V3, MiniCPM3) has no such heads: its draft takes the widest of 128, 64, ... that divides
    the hidden size (flash kernels know few widths), and 8 key/value heads, or 4, where they divide.
    """
    hidden = int(target.hidden_size)
    heads = int(target.num_attention_heads)
    if getattr(target, "kv_lora_rank", None):
        head_dim = next((d for d in (128, 64, 32, 16, 8) if hidden % d == 0 and hidden // d >= 4), hidden // heads)
        heads = hidden // head_dim
        return heads, next((n for n in (8, 4) if heads % n == 0), heads), head_dim
    kv_heads = int(getattr(target, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(target, "head_dim", None) or hidden // heads)


def _dense_width(target: Any) -> int:
    """Feed-forward width. Where the config gives that of one small expert (gpt-oss), three times the hidden size."""
    hidden, width = int(target.hidden_size), int(getattr(target, "intermediate_size", None) or 0)
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if width == 0 or (width < 2 * hidden and any(getattr(target, key, None) for key in experts)):
        return 3 * hidden
    return width


def _plain_rope(target: Any, head_dim: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None); of models with several (Gemma 3: full and sliding), that of full attention.

    The draft rotates whole heads. LongRoPE factors of a target that rotates a part of each (Phi-4-mini) fit no longer,
    and are left out.
    """
    rope = getattr(target, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    if nested:
        rope = rope.get("full_attention") or nested[0]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    lists = [value for value in rope.values() if isinstance(value, list) and len(value) > 3]
    if kind == "longrope" and any(len(value) != head_dim // 2 for value in lists):
        kind = "default"
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return rope.get("rope_theta") or 10000.0, None if kind == "default" else {**scaling, "rope_type": kind}


@dataclass(frozen=True)
class TTTSettings:
    """How a training pass unrolls and what it sums. `num_steps` K; step k weighs `step_decay**k`.

    loss_mask_alignment: `ours` supervises by the mask of the predicted token; `eagle` reproduces EAGLE's shift by two.
    compute_dtype: None for that of the weights. compile: torch.compile what lies between matrix products.
    loss: ce (soft cross-entropy), or lk and lk_alpha (`model/losses.py`).
    collect_rows: exact argmax, sampling acceptance and per-row results (evaluation).
    sequence: the processes that share each batch (EAGLE-3 only); sums and counts are then those of the own rows.
    EAGLE-1 only: v_weight and p_weight of its two losses, noise on the states it reads while training.
    DFlash and DSpark only: at most num_anchors blocks of a document, drawn anew every epoch from anchor_seed.
    """

    num_steps: int = 7
    step_decay: float = 0.8
    attention_backend: str = "auto"
    loss_mask_alignment: str = "ours"
    compute_dtype: torch.dtype | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    collect_rows: bool = False
    loss: str = "ce"
    sequence: SequenceGroup | None = None
    v_weight: float = 1.0
    p_weight: float = 0.1
    noise: float = 0.2
    num_anchors: int = 512
    anchor_seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"ttt_length: expected at least 1 step, found {self.num_steps}")
        check_choice("loss_mask_alignment", self.loss_mask_alignment, ("ours", "eagle"))
        check_choice("loss", self.loss, LOSSES)


class Draft(nn.Module):
    """What training and inference need of a draft network. Parameters are the trained ones only; `embed_tokens` is
    the target's and is passed in as embeddings."""

    config: DraftConfig
    d2t: Tensor  # [Vd] int64: target id = draft id + d2t[draft id]
    t2d: Tensor  # [V] bool: target ids that are in the draft vocabulary

    def num_training_steps(self, ttt_length: int) -> int:
        """Entries of the per-step sums: the unrolled steps, or the predictions of a block."""
        return ttt_length

    def first_state(self, features: Tensor) -> Tensor:
        """Features captured from the target ([..., A*H] aux states; EAGLE-1: [..., H]) -> h_0 [..., D]."""
        raise NotImplementedError

    def step(
        self, state_BTD: Tensor, embeds_BTD: Tensor, position_ids_BT: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """One layer. state h_k of row t and embedding of the token that follows -> (h_{k+1}, input of the head).

        `attend` owns the keys: training masks, or a KV cache that the caller extends.
        """
        raise NotImplementedError

    def use_target_head(self, target_head: TargetHead) -> None:
        """Give a draft without a head of its own (EAGLE-1) the target's, for `logits`; others need nothing."""

    def logits(self, head_input: Tensor) -> Tensor:
        """[..., D] (second result of `step`) -> draft logits [..., Vd]."""
        raise NotImplementedError

    def forward(self, batch: DraftBatch, target_head: TargetHead, ttt: TTTSettings) -> StepOutput:
        """One training pass; `output.loss` is a SUM, to be divided by the global count of counted positions."""
        raise NotImplementedError

    def set_vocab(self, d2t: Tensor, t2d: Tensor) -> None:
        """Register the vocabulary map as buffers. Raises ConfigError when its sizes are not those of the config."""
        sizes = (self.config.draft_vocab_size, self.config.vocab_size)
        if (len(d2t), len(t2d)) != sizes or int(t2d.sum()) != len(d2t):
            raise ConfigError(
                f"vocabulary map: d2t has {len(d2t)} entries and t2d marks {int(t2d.sum())} of {len(t2d)};"
                f" the draft config says {sizes[0]} of {sizes[1]}"
            )
        self.register_buffer("d2t", d2t.to(torch.int64))
        self.register_buffer("t2d", t2d.to(torch.bool))

    @property
    def target_ids(self) -> Tensor:
        """[Vd] int64: target id of every draft id."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def compute_dtype(self, ttt: TTTSettings, device: torch.device) -> torch.dtype:
        """Of a training pass: that of the weights unless the settings name one that the device computes in."""
        return usable_dtype(ttt.compute_dtype or next(self.parameters()).dtype, device.type)

    def make_own_embeddings(self) -> None:
        """A draft of another width than its target cannot share the embedding table; it carries one, frozen [V, D]."""
        config = self.config
        self.embed_tokens: nn.Embedding | None = None
        if config.hidden_size != config.target_hidden_size:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size).requires_grad_(False)

    def token_embeddings(self, token_ids: Tensor, target_head: TargetHead) -> Tensor:
        """Token ids [...] -> embeddings [..., D]: the target's own rows, or the draft's frozen table."""
        table = target_head.embed if self.embed_tokens is None else self.embed_tokens
        return table(token_ids)  # type: ignore[no-any-return]

    def draft_to_target(self, draft_ids: Tensor) -> Tensor:
        """Map draft vocabulary ids to target ids."""
        return draft_ids + self.d2t[draft_ids]
