"""Speculative decoding in this process, and the reading of draft directories.

`SpeculativeModel` is imported on first use: reading a draft directory should not load transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specforge_lite.inference.ea_model import EaModel
    from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
    from specforge_lite.inference.tree import TreeShape

__all__ = ["EaModel", "GenerationSettings", "SpeculativeModel", "TreeShape"]


def __getattr__(name: str) -> Any:
    if name in ("GenerationSettings", "SpeculativeModel"):
        from specforge_lite.inference import speculative

        return getattr(speculative, name)
    if name == "EaModel":
        from specforge_lite.inference.ea_model import EaModel

        return EaModel
    if name == "TreeShape":
        from specforge_lite.inference.tree import TreeShape

        return TreeShape
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
