"""Will SGLang and vLLM serve this draft directory as it was trained?

Both engines load many wrong directories without an error, and greedy output stays right with any draft, so a low
acceptance length is all a user would see. Every check below names what an engine does with the fault; they were read
off, and the silent ones tried on, SGLang 0.5.23 and vLLM 0.32.0; of block drafts read off SGLang's `models/dspark.py`,
`models/dflash.py`, `speculative/dspark_components/dspark_config.py`, `speculative/dflash_utils.py` and vLLM's
`model_executor/models/qwen3_dspark.py`, `qwen3_dflash.py`, `v1/worker/gpu/spec_decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.capture.base import eagle_aux_layer_ids
from specforge_lite.checkpoints.draft_files import (
    DraftFiles,
    algorithm_of,
    canonical_name,
    draft_config_of,
    expected_shapes,
)
from specforge_lite.checkpoints.loading import find_draft, read_draft_files
from specforge_lite.checkpoints.training_run import TRAINING_CONFIG
from specforge_lite.core.errors import CheckpointError, ConfigError, suggest
from specforge_lite.core.weight_files import safetensors_files
from specforge_lite.model.config_json import BLOCK_ARCHITECTURES, BLOCK_KINDS
from specforge_lite.model.draft import ARCHITECTURES, AUX_IDS_KEY, DraftConfig
from specforge_lite.model.target_head import family_scales

# What an engine does without a tensor.
LOADED_SILENTLY = "both engines load the rest without an error and keep what was there, so almost nothing is accepted"
MISSING = {
    "fc.bias": "SGLang's EAGLE-1 fc has a bias and would keep random values; write zeros",
    "lm_head.weight": "both engines keep a random head without an error, and draft noise",
    "embed_tokens.weight": "the draft's width is not the target's, so it cannot share the target's table",
    **dict.fromkeys(
        ("confidence_head.proj.weight", "confidence_head.proj.bias"),
        "vLLM drops the head, SGLang refuses in ragged verification mode",
    ),
}
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


@dataclass(frozen=True)
class Finding:
    """Result of one check. level: `ok`, `skipped` (not checked), `warning` (may be meant) or `broken` (refused by an
    engine, or served wrong)."""

    check: str
    level: str
    message: str

    @property
    def is_broken(self) -> bool:
        return self.level == "broken"


class Doubt(str):
    """What may be meant; every other problem that a check yields is refused by an engine, or served wrong."""


@dataclass(frozen=True)
class Subject:
    """What the checks look at. `target` is the transformers config of the target, `trained_aux_layer_ids` the layer
    outputs that the draft was trained on, where these are known."""

    files: DraftFiles
    algorithm: str
    shape: DraftConfig | None
    wanted: dict[str, tuple[int, ...]]
    tensors: dict[str, Tensor]
    target: Any
    trained_aux_layer_ids: tuple[int, ...] | None
    num_draft_tokens: int | None = None

    @property
    def is_block(self) -> bool:
        """A DFlash or DSpark draft."""
        return self.algorithm in BLOCK_KINDS


def check_draft(
    directory: str | Path,
    target: Any = None,
    trained_aux_layer_ids: tuple[int, ...] | None = None,
    num_draft_tokens: int | None = None,
) -> list[Finding]:
    """Run all checks on a draft directory; at least one finding per check, `ok` where nothing was found.

    target: transformers config of the target model. trained_aux_layer_ids: layer OUTPUTS the draft was trained on;
    default: the `aux_layer_ids` that our export records in config.json. num_draft_tokens: what a block draft will be
    served with.
    """
    try:
        folder = find_draft(directory)
        if (folder / TRAINING_CONFIG).exists():
            export = f"scripts/export_draft.py --checkpoint {folder} --output-dir DRAFT"
            return [Finding("files", "broken", f"{folder}: a training checkpoint, which engines do not read: {export}")]
        files = read_draft_files(folder)
    except (CheckpointError, ConfigError) as error:
        return [Finding("files", "broken", str(error))]
    algorithm = algorithm_of(files.config, list(files.tensors))
    recorded = trained_aux_layer_ids or tuple(files.config.get("aux_layer_ids") or ()) or None
    shape, wanted, problem = None, {}, None
    try:
        shape = draft_config_of(files)
        wanted = expected_shapes(shape)
    except (ConfigError, CheckpointError) as error:
        shape, problem = None, str(error)
    tensors = {canonical_name(name, algorithm): tensor for name, tensor in files.tensors.items()}
    text_config = target.get_text_config() if hasattr(target, "get_text_config") else target
    subject = Subject(files, algorithm, shape, wanted, tensors, text_config, recorded, num_draft_tokens)
    findings = [Finding("files", "ok", f"config.json, {files.weight_file}")]
    if unused := ", ".join(file.name for file in unused_weight_files(folder)):
        findings = [Finding("files", "broken", f"{unused} beside {files.weight_file}: engines read both; delete it")]
    findings.append(Finding("shape of the draft", "broken" if problem else "ok", problem or _describe(shape)))
    for name, check in CHECKS.items():
        problems = list(check(subject))
        findings += [Finding(name, "warning" if isinstance(text, Doubt) else "broken", text) for text in problems]
        if not problems:
            findings.append(Finding(name, "ok", ""))
    return findings


def check_architecture(subject: Subject) -> Iterator[str]:
    listed = subject.files.config.get("architectures") or []
    if subject.files.is_speculators:
        yield Doubt("speculators format: vLLM converts it, SGLang does not read it")
        return
    if not listed:
        yield f"architectures is missing; expected ['{ARCHITECTURES[subject.algorithm]}']"
    elif listed[0] not in (known := {*ARCHITECTURES.values(), *BLOCK_ARCHITECTURES}):
        hint = suggest(listed[0], known)
        yield f"architectures {listed}: SGLang knows no such draft{hint}"
    if subject.files.config.get("model_type") is None:
        expected = "qwen3" if subject.is_block else "llama"
        yield f"model_type is missing: neither engine can read config.json without it; expected '{expected}'"


def check_names(subject: Subject) -> Iterator[str]:
    if subject.shape is None:
        return
    prefixed = sorted(name for name in subject.files.tensors if name.startswith("model."))
    if prefixed:
        yield f"'model.' before {len(prefixed)} names (such as {prefixed[0]}): vLLM refuses, SGLang drops them"
    stripped = {name.removeprefix("model.") for name in subject.tensors}
    shared = {"embed_tokens.weight", "lm_head.weight"} if subject.is_block else {"embed_tokens.weight"}
    known = subject.wanted.keys() | {"d2t", "t2d"} | shared | _variant_names(subject)
    unknown = sorted(name for name in stripped - known if subject.is_block or name != "fc.bias")
    if unknown:
        hint = suggest(unknown[0], known).partition("; known")[0]
        shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        yield f"unknown tensors {shown}: vLLM refuses, SGLang drops them silently{hint}"
    for name in sorted(subject.wanted.keys() - stripped):
        yield f"{name} is missing: {MISSING.get(name, LOADED_SILENTLY)}"
    for name in sorted(shared & stripped) if subject.is_block else ():
        yield Doubt(f"{name}: vLLM uses the draft's where it differs from the target's, SGLang never does")


def _variant_names(subject: Subject) -> set[str]:
    config = subject.files.config
    eagle = config.get("eagle_config") or {}
    names = {"input_norm.weight"} if eagle.get("norm_before_fc", config.get("norm_before_fc")) else set()
    if subject.files.is_speculators:
        names |= {"midlayer.self_attn.q_norm.weight", "midlayer.self_attn.k_norm.weight"}
    return names


def check_shapes(subject: Subject) -> Iterator[str]:
    for name, wanted in subject.wanted.items():
        tensor = subject.tensors.get(name)
        if tensor is not None and tuple(tensor.shape) != wanted:
            yield f"{name} has shape {list(tensor.shape)}, config.json makes it {list(wanted)}"


def check_values(subject: Subject) -> Iterator[str]:
    floats = {name: tensor for name, tensor in subject.tensors.items() if tensor.is_floating_point()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in floats.values()}
    if len(dtypes) > 1:
        yield Doubt(f"weights are stored in several dtypes: {', '.join(sorted(dtypes))}")
    for name, tensor in floats.items():
        if not torch.isfinite(tensor).all():
            yield f"{name} holds NaN or infinity"
        elif name.endswith("weight") and not tensor.any():
            yield f"{name} is all zeros"


def check_fc_bias(subject: Subject) -> Iterator[str]:
    bias = subject.tensors.get("fc.bias")
    if bias is None or subject.is_block:
        return
    if subject.algorithm == "eagle3":
        yield "fc.bias: an EAGLE-3 fc has none; SGLang drops it silently, vLLM refuses"
    elif bias.any():
        yield "fc.bias is not zero: vLLM's EAGLE-1 fc has no bias and skips it silently; train fc without one"


def check_vocabulary_map(subject: Subject) -> Iterator[str]:
    config, shape = subject.files.config, subject.shape
    d2t, t2d = subject.tensors.get("d2t"), subject.tensors.get("t2d")
    if shape is None or subject.algorithm == "eagle1":
        return
    if subject.is_block:
        given = config.get("draft_vocab_size")
        found = {"d2t": d2t is not None, "t2d": t2d is not None}
        found[f"draft_vocab_size {given}"] = given not in (None, shape.vocab_size)
        for name in (name for name, is_wrong in found.items() if is_wrong):
            yield f"{name}: SGLang knows the whole vocabulary only"
        return
    full = shape.draft_vocab_size == shape.vocab_size
    if config.get("draft_vocab_size") is None:
        yield "draft_vocab_size is missing: SGLang takes the target's head instead of lm_head"
    if d2t is None:
        if not full:
            yield (
                f"d2t is missing, draft_vocab_size {shape.draft_vocab_size} != vocab_size {shape.vocab_size}:"
                " both engines take draft ids for target ids, without an error"
            )
        return
    if full:
        yield "d2t beside a full draft vocabulary: vLLM refuses it; leave d2t and t2d out"
    yield from _check_map(d2t, t2d, shape)


def _check_map(d2t: Tensor, t2d: Tensor | None, shape: DraftConfig) -> Iterator[str]:
    if d2t.is_floating_point() or d2t.dim() != 1 or len(d2t) != shape.draft_vocab_size:
        yield f"d2t is {d2t.dtype} of shape {list(d2t.shape)}; expected int64 of shape [{shape.draft_vocab_size}]"
        return
    ids = torch.arange(len(d2t)) + d2t
    listed = None if t2d is None or t2d.dim() != 1 else t2d.nonzero().squeeze(1)
    if _looks_absolute(d2t, listed, shape.vocab_size):
        yield "d2t holds absolute target ids; expected offsets (target id - draft id)"
    elif int(ids.min()) < 0 or int(ids.max()) >= shape.vocab_size:
        yield f"d2t names target ids {int(ids.min())}..{int(ids.max())}; vocab_size is {shape.vocab_size}"
    elif len(ids.unique()) != len(ids):
        yield f"d2t names {len(ids) - len(ids.unique())} target ids twice"
    elif t2d is not None and (
        len(t2d) != shape.vocab_size or listed is None or not torch.equal(listed, ids.sort().values)
    ):
        yield f"t2d marks {int(t2d.sum())} of {len(t2d)} ids, which are not those that d2t names"


def _looks_absolute(d2t: Tensor, listed: Tensor | None, vocab_size: int) -> bool:
    """Offsets of sorted ids repeat wherever two ids are neighbours; absolute ids never repeat."""
    if listed is not None and len(listed) == len(d2t):
        as_ids = torch.equal(d2t.sort().values, listed)
        as_offsets = torch.equal((torch.arange(len(d2t)) + d2t).sort().values, listed)
        return as_ids and not as_offsets
    return len(d2t) > 2 and bool((d2t.diff() > 0).all()) and int(d2t.max()) < vocab_size


def check_rope(subject: Subject) -> Iterator[str]:
    config = subject.files.config
    top, nested = config.get("rope_theta"), (config.get("rope_parameters") or {}).get("rope_theta")
    if top is None and not subject.files.is_speculators:
        value = f"{nested:g}" if nested else "its value"
        yield f"rope_theta is missing at the top level: older servers take 10000; write {value} there too"
    if top is not None and nested is not None and float(top) != float(nested):
        yield f"rope_theta {top:g} != rope_parameters.rope_theta {nested:g}: servers differ on which they read"


def check_ties(subject: Subject) -> Iterator[str]:
    tied = subject.files.config.get("tie_word_embeddings")
    if tied:
        head = "the head is the target's" if subject.is_block else "SGLang would use the embedding table as the draft's"
        yield f"tie_word_embeddings is true; expected false: {head}"
    elif tied is None and not subject.is_block:
        yield Doubt("tie_word_embeddings is missing; write false, older servers take true for granted")


def check_aux_layers(subject: Subject) -> Iterator[str]:
    """Compare the two keys with what the draft was trained on, with each other, and with fc and the target's depth."""
    if subject.algorithm == "eagle1" or subject.shape is None:
        return
    config = subject.files.config
    if subject.is_block:
        yield from _check_block_layers(subject, list(subject.shape.aux_layer_ids or ()))
        return
    sglang = (config.get("eagle_config") or {}).get(AUX_IDS_KEY)
    vllm = config.get(AUX_IDS_KEY) or sglang
    as_outputs = {"SGLang": sglang, "vLLM": None if vllm is None else [i - 1 for i in vllm]}
    trained = subject.trained_aux_layer_ids
    num_layers = None if subject.target is None else int(subject.target.num_hidden_layers)
    default = eagle_aux_layer_ids(num_layers) if num_layers else None
    for engine, outputs in as_outputs.items():
        taken = tuple(outputs) if outputs else default
        if outputs is None and taken is None:
            yield Doubt(f"{engine} finds no aux layer ids and takes its default; give --target-model-path to compare")
        elif trained is not None and taken is not None and taken != trained:
            yield (
                f"{engine} would capture the outputs of layers {list(taken)}, the draft was trained on {list(trained)}:"
                " it loads without an error and almost nothing is accepted"
            )
        elif outputs and num_layers and not 0 <= min(outputs) <= max(outputs) <= num_layers - 2:
            yield f"{engine} would capture layers {outputs}; the target has outputs 0..{num_layers - 2}"
        if outputs and list(outputs) != sorted(set(outputs)):
            yield f"aux layer ids {outputs} ({engine}): expected distinct ascending ids"
        if outputs and len(outputs) != subject.shape.num_aux_layers:
            yield f"{len(outputs)} aux layers ({engine}), but fc reads {subject.shape.num_aux_layers}"
    if sglang and not config.get(AUX_IDS_KEY) and trained is None:
        yield Doubt(
            f"eagle_config has {sglang}, which SGLang reads as layer outputs and vLLM as layer inputs: one of them is"
            f" off by one; add '{AUX_IDS_KEY}' at the top level for vLLM"
        )


