"""The config.json of a draft, as SpecForge, EAGLE, SGLang, vLLM and we write it, in the fields of DraftConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import read_json
from specforge_lite.model.draft import ARCHITECTURES, AUX_IDS_KEY, DraftConfig

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
    for name in ("eagle_config", AUX_IDS_KEY):
        result.pop(name, None)
    return result


def config_from_values(values: dict[str, Any], source: str = "draft config") -> DraftConfig:
    """Read a config.json as SpecForge, EAGLE, SGLang and vLLM write them; keys with no meaning here are ignored.

    Layer ids: see `aux_layer_ids_of`. Raises ConfigError naming the key.
    """
    check_kinds(values, source)
    values = with_block_fields(values, source)
    architecture = (values.get("architectures") or [""])[0]
    by_name = {name: algorithm for algorithm, name in ARCHITECTURES.items()}
    if "algorithm" not in values and architecture in by_name:
        values["algorithm"] = by_name[architecture]
    values["rope_theta"], values["rope_scaling"] = _rope_of(values)
    values["aux_layer_ids"] = aux_layer_ids_of(values, source)
    values["draft_vocab_size"] = values.get("draft_vocab_size") or values.get("vocab_size")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    fields = {f.name: f for f in dataclasses.fields(DraftConfig)}
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING and values.get(n) is None]
    if required:
        raise ConfigError(f"{source}: {', '.join(required)}: required, not found")
    picked = {n: v for n, v in values.items() if n in fields and (v is not None or fields[n].default is None)}
    for name, value in picked.items():
        wanted = str(fields[name].type).removesuffix(" | None")
        if wanted in ("int", "float") and value is not None and not _is_number(value, wanted):
            raise ConfigError(f"{source}: {name}: expected {wanted}, found {value!r}")
    try:
        return DraftConfig(**picked)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def config_from_file(path: str | Path) -> DraftConfig:
    """Read a draft's config.json (a file, or a directory that holds one)."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    return config_from_values(read_json(file, ConfigError), str(file))


# Keys of a config.json whose content is looked into.
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "rope_parameters": (dict, "an object"),
    "rope_scaling": (dict, "an object"),
    "eagle_config": (dict, "an object"),
    "architectures": ((list, tuple), "a list"),
    "aux_layer_ids": ((list, tuple), "a list of layers"),
    "hidden_act": (str, "a name"),
    "algorithm": (str, "a name"),
}


def check_kinds(values: dict[str, Any], source: str) -> None:
    """Raise ConfigError for a key of a config.json whose content is looked into and is not of the right kind."""
    for name, (kind, wanted) in KINDS.items():
        if values.get(name) is not None and not isinstance(values[name], kind):
            raise ConfigError(f"{source}: {name}: expected {wanted}, found {values[name]!r}")
    for name, ids, shift in _listed_aux_ids(values):
        for i in ids if isinstance(ids, (list, tuple)) else [ids]:
            if not _is_number(i, "int") or i < shift:
                raise ConfigError(f"{source}: {name}: aux layer ids: expected numbers from {shift}, found {i!r}")
    for name in values.get("architectures") or ():
        if not isinstance(name, str):
            raise ConfigError(f"{source}: architectures: expected names, found {name!r}")


def aux_layer_ids_of(values: dict[str, Any], source: str) -> tuple[int, ...] | None:
    """Layers whose OUTPUT feeds the draft, from whichever key of a config.json lists them; None where none does.

    Our own key decides. Raises ConfigError where, without it, the keys of the two engines mean different layers.
    """
    found = [(name, tuple(i - shift for i in ids)) for name, ids, shift in _listed_aux_ids(values)]
    if not found:
        return None
    differ = len(found) > 1 and found[0][0] != "aux_layer_ids" and found[0][1] != found[1][1]
    if differ and len(found[0][1]) == len(found[1][1]):  # another number of layers does not fit fc, and is named there
        raise ConfigError(
            f"{source}: aux layers: {found[0][0]} means the outputs of layers {list(found[0][1])},"
            f" {found[1][0]} those of {list(found[1][1])}; correct one, or add 'aux_layer_ids' (layer outputs)"
        )
    return found[0][1]


def _listed_aux_ids(values: dict[str, Any]) -> list[tuple[str, Any, int]]:
    """(key, its list, what to subtract for layer OUTPUTS) of every key that lists aux layers.

    aux_layer_ids                                    outputs     this package
    eagle_aux_hidden_state_layer_ids                 inputs      vLLM 0.32 (gpu_model_runner.py,
                                                                 `_get_eagle3_aux_layers_from_config`)
    eagle_config.eagle_aux_hidden_state_layer_ids    outputs     SGLang 0.5.23 (models/llama.py,
                                                                 `set_eagle3_layers_to_capture` adds 1)
    """
    nested = (values.get("eagle_config") or {}).get(AUX_IDS_KEY)
    listed = [("aux_layer_ids", values.get("aux_layer_ids"), 0), (AUX_IDS_KEY, values.get(AUX_IDS_KEY), 1)]
    listed.append((f"eagle_config.{AUX_IDS_KEY}", nested, 0))
    return [(name, ids, shift) for name, ids, shift in listed if ids]


def _rope_of(values: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """(theta, scaling or None) from `rope_theta`, `rope_parameters` and `rope_scaling`: what is null or plain in one
    place may be given in another. The top level wins over `rope_parameters`, that over `rope_scaling`."""
    places = [values.get("rope_parameters") or {}, values.get("rope_scaling") or {}]
    thetas = [theta for place in (values, *places) if (theta := place.get("rope_theta")) is not None]
    for place in places:
        kind = place.get("rope_type") or place.get("type") or "default"
        if kind != "default":
            scaling = {key: value for key, value in place.items() if key != "rope_theta"}
            return thetas[0] if thetas else 10000.0, {**scaling, "rope_type": kind}
    return thetas[0] if thetas else 10000.0, None


def _is_number(value: Any, wanted: str) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (wanted == "float" and isinstance(value, float))


def check_target_shape(config: DraftConfig, reason: str) -> None:
    """Raise ConfigError unless the draft has the width and the vocabulary of its target."""
    for name, other, so in (
        ("hidden_size", "target_hidden_size", "it is as wide as the target"),
        ("draft_vocab_size", "vocab_size", "it has the whole vocabulary"),
    ):
        if getattr(config, name) != getattr(config, other):
            found = f"{name} {getattr(config, name)} != {other} {getattr(config, other)}"
            raise ConfigError(f"{found}: {reason}, so {so}")
