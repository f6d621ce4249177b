"""Settings of a capture to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from specforge_lite.core.settings import Section, flag


class CaptureSection(Section):
    """Hidden states on disk."""

    offline_dir: Path = flag(..., "directory that receives the hidden states")
    states_dtype: Literal["bf16", "fp32"] = flag(
        "bf16", "precision on disk; fp32 for a target that runs in fp32 and exact repeats"
    )
    shard_mb: int = flag(1024, "size of one file, and of what a killed capture may lose", ge=1)
    skip_budget: float = flag(0.001, "share of samples the engine may refuse", ge=0, le=1)
    prefetch_depth: int = flag(4, "capture requests under way", ge=1)
