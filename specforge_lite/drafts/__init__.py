"""Draft networks by name. A new one is one file and one line here."""

from __future__ import annotations

from torch import Tensor

from specforge_lite.drafts.base import Attend, Draft, DraftConfig, TTTSettings
from specforge_lite.drafts.eagle1 import Eagle1Draft
from specforge_lite.drafts.eagle3 import Eagle3Draft
from specforge_lite.drafts.initialize import init_from_target

DRAFTS: dict[str, type[Draft]] = {
    "eagle3": Eagle3Draft,
    "eagle1": Eagle1Draft,
}


def build_draft(config: DraftConfig, d2t: Tensor, t2d: Tensor) -> Draft:
    """Build the draft network of `config.algorithm` with the vocabulary map d2t [Vd] int64, t2d [V] bool."""
    return DRAFTS[config.algorithm](config, d2t, t2d)  # type: ignore[call-arg]


__all__ = ["DRAFTS", "Attend", "Draft", "DraftConfig", "TTTSettings", "build_draft", "init_from_target"]