def _check_block_layers(subject: Subject, ids: list[int]) -> Iterator[str]:
    trained, target = subject.trained_aux_layer_ids, subject.target
    if trained is not None and ids != list(trained):
        yield f"target_layer_ids {ids}: it was trained on {list(trained)}"
    if ids != sorted(set(ids)):
        yield f"target_layer_ids {ids}: engines hand the states over by ascending layer"
    if target is not None and ids and max(ids) > int(target.num_hidden_layers) - 2:
        yield f"target_layer_ids {ids}; the target has outputs 0..{int(target.num_hidden_layers) - 2}"


def check_sizes(subject: Subject) -> Iterator[str]:
    config, shape = subject.files.config, subject.shape
    if shape is None:
        return
    if "target_hidden_size" in config and not config["target_hidden_size"]:
        yield "target_hidden_size is null: vLLM multiplies it; leave it out or write the target's width"
    if shape.target_hidden_size != shape.hidden_size and not config.get("target_hidden_size"):
        yield f"target_hidden_size is missing: fc reads {shape.target_hidden_size}-wide states"


def check_target(subject: Subject) -> Iterator[str]:
    """Only with --target-model-path."""
    target, shape = subject.target, subject.shape
    if target is None or shape is None:
        return
    width = "hidden_size" if subject.is_block else "target_hidden_size"
    for name, found, wanted in (
        (width, shape.target_hidden_size, target.hidden_size),
        ("vocab_size", shape.vocab_size, target.vocab_size),
    ):
        if found != wanted:
            yield f"{name} {found} != the target's {wanted}"
    limit, found = getattr(target, "max_position_embeddings", None), shape.max_position_embeddings
    if limit and subject.is_block and found != limit:
        yield (
            f"max_position_embeddings {found} != the target's {limit}: engines size the draft's RoPE table by it and do"
            " not widen it"
        )
    elif limit and found < limit:
        yield Doubt(
            f"max_position_embeddings {found} is below the target's {limit}: engines size the draft's RoPE table by it,"
            " so limit the context length to it or raise it"
        )
    _, scale, cap = family_scales(target)
    if subject.is_block and (scale != 1 or cap):
        what = f"scaled by {scale:g}" if scale != 1 else f"capped at {cap:g}"
        yield Doubt(f"the target's logits are {what}, and so the draft was trained; engines leave the draft's raw")


