"""The target inside this process: a plain transformers forward with hooks on the chosen layers only.

This is the oracle the serving engines are tested against, and the default where none of them is installed. Shape
letters as in `types`: B rows of a micro-batch, T padded length, L tokens of one sample, H hidden size, A aux layers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specforge_lite.capture.base import check_sample, target_info
from specforge_lite.core.devices import num_gpus, on_device, pick_device, without_cudnn
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config, model_class, transformers_errors
from specforge_lite.core.weight_files import safetensors_files, weight_files
from specforge_lite.types import CapturedStates, TokenizedSample

MAX_TOKENS_PER_FORWARD = 16_384
MAX_PADDING_SHARE = 0.2


class HfEngine:
    """A target run by transformers, implementing `TargetEngine`.

    model_path: local directory or hub name. dtype: `auto` (as stored), `float32`, `bfloat16`, `float16`.
    device: `cpu`, `cuda:N`, `auto` (all visible GPUs); default: see `place_target`. States come on that of the model's
    first layer.
    tp: ranks that hold the target together (transformers' own tensor parallelism; every torchrun rank makes an engine).
    Results do not depend on which samples are captured together, up to fp rounding.

    Raises ConfigError for a model that cannot be loaded or aux layers it does not have.
    """

    max_concurrency = 1

    def __init__(
        self,
        model_path: str,
        aux_layer_ids: Sequence[int] | None = None,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        tp: int | None = None,
        wait_minutes: float = 20.0,
    ) -> None:
        place = place_target(model_path, dtype, device)
        group = None
        if tp is not None and tp > 1:
            from specforge_lite.capture.hf_tp import Lockstep, open_group

            group = open_group(tp, torch.device(place), wait_minutes)
        self.model = load_target_model(model_path, dtype, place, trust_remote_code, group)
        self.device: torch.device = self.model.get_input_embeddings().weight.device
        self.decoder, layers = find_decoder(self.model)
        self.info = target_info(self.model.config, "hf", aux_layer_ids)
        self._length_group = length_group(self.model.config.get_text_config())
        self._taps: dict[int, Tensor] = {}
        self._hooks = [layers[i].register_forward_hook(self._tap(i)) for i in self.info.aux_layer_ids]
        self._lock = threading.Lock()
        self._lockstep = Lockstep(group, self.device, self._capture) if group is not None else None

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        """Return the states of `samples`, in their order, detached, in the model's dtype.

        Raises CaptureError naming the sample for one that is empty, too long, or has ids outside the vocabulary.
        """
        for sample in samples:
            check_sample(sample, self.info)
        if self._lockstep is not None:
            return self._lockstep.capture(samples)
        return self._capture(samples, range(len(samples)))

    def _capture(self, samples: Sequence[TokenizedSample], wanted: range) -> list[CapturedStates]:
        """Run all `samples`, return the states of those in `wanted`."""
        captured: dict[int, CapturedStates] = {}
        with self._lock:
            for batch in length_buckets([len(s) for s in samples], self._length_group):
                rows = [row for row, index in enumerate(batch) if index in wanted]
                for row, states in zip(rows, self._forward([samples[i] for i in batch], rows)):
                    captured[batch[row]] = states
        return [captured[i] for i in wanted]

    def close(self) -> None:
        """Remove the hooks; the model itself goes with the object. With `tp` it waits for the other ranks."""
        if self._lockstep is not None:
            self._lockstep.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _forward(self, samples: list[TokenizedSample], rows: list[int]) -> list[CapturedStates]:
        input_ids_BT, attention_mask_BT = right_pad(samples, self.device)
        self._taps.clear()
        with on_device(self.device), without_cudnn(self.device):
            output = self.decoder(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        aux_BTAH = torch.stack([self._taps[i].to(self.device) for i in self.info.aux_layer_ids], dim=2)
        last_BTH = output.last_hidden_state
        self._taps.clear()
        return [
            CapturedStates(
                sample_id=samples[row].sample_id,
                input_ids_L=samples[row].input_ids_L,
                # clone: a view would keep the padded batch alive as long as its longest-lived sample
                aux_LAH=aux_BTAH[row, : len(samples[row])].clone(),
                last_LH=last_BTH[row, : len(samples[row])].clone(),
                aux_layer_ids=self.info.aux_layer_ids,
                last_is_normed=True,
            )
            for row in rows
        ]

    def _tap(self, layer_id: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._taps[layer_id] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook


def place_target(model_path: str, dtype: str, device: str | torch.device | None) -> torch.device | str:
    """Where a target goes: the device that is named, by default this rank's GPU or the CPU; or `auto`, all visible
    GPUs, where that is named, or where a process without other ranks has several and the weights do not fit into one.
    """
    if device == "auto" and num_gpus() > 1:
        return "auto"
    place = pick_device(None if device == "auto" else device)
    if device is not None or place.type != "cuda" or num_gpus() < 2 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return place
    from specforge_lite.capture.hf_large import fits_one_gpu

    return place if fits_one_gpu(model_path, dtype, place) else "auto"


def load_target_model(
    model_path: str, dtype: str, device: torch.device | str, trust_remote_code: bool, tp_group: Any = None
) -> Any:
    """Load a causal LM, or the text-generating model of a multimodal family, frozen and in eval mode.

    device: see `place_target`. tp_group: process group to split it over (each rank loads its part only).
    """
    # Which files of a local model count must be clear: transformers would follow an index anywhere, and prefers another
    # file than the engines where several are there.
    if Path(model_path).is_dir() and safetensors_files(Path(model_path)):
        weight_files(Path(model_path))
    config = load_config(model_path, trust_remote_code)
    loader = model_class(config).from_pretrained
    if getattr(config, "quantization_config", None):
        from specforge_lite.capture.hf_large import quantized_loader

        loader = quantized_loader(config, model_path, device, trust_remote_code, tp_group is not None) or loader
    options: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with transformers_errors(f"target_model_path {model_path}"):
        if tp_group is not None:
            from specforge_lite.capture.hf_tp import load_part

            return load_part(loader, model_path, options, tp_group).eval().requires_grad_(False)
        if device == "auto":
            options["device_map"] = "auto"
        # Mismatched sizes are reported below, with the name.
        model, report = loader(model_path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    check_all_weights(model, report, model_path)
    if device == "auto":
        from specforge_lite.capture.hf_large import check_spread

        check_spread(model, model_path)
    else:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def check_all_weights(model: nn.Module, report: dict[str, Any], model_path: str) -> None:
    """Raise ConfigError for a parameter that the files lack or have in another shape: transformers would go on with
    random values and a warning. report: `output_loading_info` of `from_pretrained`."""
    parameters = {name for name, _ in model.named_parameters()}
    for kind, found in (("missing", "missing_keys"), ("of another shape", "mismatched_keys")):
        names = sorted(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in report.get(found) or ())
        wrong = [name for name in names if name in parameters]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ConfigError(
                f"target_model_path {model_path}: {wrong[0]}{more}: {kind} in the weight files; is the download"
                " complete, and config.json this model's?"
            )


def find_decoder(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Return (text decoder, its layer list) of a transformers model of any family.

    The layer list is the ModuleList that has exactly `num_hidden_layers` entries and lies highest in the decoder;
    names (`layers`, `h`, `blocks`) differ between families, the count does not.

    Raises ConfigError for a model without such a list.
    """
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if decoder is model:  # Llama 4's text model calls itself its own decoder
        decoder = getattr(model, "model", model)
    lists = [
        (name.count("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and not any(part in name for part in ("vision", "visual", "audio", "encoder"))
    ]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__}: found no list of {num_layers} decoder layers to take hidden states from"
        )
    return decoder, min(lists, key=lambda item: item[0])[1]


def length_buckets(lengths: Sequence[int], group_of: Callable[[int], int] = lambda length: 0) -> list[list[int]]:
    """Split sample indices into micro-batches: longest first, little padding, bounded tokens, one group each."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (group_of(lengths[i]), lengths[i]), reverse=True):
        bucket = [*(buckets[-1] if buckets else ()), index]
        longest = lengths[bucket[0]]
        padded = longest * len(bucket)
        padding = padded - sum(lengths[i] for i in bucket)
        one_group = group_of(lengths[index]) == group_of(longest)
        if buckets and one_group and padded <= MAX_TOKENS_PER_FORWARD and padding <= MAX_PADDING_SHARE * padded:
            buckets[-1] = bucket
        else:
            buckets.append([index])
    return buckets


def length_group(text_config: Any) -> Callable[[int], int]:
    """Lengths that may share a batch: with length-dependent RoPE only those whose frequencies are the same."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    original: Any = rope.get("original_max_position_embeddings") or getattr(
        text_config, "original_max_position_embeddings", getattr(text_config, "max_position_embeddings", 0)
    )
    if rope.get("rope_type") == "dynamic":
        return lambda length: length if length > original else 0
    # longrope has two sets of frequencies; of other variants they do not depend on the length
    return lambda length: int(rope.get("rope_type") == "longrope" and length > original)


def right_pad(samples: Sequence[TokenizedSample], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, T] int64, padded with 0 on the right, and the attention mask, None where nothing is padded."""
    lengths = [len(s) for s in samples]
    input_ids_BT = nn.utils.rnn.pad_sequence([s.input_ids_L.cpu() for s in samples], batch_first=True)
    if min(lengths) == max(lengths):
        return input_ids_BT.to(device), None
    attention_mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return input_ids_BT.to(device), attention_mask_BT.to(device, torch.int64)
