"""`--init PATH`: a run that starts from a draft somebody has trained, for this target or for the one it was made from.

Imported where PATH is given only.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import info
from specforge_lite.model.draft import Draft
from specforge_lite.training.settings import TrainConfig

# What EAGLE-3.1 adds to EAGLE-3 starts as a norm of weight one.
ADDED_NORMS = "fc_norm."
# (kind of the draft, --init-kind) -> settings of the draft section.
CONVERSIONS = {("eagle3", "eagle3.1"): {"norm_output": True, "fc_norm": True}}


def with_source_layers(config: TrainConfig) -> TrainConfig:
    """The aux layers of the draft to start from, where none were given, and what `--init-kind` makes of it. Raises
    ConfigError or CheckpointError for a draft that cannot be read or is of another kind."""
    source = source_of(config)
    changes = _conversion(config, source)
    if no := [name for name in changes if getattr(config.draft, name) is False]:
        raise ConfigError(f"init_kind {config.draft.init_kind}: needs {', '.join(no)}, given as False; leave it out")
    config, ids = config.with_values(draft=changes), source.config.aux_layer_ids
    if ids is None or config.target.aux_layer_ids is not None or config.training.offline_dir is not None:
        return config
    return config.with_values(target={"aux_layer_ids": ids})


def _conversion(config: TrainConfig, source: Draft) -> dict[str, bool]:
    """Settings of the draft that `--init-kind` stands for. Raises ConfigError for what a draft cannot become."""
    is_31 = source.config.norm_output and source.config.fc_norm
    found, wanted = "eagle3.1" if is_31 else source.config.algorithm, config.draft.init_kind
    if wanted is None or wanted == found:
        return {}
    if (found, wanted) not in CONVERSIONS:
        known = ", ".join(" -> ".join(pair) for pair in CONVERSIONS)
        raise ConfigError(
            f"init_kind {wanted}: {config.draft.init} is a draft of kind {found}, whose weights fit no other;"
            f" what can be converted: {known}"
        )
    return CONVERSIONS[found, wanted]


def source_of(config: TrainConfig) -> Draft:
    """The draft to start from, on the CPU."""
    target, place = config.target, config.draft.init
    if not Path(place).exists() and "/" not in place:
        if config.draft.init_kind is not None:
            raise ConfigError(f"init_kind {config.draft.init_kind}: needs --init PATH, found init {place}")
        raise ConfigError(f"init {place}: no such draft; expected target, random or a path or hub name")
    source = _load(place, target.target_model_path, target.trust_remote_code)
    _conversion(config, source)
    if source.config.algorithm != config.algorithm:
        raise ConfigError(
            f"init {place}: a draft of kind {source.config.algorithm}, this run trains {config.algorithm};"
            f" give --draft-kind {source.config.algorithm}"
        )
    if type(source).__name__ == "SpeculatorsEagle3":
        raise ConfigError(
            f"init {config.draft.init}: speculators' own layer (norm_before_residual, q_norm) is not trained"
        )
    return source


@functools.lru_cache(1)
def _load(path: str, model_path: str, trust_remote_code: bool) -> Draft:
    return load_draft(path, load_config(model_path, trust_remote_code))


@torch.no_grad()
def copy_source(draft: Draft, source: Draft, place: str, partial: bool) -> None:
    """Copy the parameters of `source`, and report what was not.

    The rows of `lm_head` go by the target's token: a token that the source's vocabulary lacks keeps the row it has.
    Raises ConfigError, unless `partial`, where the aux layers or a shape differ; with `partial` those tensors keep what
    they have.
    """
    ours, theirs = draft.config, source.config
    differ = ours.aux_layer_ids != theirs.aux_layer_ids
    if differ and not partial:
        raise ConfigError(
            f"init {place}: reads layers {list(theirs.aux_layer_ids or ())}, this run captures"
            f" {list(ours.aux_layer_ids or ())}; leave --aux-layer-ids out, or give --init-partial to start fc anew"
        )
    stored, left, new_rows = dict(source.named_parameters()), [], 0
    for name, parameter in draft.named_parameters():
        if name == "lm_head.weight" and name in stored and stored[name].shape[1] == parameter.shape[1]:
            row_of = torch.full((max(ours.vocab_size, theirs.vocab_size),), -1)
            row_of[source.target_ids] = torch.arange(len(source.target_ids))
            rows = row_of[draft.target_ids]
            parameter[rows >= 0] = stored[name][rows[rows >= 0]].to(parameter.dtype)
            new_rows = int((rows < 0).sum())
        elif name in stored and stored[name].shape == parameter.shape and not (differ and name.startswith("fc")):
            parameter.copy_(stored[name])
        else:
            left.append(name)
    unused = sorted(name for name in stored.keys() - dict(draft.named_parameters()).keys() if stored[name].any())
    wrong = [name for name in left if not name.startswith(ADDED_NORMS)] + unused
    if wrong and not partial:
        shapes = [tuple(stored[name].shape) if name in stored else "none" for name in wrong[:3]]
        found = ", ".join(f"{name} {shape}" for name, shape in zip(wrong, shapes, strict=False))
        raise ConfigError(f"init {place}: {found} does not fit this run's draft; --init-partial starts such parts anew")
    kept = f"; started anew: {', '.join(left)}" if left else ""
    kept += f"; without a place: {', '.join(unused)}" if unused else ""
    rows_text = f"; {new_rows} tokens that it does not have keep the target's rows" if new_rows else ""
    info(f"warm start from {place}{rows_text}{kept}")
