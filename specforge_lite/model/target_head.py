"""The three frozen tensors of a target that a draft needs: token embedding, final norm, output head.

They are read straight from the safetensors shards; the target's layers are never loaded by the trainer.
Scalings that a family applies around them (Gemma's sqrt(H), MiniCPM's `scale_emb` and `dim_model_base`, Granite's and
Cohere's logit scales, soft caps) live here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.errors import CheckpointError
from specforge_lite.core.weight_files import logical_names, read_weight, weight_files

EMBED_NAMES = (
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "transformer.wte.weight",
)
NORM_NAMES = (
    "model.norm.weight",
    "language_model.model.norm.weight",
    "model.language_model.norm.weight",
    "transformer.ln_f.weight",
)
HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight", "output.weight")
# Where no full name fits: names that end so, outside of layers and of other towers, if there is exactly one.
EMBED_ENDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight",
)  # fmt: skip
NORM_ENDINGS = (
    "model.norm.weight", "ln_f.weight", "final_layernorm.weight", "final_layer_norm.weight", "norm_f.weight",
)  # fmt: skip
HEAD_ENDINGS = ("lm_head.weight", "embed_out.weight", "output_layer.weight")
EMBEDDING, NORM, HEAD = "token embedding", "final norm", "output head"
PARTS = {
    NORM: (NORM_NAMES, NORM_ENDINGS),
    EMBEDDING: (EMBED_NAMES, EMBED_ENDINGS),
    HEAD: (HEAD_NAMES, HEAD_ENDINGS),
}
OTHER_TOWERS = ("vision", "visual", "audio", "projector", "mtp", "layers.", "blocks.", "encoder", ".h.")

# Families whose norm multiplies by 1 + weight; the checkpoint holds weight.
ONE_PLUS_WEIGHT = (
    "gemma", "gemma2", "gemma3", "gemma3_text", "nemotron", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "recurrent_gemma", "t5gemma", "vaultgemma",
)  # fmt: skip


@dataclass
class TargetHead:
    """Frozen embedding, final norm and head of a target.

    embed_VH, lm_head_VH: [V, H] (the same tensor when tied). norm_weight_H: effective weight of the final norm (Gemma's
    1 + w already added), fp32. Logits = softcap(logit_scale * (lm_head(y) + bias)).
    norm_centers: the final norm is a LayerNorm (Cohere, StarCoder2, Nemotron), not an RMSNorm; norm_bias_H is its bias.
    """

    embed_VH: Tensor
    lm_head_VH: Tensor
    norm_weight_H: Tensor
    norm_eps: float
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    norm_centers: bool = False
    norm_bias_H: Tensor | None = None
    head_bias_V: Tensor | None = None

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., H], UNSCALED: serving engines share the raw table with the draft."""
        return torch.nn.functional.embedding(token_ids, self.embed_VH)

    def norm(self, hidden: Tensor) -> Tensor:
        """The target's final norm, in fp32, back to the input's dtype."""
        x = hidden.float()
        if self.norm_centers:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm_eps) * self.norm_weight_H
        return (x if self.norm_bias_H is None else x + self.norm_bias_H).to(hidden.dtype)

    def logits(self, last_normed: Tensor) -> Tensor:
        """Normed last hidden state [..., H] -> logits [..., V]."""
        raw = last_normed.to(self.lm_head_VH.dtype) @ self.lm_head_VH.T
        return self.scale_logits(raw if self.head_bias_V is None else raw + self.head_bias_V)

    def scale_logits(self, raw: Tensor) -> Tensor:
        """The family's scaling and soft cap of raw head products."""
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        if self.logit_softcap:
            raw = self.logit_softcap * torch.tanh(raw / self.logit_softcap)
        return raw

    def finish(self, raw: Tensor) -> tuple[Tensor, Tensor | float | None]:
        """Products with the whole head -> (logits, their slope d logit / d product, None for 1)."""
        if self.head_bias_V is not None:
            raw = raw + self.head_bias_V.to(raw.dtype)
        logits = self.scale_logits(raw)
        if not self.logit_softcap:
            return logits, None if self.logit_scale == 1.0 else self.logit_scale
        return logits, (1 - (logits / self.logit_softcap).square()) * self.logit_scale  # of cap * tanh(x / cap)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TargetHead:
        """Copy to a device; the embedding and the head stay one tensor where they were tied."""
        embed = self.embed_VH.to(device=device, dtype=dtype)
        tied = self.lm_head_VH is self.embed_VH
        return replace(
            self,
            embed_VH=embed,
            lm_head_VH=embed if tied else self.lm_head_VH.to(device=device, dtype=dtype),
            norm_weight_H=self.norm_weight_H.to(device),
            norm_bias_H=None if self.norm_bias_H is None else self.norm_bias_H.to(device),
            head_bias_V=None if self.head_bias_V is None else self.head_bias_V.to(device=device, dtype=dtype),
        )


