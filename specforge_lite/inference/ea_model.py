"""`EaModel`: the class that scripts written for EAGLE use, over `SpeculativeModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.model.draft import Draft

DEFAULT_TOTAL_TOKEN = 60
# What transformers' loaders take and has no effect here.
UNUSED = ("low_cpu_mem_usage", "use_safetensors", "attn_implementation", "threshold", "Type", "type")


class EaModel(SpeculativeModel):
    """A target with its draft under EAGLE's names.

    >>> model = EaModel.from_pretrained(base_model_path="target", ea_model_path="draft", use_eagle3=True)
    >>> ids = model.tokenizer("Once upon a time", return_tensors="pt").input_ids.to(model.device)
    >>> print(model.tokenizer.decode(model.eagenerate(ids, max_new_tokens=64)[0]))
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        base_model_path: str,
        ea_model_path: str | Path | None = None,
        use_eagle3: bool | None = None,
        total_token: int = DEFAULT_TOTAL_TOKEN,
        depth: int = 7,
        top_k: int = 10,
        torch_dtype: str | torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        **unused: Any,
    ) -> EaModel:
        """See `SpeculativeModel.from_pretrained`. ea_model_path: whatever `load_draft` reads, a hub name too.

        total_token -1, EAGLE's "measure it": 60. device_map: a device, or "auto", which takes the default one.
        Raises ConfigError for an argument that neither EAGLE nor transformers has.
        """
        for name in unused:
            if name not in UNUSED:
                raise ConfigError(f"EaModel.from_pretrained: unknown argument '{name}'{suggest(name, UNUSED)}")
        wanted = dtype if dtype is not None else torch_dtype
        if device is None and isinstance(device_map, (str, torch.device)) and device_map not in ("auto", "cuda"):
            device = device_map
        model = super().from_pretrained(
            base_model_path,
            ea_model_path,
            total_token if total_token > 0 else DEFAULT_TOTAL_TOKEN,
            depth,
            top_k,
            use_eagle3,
            dtype="auto" if wanted is None else str(wanted).removeprefix("torch."),
            device=device,
            trust_remote_code=trust_remote_code,
        )
        assert isinstance(model, cls)
        return model

    def eval(self) -> EaModel:
        """Itself: it is always in evaluation mode."""
        return self

    def get_tokenizer(self) -> Any:
        """The target's tokenizer."""
        return self.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.target.device

    @property
    def base_model(self) -> Any:
        """The target, a transformers model."""
        return self.target.model

    @property
    def config(self) -> Any:
        """The target's config."""
        return self.target.model.config

    @property
    def ea_model(self) -> Draft | None:
        """The draft network."""
        return None if self.drafter is None else self.drafter.draft

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """As transformers' `generate`, speculatively: `model.generate(**tokenizer(text, return_tensors="pt"))` gives
        token ids [B, T] of prompts and answers. Without do_sample or a temperature it is greedy. options: those of
        `GenerationSettings`; others raise ConfigError."""
        options = {name: value for name, value in options.items() if name not in ("pad_token_id", "token_type_ids")}
        if not options.pop("do_sample", options.get("temperature", 0.0) > 0):
            options["temperature"] = 0.0
        elif "temperature" not in options:
            options["temperature"] = 1.0
        known = GenerationSettings.__dataclass_fields__
        for name in options:
            if name not in known:
                raise ConfigError(f"EaModel.generate: unknown argument '{name}'{suggest(name, known)}")
        prompts = input_ids if attention_mask is None else {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._answer(prompts, GenerationSettings(**options), False, speculative=self.drafter is not None)
