"""Frequencies of the scaled variants of RoPE (llama3, yarn, linear, longrope), from transformers' own formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from specforge_lite.core.errors import ConfigError, suggest


def scaled_frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    """(inverse frequencies [d / 2], factor of cos and sin). Raises ConfigError for an unknown or incomplete variant."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**scaling, "rope_theta": theta}
    config = SimpleNamespace(
        rope_parameters=parameters,
        rope_scaling=parameters,
        rope_theta=theta,
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_positions,
        standardize_rope_params=lambda: None,
    )
    kind = scaling.get("rope_type")
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ConfigError(f"rope_type: unknown value '{kind}'{suggest(str(kind), ROPE_INIT_FUNCTIONS)}")
    try:
        inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, device=None)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"rope scaling '{kind}' with {scaling}: {type(error).__name__}: {error}") from None
    return inv_freq, float(attention_scaling)
