"""Tiny random models of every target family that transformers carries, shared by the tests of capture, training,
export and decoding. Weights are random but not small, so that a missed scaling or a wrong norm changes the logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

VOCAB, HIDDEN, LAYERS, POSITIONS = 128, 32, 4, 256
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# Wide enough for the kernels of serving engines.
WIDE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "head_dim": 32,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
}

# family -> (model_type, changes to SMALL)
TEXT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-moe": ("qwen3_moe", {**MOE, "num_experts": 4}),
    "phi3": ("phi3", {}),
    "phi4-mini": ("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "sliding_window": 16}),
    "deepseek-v3": ("deepseek_v3", {**MOE, **MLA, "num_key_value_heads": 4, "head_dim": 4}),
    "gemma4": (
        "gemma4_text",
        {
            "final_logit_softcapping": 3.0, "sliding_window": 16, "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
            "attention_multiplier": 0.125, "tie_word_embeddings": True,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 16}),
    "minicpm3": (
        "minicpm3",
        {
            "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 4,
        },
    ),
    "glm4": ("glm4", {}),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {}),
    "nemotron": ("nemotron", {}),
    "phi2": ("phi", {}),
    "llama4": (
        "llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 64},
    ),
}  # fmt: skip
# Families whose text decoder lies inside a wrapper with a vision tower.
WRAPPED_FAMILIES = ("gemma3-vision", "mistral3", "qwen2.5-vl")
# Its modelling code lies beside its config.json.
REMOTE_FAMILIES = ("minicpm4",)
FAMILIES = (*TEXT_FAMILIES, *WRAPPED_FAMILIES, *REMOTE_FAMILIES)
REMOTE_CODE = Path(__file__).parent / "remote_code" / "modeling_minicpm.py"


def family_config(family: str, wide: bool = False) -> Any:
    """A transformers config of the family, tiny; `wide` is for text families only."""
    if family == "gemma3-vision":
        text = {**SMALL, "model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 8}
        vision = {**VISION, "model_type": "siglip_vision_model"}
        return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    if family == "mistral3":
        text = {**SMALL, "model_type": "mistral", "sliding_window": None}
        return transformers.Mistral3Config(text_config=text, vision_config={**VISION, "model_type": "pixtral"})
    if family == "qwen2.5-vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 2, "num_heads": 2, "out_hidden_size": HIDDEN}
        return transformers.Qwen2_5_VLConfig(text_config={**SMALL, "rope_parameters": rope}, vision_config=vision)
    model_type, changes = TEXT_FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**SMALL, **changes, **(WIDE if wide else {})})


def random_model(family: str, wide: bool = False) -> Any:
    """A model with random weights: some as at the start of training, all of them and the norms moved by 0.1."""
    torch.manual_seed(0)
    if family == "minicpm4":
        from tests.remote_code.modeling_minicpm import MiniCPMConfig, MiniCPMForCausalLM

        shape = {**SMALL, **(WIDE if wide else {})}
        model: Any = MiniCPMForCausalLM(
            MiniCPMConfig(
                **shape,
                scale_emb=12,
                dim_model_base=8,
                scale_depth=1.4,
                tie_word_embeddings=True,
            )
        )
    else:
        wrapped = family in WRAPPED_FAMILIES
        auto = transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
        model = auto.from_config(family_config(family, wide), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def save_family(family: str, directory: Path, wide: bool = False) -> Path:
    """Save a random fp32 model of the family; returns `directory`."""
    random_model(family, wide).save_pretrained(directory)
    if family in REMOTE_FAMILIES:
        shutil.copy(REMOTE_CODE, directory)
        config = json.loads((directory / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "modeling_minicpm.MiniCPMConfig",
            "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        }
        (directory / "config.json").write_text(json.dumps(config))
    return directory
