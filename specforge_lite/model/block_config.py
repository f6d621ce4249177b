"""The config.json of a DFlash or DSpark draft, as engines and other trainers write it, in the fields of DraftConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specforge_lite.core.errors import ConfigError

# Kinds that draft a block in one pass (`model/block.py`) by their architecture; SGLang also registers the third name.
BLOCK_ARCHITECTURES = {"DFlashDraftModel": "dflash", "Qwen3DSparkModel": "dspark", "DSparkDraftModel": "dspark"}
BLOCK_KINDS = ("dflash", "dspark")
# Fields of DraftConfig that no other kind has.
BLOCK_FIELDS = ("num_hidden_layers", "block_size", "mask_token_id", "markov_rank", "confidence_head", "loss_gamma")


def block_kind_of(config: Mapping[str, Any]) -> str | None:
    """`dflash`, `dspark`, or None for a draft of another kind."""
    if "algorithm" in config:
        return config["algorithm"] if config["algorithm"] in BLOCK_KINDS else None
    listed = config.get("architectures") or []
    return BLOCK_ARCHITECTURES.get(str(listed[0])) if listed else None


def with_block_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of a config.json with our names beside the engines' own; those of other kinds lose block fields.

    `target_layer_ids` are layer OUTPUTS, as ours. Raises ConfigError for a layout or a head that is not trained here.
    """
    kind = block_kind_of(values)
    if kind is None:
        return {name: value for name, value in values.items() if name not in BLOCK_FIELDS}
    nested = values.get("dflash_config") or {}
    if values.get("markov_head_type", "vanilla") != "vanilla":
        raise ConfigError(f"{source}: markov_head_type '{values['markov_head_type']}': only vanilla is read")
    layout = values.get("sample_from_anchor", kind == "dspark")
    if layout != (kind == "dspark"):
        raise ConfigError(
            f"{source}: sample_from_anchor {layout}: the slots of {kind} predict in the other layout, one token apart"
        )
    first = lambda *names: next((found for n in names if (found := values.get(n)) is not None), None)  # noqa: E731
    result = dict(values)
    result |= {
        "algorithm": kind,
        "draft_vocab_size": values.get("vocab_size"),
        "aux_layer_ids": first("aux_layer_ids", "target_layer_ids") or nested.get("target_layer_ids"),
        "mask_token_id": values.get("mask_token_id", nested.get("mask_token_id")),
        "markov_rank": (values.get("markov_rank") or nested.get("markov_rank") or 0) if kind == "dspark" else 0,
        "confidence_head": kind == "dspark" and bool(first("confidence_head", "enable_confidence_head")),
    }
    for name in ("eagle_config", "eagle_aux_hidden_state_layer_ids"):
        result.pop(name, None)
    return result
