"""Draft networks by name. A new one is one file and one line here."""

from __future__ import annotations

import importlib

from torch import Tensor

from specforge_lite.model.draft import Draft, DraftConfig

DRAFTS = {  # algorithm -> module and class, imported when one is built
    "eagle3": ("eagle3", "Eagle3Draft"),
    "eagle1": ("eagle1", "Eagle1Draft"),
    "dflash": ("block", "BlockDraft"),
    "dspark": ("block", "BlockDraft"),
}


def build_draft(config: DraftConfig, d2t: Tensor, t2d: Tensor) -> Draft:
    """Build the draft network of `config.algorithm` with the vocabulary map d2t [Vd] int64, t2d [V] bool."""
    module, name = DRAFTS[config.algorithm]
    draft: Draft = getattr(importlib.import_module(f"specforge_lite.model.{module}"), name)(config, d2t, t2d)
    return draft
