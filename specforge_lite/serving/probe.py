"""The proof, at start, that a server captures the target's own states: aux states against the first layers in
transformers, and the last state, through the trainer's norm and head, against the token the server itself chose.

Letters: L tokens of a probe, A aux layers, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.capture.hf import find_decoder
from specforge_lite.capture.remote import ProbeReply
from specforge_lite.core.errors import CaptureError, SpecforgeError
from specforge_lite.core.hub import load_config, local_directory, model_class
from specforge_lite.core.log import info, warn
from specforge_lite.model.target_head import load_target_head

# The first layers of a target are read where they are at most this much; a first aux layer deep in a large one is not.
MAX_REFERENCE_BYTES = 24 << 30
# Median over rows of |got - want| / |want| (routing may differ in a few rows); other layers differ by .3 and more.
AUX_TOLERANCE_FP32 = 0.01
AUX_TOLERANCE_16_BIT = 0.08
# How far the server's token may lie below the largest logit, in standard deviations of the logits.
TOKEN_TOLERANCE_FP32 = 0.01
TOKEN_TOLERANCE_16_BIT = 0.2


def verify_capture(replies: Sequence[ProbeReply], model_path: str, trust_remote_code: bool) -> None:
    """Raise CaptureError, naming the layer and the likely cause, where states are not those of the model.

    Where the weights are quantised the aux states are not compared, with a warning: transformers would compute
    something else. The last state is, through the dequantised head: that the teacher is what is served.
    """
    config = load_config(model_path, trust_remote_code)
    directory = local_directory(model_path)
    _verify_last(replies, directory, config)
    if getattr(config, "quantization_config", None) is not None:
        warn(f"{model_path}: quantised weights; the server's aux states are not held against transformers")
        return
    try:
        outputs = _reference(replies, directory, trust_remote_code)
    except SpecforgeError:
        raise
    except Exception as error:  # a config that cannot be cut, modelling code that needs a GPU: nothing is proven then
        warn(f"{model_path}: the first aux layer is not held against transformers ({type(error).__name__}: {error})")
        return
    if outputs is not None:
        for reply, outputs_of_reply in zip(replies, outputs):
            _verify_aux(reply, outputs_of_reply)
        info(f"captured states equal transformers': layer {replies[0].states.aux_layer_ids[0]} and the next token")


def _verify_last(replies: Sequence[ProbeReply], directory: Path, config: Any) -> None:
    head = load_target_head(directory, config)
    for reply in replies:
        last_H = reply.states.last_LH[-1]
        normed_H = last_H if reply.states.last_is_normed else head.norm(last_H)
        logits_V = head.logits(normed_H.float()).float()
        if reply.next_token is None:
            continue
        below = float((logits_V.max() - logits_V[reply.next_token]) / logits_V.std())
        exact = last_H.dtype == head.lm_head_VH.dtype == torch.float32
        if below > (TOKEN_TOLERANCE_FP32 if exact else TOKEN_TOLERANCE_16_BIT):
            raise CaptureError(
                f"{reply.url}: last hidden state: it predicts token {int(logits_V.argmax())}, the server answered"
                f" {reply.next_token} ({below:.2f} standard deviations below); likely the final norm or a scale of the"
                " head is applied otherwise, or another model is served (--no-verify-capture skips this check)"
            )


def _reference(replies: Sequence[ProbeReply], directory: Path, trust_remote_code: bool) -> list[list[Tensor]] | None:
    """For each reply the outputs [L, H] of the embedding and of layers 0 .. first aux layer, from a model that is cut
    after that layer; None (with a warning) where even that is too large."""
    first, dtype = replies[0].states.aux_layer_ids[0], replies[0].states.aux_LAH.dtype
    config = load_config(directory, trust_remote_code)
    share = (first + 1) / int(config.get_text_config().num_hidden_layers)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if size * share > MAX_REFERENCE_BYTES:
        gib = size * share / 2**30
        warn(f"aux layer {first} is not held against transformers: the layers up to it are {gib:.0f} GiB")
        return None
    _cut(config.get_text_config(), first + 1)
    try:
        model = _load_quietly(directory, config, dtype, trust_remote_code)
    except RuntimeError:  # tensors that hold a part for each layer (Gemma 4) do not fit a cut model
        if size > MAX_REFERENCE_BYTES:
            raise
        model = _load_quietly(directory, load_config(directory, trust_remote_code), dtype, trust_remote_code)
    decoder, layers = find_decoder(model)
    taps: list[Tensor] = []
    layers[0].register_forward_pre_hook(
        lambda _, args, named: taps.append(args[0] if args else named["hidden_states"]), with_kwargs=True
    )
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: taps.append(out[0] if isinstance(out, tuple) else out))
    outputs = []
    with torch.no_grad():
        for reply in replies:
            taps.clear()
            decoder(input_ids=reply.states.input_ids_L[None].clone(), use_cache=False)
            outputs.append([tap[0] for tap in taps[: first + 2]])
    return outputs


def _cut(text_config: Any, num_layers: int) -> None:
    """Make a config one of its first layers only; lists of one entry a layer (`layer_types`) are cut, too."""
    old = int(text_config.num_hidden_layers)
    for name, value in list(vars(text_config).items()):
        if isinstance(value, (list, tuple)) and len(value) == old:
            setattr(text_config, name, value[:num_layers])
    if getattr(text_config, "num_kv_shared_layers", None):
        text_config.num_kv_shared_layers = 0  # they are the last ones
    if getattr(text_config, "scale_depth", None):  # MiniCPM multiplies by scale_depth / sqrt(layers)
        text_config.scale_depth = text_config.scale_depth * math.sqrt(num_layers / old)
    text_config.num_hidden_layers = num_layers


def _load_quietly(directory: Path, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """transformers warns about every layer that the cut config leaves out."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        auto_class = model_class(config)
        model = auto_class.from_pretrained(directory, config=config, dtype=dtype, trust_remote_code=trust_remote_code)
    finally:
        logging.set_verbosity(before)
    return model.eval()


def _verify_aux(reply: ProbeReply, outputs: Sequence[Tensor]) -> None:
    """outputs: those of the embedding, then of each layer up to the first aux layer."""
    got_LH, first = reply.states.aux_LAH[:, 0], reply.states.aux_layer_ids[0]
    tolerance = AUX_TOLERANCE_FP32 if got_LH.dtype == torch.float32 else AUX_TOLERANCE_16_BIT
    error = _difference(got_LH, outputs[-1])
    if error <= tolerance:
        return
    cause = "the engine may keep the residual stream apart, or serve other weights or another rope"
    scale = float((got_LH.float() * outputs[-1].float()).sum() / outputs[-1].float().square().sum())
    if scale > 0 and _difference(got_LH / scale, outputs[-1]) <= tolerance:
        cause = f"it is that output times {scale:.4g}: the engine scales the residual stream"
    for place, output in enumerate(outputs[:-1]):
        if _difference(got_LH, output) <= tolerance:
            layer = f"layer {place - 1}" if place else "the embedding"
            cause = f"it is the output of {layer}: other layer ids are meant"
    raise CaptureError(
        f"{reply.url}: aux layer {first}: the captured state differs from transformers' output of that layer by"
        f" {error:.2f} of its size (at most {tolerance}); {cause} (--no-verify-capture skips this check)"
    )


def _difference(got_LH: Tensor, want_LH: Tensor) -> float:
    """Median over rows of the relative distance."""
    got_LH, want_LH = got_LH.float(), want_LH.float()
    return float(((got_LH - want_LH).norm(dim=-1) / want_LH.norm(dim=-1).clamp_min(1e-12)).median())
