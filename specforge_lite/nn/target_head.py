"""The three frozen tensors of a target that a draft needs: token embedding, final norm, output head.

They are read straight from the safetensors shards; the target's layers are never loaded by the trainer.
Scalings that a family applies around them (Gemma's sqrt(H), MiniCPM's `scale_emb` and `dim_model_base`, Granite's and
Cohere's logit scales, soft caps) live here and nowhere else.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.errors import CheckpointError

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


@dataclass
class TargetHead:
    """Frozen embedding, final norm and head of a target.

    embed_VH, lm_head_VH: [V, H] (the same tensor when tied). norm_weight_H: effective RMSNorm weight (Gemma's 1 + w
    already added), fp32. Logits = softcap(logit_scale * lm_head(y)).
    """

    embed_VH: Tensor
    lm_head_VH: Tensor
    norm_weight_H: Tensor
    norm_eps: float
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., H], UNSCALED: serving engines share the raw table with the draft."""
        return torch.nn.functional.embedding(token_ids, self.embed_VH)

    def norm(self, hidden: Tensor) -> Tensor:
        """The target's final RMSNorm, in fp32, back to the input's dtype."""
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm_eps)
        return (x * self.norm_weight_H).to(hidden.dtype)

    def logits(self, last_normed: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normed last hidden state [..., H] -> logits [..., V], or of the head rows `rows` (int64 ids) only."""
        weight = self.lm_head_VH if rows is None else self.lm_head_VH[rows]
        return self.scale_logits(last_normed.to(weight.dtype) @ weight.T)

    def scale_logits(self, raw: Tensor) -> Tensor:
        """The family's scaling and soft cap of raw head products."""
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        if self.logit_softcap:
            raw = self.logit_softcap * torch.tanh(raw / self.logit_softcap)
        return raw

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TargetHead:
        """Copy to a device; the embedding and the head stay one tensor where they were tied."""
        embed = self.embed_VH.to(device=device, dtype=dtype)
        tied = self.lm_head_VH is self.embed_VH
        head = embed if tied else self.lm_head_VH.to(device=device, dtype=dtype)
        return TargetHead(
            embed,
            head,
            self.norm_weight_H.to(device),
            self.norm_eps,
            self.embed_scale,
            self.logit_scale,
            self.logit_softcap,
        )


def load_target_head(model_dir: str | Path, config: Any) -> TargetHead:
    """Read embedding, final norm and head of the model in `model_dir` (a local directory with safetensors).

    config: its transformers config. Raises CheckpointError naming the tensor that is missing.
    """
    directory = Path(model_dir)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    embed = read_tensor(directory, EMBED_NAMES, "token embedding")
    norm = read_tensor(directory, NORM_NAMES, "final norm").float()
    tied = bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))
    head = (
        embed
        if tied and find_tensor(directory, HEAD_NAMES) is None
        else read_tensor(directory, HEAD_NAMES, "output head")
    )
    family = text.model_type
    if family.startswith("gemma"):
        norm = norm + 1.0
    embed_scale, logit_scale, softcap = family_scales(text)
    eps = float(getattr(text, "rms_norm_eps", None) or 1e-5)
    return TargetHead(embed, head, norm, eps, embed_scale, logit_scale, softcap)


def family_scales(text_config: Any) -> tuple[float, float, float | None]:
    """(embedding scale, logit scale, logit soft cap) of a target, from its own config keys."""
    hidden = text_config.hidden_size
    embed_scale = 1.0
    if text_config.model_type.startswith("gemma"):
        embed_scale = math.sqrt(hidden)
    for key in ("scale_emb", "embedding_multiplier"):  # MiniCPM, Granite
        embed_scale = getattr(text_config, key, None) or embed_scale
    logit_scale = 1.0
    if getattr(text_config, "dim_model_base", None):  # MiniCPM divides the hidden state by H / dim_model_base
        logit_scale = text_config.dim_model_base / hidden
    if getattr(text_config, "logits_scaling", None):  # Granite divides
        logit_scale = 1.0 / text_config.logits_scaling
    logit_scale = getattr(text_config, "logit_scale", None) or logit_scale  # Cohere multiplies
    return float(embed_scale), float(logit_scale), getattr(text_config, "final_logit_softcapping", None)


def weight_files(directory: Path) -> dict[str, Path]:
    """Map tensor name -> safetensors file of a model directory, from its index or its only file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in weight_map.items()}
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            files.update(dict.fromkeys(handle.keys(), file))
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors here; other weight formats are not read")
    return files


def find_tensor(directory: Path, names: tuple[str, ...]) -> str | None:
    """The first of `names` that the model directory holds."""
    files = weight_files(directory)
    return next((name for name in names if name in files), None)


def read_tensor(directory: Path, names: tuple[str, ...], what: str) -> Tensor:
    """Read the first of `names` that exists; raise CheckpointError naming all of them otherwise."""
    from safetensors import safe_open

    name = find_tensor(directory, names)
    if name is None:
        raise CheckpointError(f"{directory}: {what} not found; looked for {', '.join(names)}")
    with safe_open(weight_files(directory)[name], framework="pt") as handle:
        return handle.get_tensor(name)
