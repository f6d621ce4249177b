"""What several commands build from their flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_lite.core.sections import EngineFlags, LocalTargetSection
from specforge_lite.core.settings import Section, flag

if TYPE_CHECKING:
    from specforge_lite.inference.speculative import SpeculativeModel
    from specforge_lite.serving.session import ServingOptions


class TreeFlags(Section):
    """Shape of the tree that our decoder drafts."""

    total_token: int = flag(60, "tree: tokens verified at once", ge=2)
    depth: int = flag(7, "tree: expansions after the first", ge=0)
    top_k: int = flag(10, "tree: candidates per expansion", ge=1)


def open_model(target: LocalTargetSection, draft: Path | None, **shape: Any) -> SpeculativeModel:
    """Target and draft in this process. shape: of the tree, or `num_draft_tokens` of a chain."""
    from specforge_lite.inference.speculative import SpeculativeModel

    return SpeculativeModel.from_pretrained(
        target.target_model_path,
        draft,
        dtype=target.target_dtype,
        device=target.device,
        trust_remote_code=target.trust_remote_code,
        **shape,
    )


def serving_options(backend: str, engine: EngineFlags, draft: str | None, **more: Any) -> ServingOptions:
    """Options of a server with a section's flags of target and engine."""
    from specforge_lite.serving.session import ServingOptions

    flags = engine.model_dump(include={"tp_size", "mem_frac", "engine_python", "engine_devices", "trust_remote_code"})
    target: Any = engine
    return ServingOptions(
        backend,
        target.target_model_path,
        draft,
        dtype=target.target_dtype,
        engine_args=engine.engine_arg,
        **flags,
        **more,
    )
