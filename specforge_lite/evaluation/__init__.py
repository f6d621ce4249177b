"""How good a draft is: tables, curves over checkpoints, errors, and estimated beside decoded acceptance."""

from specforge_lite.evaluation.acceptance import (
    Acceptance,
    Decoded,
    Walk,
    answers_of,
    decode_answers,
    disagreement,
)

__all__ = ["Acceptance", "Decoded", "Walk", "answers_of", "decode_answers", "disagreement"]