def load_target_head(model_dir: str | Path, config: Any) -> TargetHead:
    """Read embedding, final norm and head of the model in `model_dir` (a local directory with safetensors).

    config: its transformers config. Raises CheckpointError naming the tensor that is missing.
    """
    directory = Path(model_dir)
    files = weight_files(directory)
    names = logical_names(files)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {part: _find(names, *PARTS[part]) for part in PARTS}
    tied = bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))
    if tied and found[HEAD] is None:
        found[HEAD] = found[EMBEDDING]
    if tied and found[EMBEDDING] is None:
        found[EMBEDDING] = found[HEAD]
    norm = read_tensor(directory, found[NORM], NORM).float() + float(text.model_type in ONE_PLUS_WEIGHT)
    embed = read_tensor(directory, found[EMBEDDING], EMBEDDING)
    head = embed if found[HEAD] == found[EMBEDDING] else read_tensor(directory, found[HEAD], HEAD)
    biases = {part: (found[part] or "").removesuffix("weight") + "bias" for part in (NORM, HEAD)}
    norm_bias, head_bias = (read_weight(files, name) if name in files else None for name in biases.values())
    centers, eps = final_norm_kind(text)
    embed_scale, logit_scale, softcap = family_scales(text)
    return TargetHead(
        embed_VH=embed,
        lm_head_VH=head,
        norm_weight_H=norm,
        norm_eps=eps,
        embed_scale=embed_scale,
        logit_scale=logit_scale,
        logit_softcap=softcap,
        norm_centers=centers or norm_bias is not None,
        norm_bias_H=None if norm_bias is None else norm_bias.float(),
        head_bias_V=head_bias,
    )


def _find(stored: Collection[str], names: tuple[str, ...], endings: tuple[str, ...]) -> str | None:
    """The first of `names` that the model has, else its only text-model tensor with one of `endings`."""
    similar = [n for n in stored if n.endswith(endings) and not any(part in n for part in OTHER_TOWERS)]
    return next((name for name in names if name in stored), similar[0] if len(similar) == 1 else None)


def read_tensor(directory: Path, name: str | None, part: str) -> Tensor:
    """Read the tensor found for a part. Raises CheckpointError where there is none, or none that is read."""
    if name is None:
        names, endings = PARTS[part]
        wanted = ", ".join((*names, *(f"*{ending}" for ending in endings)))
        raise CheckpointError(f"{directory}: {part} not found; looked for {wanted}")
    files = weight_files(directory)
    tensor = read_weight(files, name)
    if tensor is None:
        from specforge_lite.core.quantized import quantization_of

        method = quantization_of(files).get("quant_method") or "a form without a name in config.json"
        raise CheckpointError(
            f"{directory}: {part} {name} is quantised as {method}, which is not read; expected 16 or 32 bits, fp8, AWQ,"
            " GPTQ, NVFP4 or integers of compressed-tensors"
        )
    return tensor


def final_norm_kind(text_config: Any) -> tuple[bool, float]:
    """(is it a LayerNorm, epsilon): RMSNorm families have `rms_norm_eps`, the others one of three older keys."""
    rms_eps = getattr(text_config, "rms_norm_eps", None)
    if rms_eps is not None:
        return False, float(rms_eps)
    for key in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        if getattr(text_config, key, None) is not None:
            return True, float(getattr(text_config, key))
    return False, 1e-5


def family_scales(text_config: Any) -> tuple[float, float, float | None]:
    """(embedding scale, logit scale, logit soft cap) of a target, from its own config keys."""
    hidden = text_config.hidden_size
    embed_scale = 1.0
    if text_config.model_type.startswith(("gemma", "t5gemma", "vaultgemma", "recurrent_gemma")):
        embed_scale = math.sqrt(hidden)
    for key in ("scale_emb", "embedding_multiplier"):  # MiniCPM, Granite
        embed_scale = getattr(text_config, key, None) or embed_scale
    logit_scale = 1.0
    if getattr(text_config, "dim_model_base", None):  # MiniCPM divides the hidden state by H / dim_model_base
        logit_scale = text_config.dim_model_base / hidden
    if getattr(text_config, "logits_scaling", None):  # Granite divides
        logit_scale = 1.0 / text_config.logits_scaling
    for key in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1 multiply
        logit_scale = getattr(text_config, key, None) or logit_scale
    return float(embed_scale), float(logit_scale), getattr(text_config, "final_logit_softcapping", None)
