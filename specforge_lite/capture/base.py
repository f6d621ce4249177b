"""What every target engine promises, and the check at its boundary.

Layer ids are 0-based ids of the layer whose OUTPUT is captured, in the whole package; each engine converts:
transformers `hidden_states[i + 1]`, SGLang `i`, vLLM `i + 1` (it names layer inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specforge_lite.core.errors import CaptureError, ConfigError
from specforge_lite.types import CapturedStates, TokenizedSample

NUM_AUX_LAYERS = 3


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
        ...

    def close(self) -> None:
        """Stop what this object launched and delete what it left on disk; may be called twice."""
        ...


def default_aux_layer_ids(num_layers: int) -> tuple[tuple[int, ...], str | None]:
    """Return (aux layer ids, note). EAGLE-3's choice is the outputs of layers 1, N//2-1, N-4.

    On a shallow target these collapse; then three distinct layers spread over the depth, never the last one (no
    engine captures it as an aux layer), and a note that says so. Fewer than 4 layers repeat nothing: they give what
    there is.

    >>> default_aux_layer_ids(32)
    ((1, 15, 28), None)
    >>> default_aux_layer_ids(8)
    ((1, 3, 4), None)
    """
    wanted = (1, num_layers // 2 - 1, num_layers - 4)
    if wanted[0] < wanted[1] < wanted[2]:
        return wanted, None
    usable = num_layers - 1  # outputs of layers 0 .. N-2
    if usable < 1:
        raise ConfigError(f"a target of {num_layers} layer has no aux layer besides its last hidden state")
    count = min(NUM_AUX_LAYERS, usable)
    spread = tuple(round(i * (usable - 1) / max(count - 1, 1)) for i in range(count))
    return spread, f"default aux layers {wanted} collapse on {num_layers} layers; using {spread}"


def check_aux_layer_ids(aux_layer_ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the ids as a tuple if they are distinct, ascending and below the last layer; raise ConfigError if not."""
    ids = tuple(aux_layer_ids)
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > num_layers - 2:
        raise ConfigError(
            f"aux_layer_ids {list(ids)}: expected distinct ascending ids of layer outputs in 0..{num_layers - 2}"
            f" ({num_layers} layers; the last one is captured as the last hidden state)"
        )
    return ids


def check_capture(sample: TokenizedSample, states: CapturedStates, info: TargetInfo) -> None:
    """Raise CaptureError, with the arithmetic, unless `states` are complete and belong to `sample`."""
    name, length = sample.sample_id, len(sample)
    if states.sample_id != name:
        raise CaptureError(f"{info.engine}: asked for sample {name}, got {states.sample_id}")
    if states.input_ids_L.shape != sample.input_ids_L.shape:
        raise CaptureError(
            f"{info.engine}: sample {name}: sent {length} token ids, {len(states.input_ids_L)} came back"
        )
    if not torch.equal(states.input_ids_L.cpu(), sample.input_ids_L.cpu()):
        at = int((states.input_ids_L.cpu() != sample.input_ids_L.cpu()).nonzero()[0])
        raise CaptureError(
            f"{info.engine}: sample {name}: token {at} is {int(states.input_ids_L[at])} in the reply,"
            f" {int(sample.input_ids_L[at])} was sent"
        )
    if tuple(states.aux_layer_ids) != info.aux_layer_ids:
        raise CaptureError(
            f"{info.engine}: sample {name}: aux layers {list(states.aux_layer_ids)},"
            f" expected {list(info.aux_layer_ids)}"
        )
    expected = (length, len(info.aux_layer_ids), info.hidden_size)
    if tuple(states.aux_LAH.shape) != expected:
        raise CaptureError(
            f"{info.engine}: sample {name}: aux shape {tuple(states.aux_LAH.shape)}"
            f" != (tokens, aux layers, hidden) = {expected}"
        )
    if tuple(states.last_LH.shape) != (length, info.hidden_size):
        raise CaptureError(
            f"{info.engine}: sample {name}: last hidden shape {tuple(states.last_LH.shape)}"
            f" != (tokens, hidden) = {(length, info.hidden_size)}"
        )
