"""Settings of an evaluation."""

from __future__ import annotations

from specforge_lite.core.settings import Section, flag


class MeasureSection(Section):
    """How drafts are evaluated."""

    ttt_length: int = flag(7, "K, draft steps to evaluate: positions 0 to K-1 of the table", ge=1, le=32)
    chain_length: int = flag(5, "drafted tokens per pass in the acceptance lengths", ge=1)
    batch_size: int = flag(4, "samples per batch; means and deviations are over batches", ge=1)
    eval_max_samples: int | None = flag(None, "evaluate on the first so many samples", ge=1)
    device: str | None = flag(None, "default: CUDA if there is one")
