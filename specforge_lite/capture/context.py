"""What an engine knows about the run and about its model before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_lite.capture.base import TargetInfo, check_aux_layer_ids, default_aux_layer_ids
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import info
from specforge_lite.core.sections import TargetSection

DEFAULT_WAIT_MINUTES = 20.0


@dataclass(frozen=True)
class EngineContext:
    """What an engine needs to know about the run besides its config section.

    max_length: tokens of the longest sample. log_dir: where server logs go (None: a temporary directory).
    wait_minutes: how long a server that is gone is waited for (`--dist-timeout`). device: for in-process engines.
    """

    max_length: int
    log_dir: Path | None = None
    wait_minutes: float = DEFAULT_WAIT_MINUTES
    device: str | None = None


def read_target_info(target: TargetSection, engine: str, max_length: int | None = None) -> TargetInfo:
    """Facts about the target from its config.json; `max_length` defaults to its position limit."""
    config = load_config(target.target_model_path, target.trust_remote_code)
    text = config.get_text_config()
    num_layers = int(text.num_hidden_layers)
    if target.aux_layer_ids is None:
        aux_layer_ids, note = default_aux_layer_ids(num_layers)
        if note:
            info(note)
    else:
        aux_layer_ids = check_aux_layer_ids(target.aux_layer_ids, num_layers)
    return TargetInfo(
        engine=engine,
        num_layers=num_layers,
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        max_length=int(max_length or num_positions(text) or 1 << 30),
        aux_layer_ids=aux_layer_ids,
    )


def num_positions(target_config: Any) -> int | None:
    """Positions a target was made for: max_position_embeddings, stretched by rope scaling; None if it does not say."""
    text = target_config.get_text_config() if hasattr(target_config, "get_text_config") else target_config
    trained = getattr(text, "max_position_embeddings", None)
    if not trained:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    rope = rope.get("full_attention") or rope
    if (rope.get("rope_type") or rope.get("type")) not in ("linear", "dynamic", "yarn"):
        return int(trained)  # llama3 and longrope count their scaling in already
    original = rope.get("original_max_position_embeddings") or trained
    return max(int(trained), int(original * float(rope.get("factor") or 1.0)))
