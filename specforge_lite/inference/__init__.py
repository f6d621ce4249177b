"""Speculative decoding in this process.

Names are imported on first use: reading a draft directory should not load transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specforge_lite.inference.ea_model import EaModel
    from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
    from specforge_lite.inference.tree import TreeShape

__all__ = ["EaModel", "GenerationSettings", "SpeculativeModel", "TreeShape"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"EaModel": "ea_model", "TreeShape": "tree"}.get(name, "speculative")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
