"""The directory of a DFlash or DSpark draft: one config.json and one set of names that SGLang and vLLM both load.

Read off SGLang 0.5.23 (`models/dspark.py`, `models/dflash.py`, `speculative/dspark_components/dspark_config.py`,
`speculative/dflash_utils.py`) and vLLM 0.32.0 (`model_executor/models/qwen3_dspark.py`, `qwen3_dflash.py`,
`v1/worker/gpu/spec_decode`). Keys are written at every place where one of the two looks.

`target_layer_ids` are 0-based layer OUTPUTS, ours; both engines add 1. embed_tokens and lm_head are left out: SGLang
always takes the target's, vLLM takes the target's where the draft has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from specforge_lite.core.errors import suggest
from specforge_lite.model.draft import DraftConfig
from specforge_lite.model.target_head import family_scales

# Keys of a target's config that change what an engine builds when they are copied into a draft's.
FOREIGN_KEYS = {
    "quantization_config": "engines would read the weights as quantised",
    "num_nextn_predict_layers": "engines would take the draft for a multi-token-prediction model",
    "is_causal": "true makes the block causal; it attends to all of its slots",
    "use_gemma_norm": "SGLang would add 1 to every norm's weight",
    "add_swa_attention_sink_bias": "vLLM would add a sink to the attention, of random weights",
    "logit_scale": "vLLM would scale the draft's logits, Markov bias included",
}
# The same below dflash_config.
FOREIGN_NESTED_KEYS = {
    "causal": "vLLM makes the block causal; it attends to all of its slots",
    "use_swa": "vLLM gives every layer a sliding window",
    "attention_value_scale": "both engines scale the values of the attention",
    "attention_sink_bias": "both engines add a sink to the attention, of random weights",
}


def block_exported_config(config: DraftConfig) -> dict[str, Any]:
    """What the config.json of an exported block draft has besides the keys of every draft."""
    layers, mask = list(config.aux_layer_ids or ()), config.mask_token_id
    values: dict[str, Any] = {
        "model_type": "qwen3",
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "block_size": config.block_size,
        "mask_token_id": mask,
        "target_layer_ids": layers,
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": layers},
        "loss_gamma": config.loss_gamma,
    }
    if config.algorithm == "dspark":
        values |= {
            "markov_rank": config.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": config.confidence_head,
            "confidence_head_with_markov": bool(config.markov_rank),
            "sample_from_anchor": True,
        }
    return values


class Doubt(str):
    """What may be meant; every other problem that a check yields is refused by an engine, or served wrong."""


def block_problems(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shape: DraftConfig,
    wanted: Mapping[str, tuple[int, ...]],
    target: Any | None,
) -> Iterator[str]:
    """What an engine refuses or, worse, loads without a word. wanted: name -> shape of every tensor;
    target: transformers text config of the target."""
    yield from _key_problems(config, shape)
    yield from _tensor_problems(tensors, wanted)
    if target is None:
        return
    for name in ("hidden_size", "vocab_size"):
        if getattr(shape, name) != getattr(target, name):
            yield f"{name} {getattr(shape, name)} != the target's {getattr(target, name)}"
    _, scale, cap = family_scales(target)
    if scale != 1 or cap:
        what = f"scaled by {scale:g}" if scale != 1 else f"capped at {cap:g}"
        yield Doubt(f"the target's logits are {what}, and so the draft was trained; engines leave the draft's raw")
    ids = list(shape.aux_layer_ids or ())
    if ids != sorted(set(ids)):
        yield f"target_layer_ids {ids}: engines hand the states over by ascending layer"
    num_layers = int(target.num_hidden_layers)
    if shape.aux_layer_ids and max(shape.aux_layer_ids) > num_layers - 2:
        yield f"target_layer_ids {list(shape.aux_layer_ids)}; the target has outputs 0..{num_layers - 2}"
    limit = getattr(target, "max_position_embeddings", None)
    if limit and shape.max_position_embeddings != limit:
        yield (
            f"max_position_embeddings {shape.max_position_embeddings} != the target's {limit}: engines size the"
            " draft's RoPE table by it and do not widen it"
        )


def _key_problems(config: Mapping[str, Any], shape: DraftConfig) -> Iterator[str]:
    kind = shape.algorithm
    if config.get("model_type") is None:
        yield "model_type is missing: neither engine can read config.json without it; expected 'qwen3'"
    nested = config.get("dflash_config") or {}
    for name in ("mask_token_id", "target_layer_ids"):
        if nested.get(name) is None:
            yield f"dflash_config.{name} is missing: vLLM looks there first"
        elif config.get(name) is not None and config[name] != nested[name]:
            yield f"{name} {config[name]} != dflash_config.{name} {nested[name]}: engines differ on which they read"
    if kind == "dspark":
        if not config.get("markov_rank"):
            yield "markov_rank is missing at the top level: both engines build the Markov head from there"
        if config.get("sample_from_anchor") is not True:
            yield Doubt("sample_from_anchor is missing; write true, converters take false for granted")
        if not config.get("enable_confidence_head"):
            yield Doubt("no confidence head: SGLang builds one in ragged verification mode and refuses to load")
    elif config.get("markov_rank"):
        yield f"markov_rank {config['markov_rank']} in a dflash draft: SGLang refuses it"
    for name, consequence in FOREIGN_KEYS.items():
        if config.get(name):
            yield f"{name}: {config[name]!r} is the target's, not the draft's: {consequence}"
    for name, consequence in FOREIGN_NESTED_KEYS.items():
        if nested.get(name):
            yield f"dflash_config.{name}: {nested[name]!r}: {consequence}"
    for name, plain in (("partial_rotary_factor", 1), ("is_neox_style", True), ("rope_is_neox_style", True)):
        if config.get(name, plain) != plain:
            yield f"{name}: {config[name]!r}: engines would rotate other parts of the keys than training did"
    types = config.get("layer_types") or ["full_attention"] * shape.num_hidden_layers
    if any(layer != "full_attention" for layer in types) or config.get("use_sliding_window"):
        yield f"layer_types {types}: engines make sliding layers causal; expected full_attention"
    elif len(types) != shape.num_hidden_layers:
        yield f"layer_types has {len(types)} entries for {shape.num_hidden_layers} layers"
    if config.get("tie_word_embeddings"):
        yield "tie_word_embeddings is true; expected false: the head is the target's"
    if config.get("draft_vocab_size") not in (None, shape.vocab_size):
        yield f"draft_vocab_size {config['draft_vocab_size']}: SGLang knows the whole vocabulary only"
    if config.get("eagle_aux_hidden_state_layer_ids") is not None:
        yield "eagle_aux_hidden_state_layer_ids: vLLM prefers it to target_layer_ids and does not add 1"


def _tensor_problems(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    prefixed = sorted(name for name in tensors if name.startswith("model."))
    if prefixed:
        yield f"'model.' before {len(prefixed)} names (such as {prefixed[0]}): vLLM refuses them"
    for name in sorted(wanted.keys() - tensors.keys()):
        if name.startswith("confidence_head."):
            yield f"{name} is missing: vLLM drops the head, SGLang refuses in ragged verification mode"
        elif f"model.{name}" not in tensors:
            yield (
                f"{name} is missing: both engines load the rest without an error and keep random values, so almost"
                " nothing is accepted"
            )
    for name in sorted(tensors.keys() - wanted.keys()):
        if name in ("embed_tokens.weight", "lm_head.weight"):
            yield Doubt(f"{name}: vLLM uses the draft's where it differs from the target's, SGLang never does")
        elif name in ("d2t", "t2d"):
            yield f"{name}: SGLang knows the whole vocabulary only"
        elif not name.startswith("model."):
            hint = suggest(name, wanted).partition("; known")[0]
            yield f"unknown tensor {name}: vLLM refuses, SGLang drops it silently{hint}"
    for name, expected in wanted.items():
        tensor = tensors.get(name)
        if tensor is not None and tuple(tensor.shape) != expected:
            yield f"{name} has shape {list(tensor.shape)}, config.json makes it {list(expected)}"


def check_block_length(num_draft_tokens: int, shape: DraftConfig) -> tuple[str, str] | None:
    """A served draft length other than the trained one: the block then has another number of MASK slots."""
    trained = shape.tokens_per_block
    if num_draft_tokens == trained:
        return None
    return (
        "broken",
        f"{num_draft_tokens} draft tokens, the block was trained with {trained}: fewer MASK slots are another input, so"
        " acceptance falls; vLLM says nothing",
    )