def check_block(subject: Subject) -> Iterator[str]:
    """DFlash and DSpark: their own keys, and what they are served with."""
    config, shape, served = subject.files.config, subject.shape, subject.num_draft_tokens
    if shape is None or not subject.is_block:
        return
    if (subject.files.directory / "mask_embedding.pt").exists():
        yield "mask_embedding.pt: vLLM takes it for the target's row of a dflash draft, SGLang does not"
    if served not in (None, shape.tokens_per_block):  # the block then has another number of MASK slots
        yield (
            f"{served} draft tokens, the block was trained with {shape.tokens_per_block}: fewer MASK slots are another"
            " input, so acceptance falls; vLLM says nothing"
        )
    nested = config.get("dflash_config") or {}
    for name in ("mask_token_id", "target_layer_ids"):
        if nested.get(name) is None:
            yield f"dflash_config.{name} is missing: vLLM looks there first"
        elif config.get(name) is not None and config[name] != nested[name]:
            yield f"{name} {config[name]} != dflash_config.{name} {nested[name]}: engines differ on which they read"
    if subject.algorithm == "dspark":
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
    if config.get("eagle_aux_hidden_state_layer_ids") is not None:
        yield "eagle_aux_hidden_state_layer_ids: vLLM prefers it to target_layer_ids and does not add 1"


CHECKS: dict[str, Callable[[Subject], Iterator[str]]] = {
    "architecture": check_architecture,
    "tensor names": check_names,
    "tensor shapes": check_shapes,
    "tensor values": check_values,
    "fc.bias": check_fc_bias,
    "vocabulary map": check_vocabulary_map,
    "rope_theta": check_rope,
    "tied embeddings": check_ties,
    "aux layers": check_aux_layers,
    "sizes": check_sizes,
    "target": check_target,
    "block": check_block,
}


def _describe(shape: DraftConfig | None) -> str:
    assert shape is not None
    return (
        f"{shape.algorithm}, {shape.hidden_size} wide, {shape.num_attention_heads}/{shape.num_key_value_heads} heads,"
        f" vocabulary {shape.draft_vocab_size} of {shape.vocab_size}"
    )


def unused_weight_files(directory: Path) -> list[Path]:
    """Other safetensors files of the directory, which engines may read all the same."""
    used = set(safetensors_files(directory))
    return [file for file in sorted(directory.glob("*.safetensors")) if file not in used]
