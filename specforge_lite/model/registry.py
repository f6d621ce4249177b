"""Draft networks by name. A new one is one file and one line here."""

from __future__ import annotations

from torch import Tensor

from specforge_lite.model.block import BlockDraft
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.eagle1 import Eagle1Draft
from specforge_lite.model.eagle3 import Eagle3Draft

DRAFTS: dict[str, type[Draft]] = {
    "eagle3": Eagle3Draft,
    "eagle1": Eagle1Draft,
    "dflash": BlockDraft,
    "dspark": BlockDraft,
}


def build_draft(config: DraftConfig, d2t: Tensor, t2d: Tensor) -> Draft:
    """Build the draft network of `config.algorithm` with the vocabulary map d2t [Vd] int64, t2d [V] bool."""
    return DRAFTS[config.algorithm](config, d2t, t2d)  # type: ignore[call-arg]
