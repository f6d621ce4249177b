"""What to check of a target; the flags of scripts/verify_target.py."""

from __future__ import annotations

from typing import Literal

from specforge_lite.core.sections import LocalTargetSection
from specforge_lite.core.settings import flag


class VerifyConfig(LocalTargetSection):
    """Check a model as a target: layers, template, mask, head, decoding, engines."""

    chat_template: str = flag("auto", "auto, or a name from specforge_lite.data.templates")
    aux_layer_ids: tuple[int, ...] | None = flag(None, "0-based layers whose OUTPUT feeds the draft")
    load_model: bool = flag(True, "run the model; --no-load-model checks its files only")
    engines: tuple[Literal["sglang", "vllm"], ...] = flag(
        ("sglang", "vllm"), "ask these engines, where installed; 20 seconds each"
    )
