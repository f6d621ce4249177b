"""What every target engine promises, what it knows about the run and its model, and the checks at its boundary.

Layer ids are 0-based ids of the layer whose OUTPUT is captured, in the whole package; each engine converts:
transformers `hidden_states[i + 1]`, SGLang `i`, vLLM `i + 1` (it names layer inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from specforge_lite.core.errors import CaptureError, ConfigError
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import info as log_info
from specforge_lite.core.sections import TargetSection
from specforge_lite.types import CapturedStates, TokenizedSample

NUM_AUX_LAYERS = 3
# On 8 layers (0, 3, 6) decode more than EAGLE-3's (1, 3, 4): benchmarks/results/aux_layers_cpu.md.
SHALLOW = 12
DEFAULT_WAIT_MINUTES = 20.0
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class TargetInfo:
    """Facts about a running target. `max_length`: tokens of the longest sample it accepts."""

    engine: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_length: int
    aux_layer_ids: tuple[int, ...]


class TargetEngine(Protocol):
    """A frozen target that turns token ids into hidden states."""

    info: TargetInfo
    max_concurrency: int
    """`capture` calls that may run at the same time (1: one thread only)."""

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """Return the states of `samples`, in their order.

        Raises CaptureError for a reply that is not theirs, EngineError when the engine is gone for good.
        """

    def close(self) -> None:
        """Stop what this object launched and delete what it left on disk; may be called twice."""


def read_target_info(target: TargetSection, engine: str, max_length: int | None = None) -> TargetInfo:
    """Facts about the target from its config.json; at most `max_length` tokens, for a server need not reserve more."""
    config = load_config(target.target_model_path, target.trust_remote_code)
    return target_info(config, engine, target.aux_layer_ids, max_length)


def target_info(
    config: Any, engine: str, aux_layer_ids: Sequence[int] | None = None, max_length: int | None = None
) -> TargetInfo:
    """The same from a transformers config. aux_layer_ids: None for the default of the depth.

    Raises ConfigError for aux layers that the target does not have.
    """
    text = config.get_text_config()
    return TargetInfo(
        engine=engine,
        num_layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        max_length=min(max_length or NO_LIMIT, num_positions(text) or NO_LIMIT),
        aux_layer_ids=choose_aux_layer_ids(aux_layer_ids, int(text.num_hidden_layers)),
    )


def num_positions(target_config: Any) -> int | None:
    """Positions a target was made for: max_position_embeddings, stretched by rope scaling; None without a limit."""
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


def choose_aux_layer_ids(aux_layer_ids: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The ids asked for, checked, or the default of the depth; a fallback on a shallow target is logged."""
    if aux_layer_ids is not None:
        return check_aux_layer_ids(aux_layer_ids, num_layers)
    ids, note = default_aux_layer_ids(num_layers)
    if note:
        log_info(note)
    return ids


def default_aux_layer_ids(num_layers: int) -> tuple[tuple[int, ...], str | None]:
    """Return (aux layer ids, note): EAGLE-3's choice; below SHALLOW layers, where N-4 is not near the top, three layers
    spread over the depth, never the last one (no engine captures it as an aux layer). Fewer than 4 layers repeat
    nothing: they give what there is. The note says where EAGLE-3's choice collapses.

    >>> default_aux_layer_ids(32)
    ((1, 15, 28), None)
    >>> default_aux_layer_ids(8)
    ((0, 3, 6), None)
    """
    eagle = eagle_aux_layer_ids(num_layers)
    if num_layers >= SHALLOW:
        return eagle, None
    usable = num_layers - 1  # outputs of layers 0 .. N-2
    if usable < 1:
        raise ConfigError(f"a target of {num_layers} layer has no aux layer besides its last hidden state")
    count = min(NUM_AUX_LAYERS, usable)
    spread = tuple(round(i * (usable - 1) / max(count - 1, 1)) for i in range(count))
    if eagle[0] < eagle[1] < eagle[2]:
        return spread, None
    return spread, f"default aux layers {eagle} collapse on {num_layers} layers; using {spread}"


def eagle_aux_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's choice, the outputs of layers 1, N//2-1, N-4: what SGLang and vLLM take for a draft that names none."""
    return 1, num_layers // 2 - 1, num_layers - 4


def check_aux_layer_ids(aux_layer_ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the ids as a tuple if they are distinct, ascending and below the last layer; raise ConfigError if not."""
    ids = tuple(aux_layer_ids)
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > num_layers - 2:
        raise ConfigError(
            f"aux_layer_ids {list(ids)}: expected distinct ascending ids of layer outputs in 0..{num_layers - 2}"
            f" ({num_layers} layers; the last one is captured as the last hidden state)"
        )
    return ids


def check_sample(sample: TokenizedSample, info: TargetInfo) -> None:
    """Raise CaptureError for a sample the target cannot run; an id out of range would end a server, or a process that
    uses CUDA."""
    name, length = sample.sample_id, len(sample)
    if not 1 <= length <= info.max_length:
        raise CaptureError(
            f"{info.engine}: sample {name} has {length} tokens, the target accepts 1 to {info.max_length}"
        )
    low, high = int(sample.input_ids_L.min()), int(sample.input_ids_L.max())
    if low < 0 or high >= info.vocab_size:
        raise CaptureError(
            f"{info.engine}: sample {name}: token ids {low}..{high}, the vocabulary is 0..{info.vocab_size - 1};"
            " was the data tokenized for another model?"
        )


def check_capture(sample: TokenizedSample, states: CapturedStates, info: TargetInfo) -> None:
    """Raise CaptureError, with the arithmetic, unless `states` are complete and belong to `sample`."""
    place, length = f"{info.engine}: sample {sample.sample_id}", len(sample)
    if states.sample_id != sample.sample_id:
        raise CaptureError(f"{info.engine}: asked for sample {sample.sample_id}, got {states.sample_id}")
    found_L, sent_L = states.input_ids_L.cpu(), sample.input_ids_L.cpu()
    if found_L.shape != sent_L.shape:
        raise CaptureError(f"{place}: sent {length} token ids, {len(found_L)} came back")
    if not torch.equal(found_L, sent_L):
        at = int((found_L != sent_L).nonzero()[0])
        raise CaptureError(f"{place}: token {at} is {int(found_L[at])} in the reply, {int(sent_L[at])} was sent")
    if tuple(states.aux_layer_ids) != info.aux_layer_ids:
        raise CaptureError(f"{place}: aux layers {list(states.aux_layer_ids)}, expected {list(info.aux_layer_ids)}")
    for name, tensor, letters, expected in (
        ("aux", states.aux_LAH, "tokens, aux layers, hidden", (length, len(info.aux_layer_ids), info.hidden_size)),
        ("last hidden", states.last_LH, "tokens, hidden", (length, info.hidden_size)),
    ):
        if tuple(tensor.shape) != expected:
            raise CaptureError(f"{place}: {name} shape {tuple(tensor.shape)} != ({letters}) = {expected}")
