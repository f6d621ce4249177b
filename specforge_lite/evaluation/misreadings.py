"""Why a server accepts less of a draft than our decoder, or why hardly anything is accepted at all: our decoder decodes
the same prompts with the draft misread in one way after another, and what comes of it is compared.

    causes = likely_causes(misread_acceptance(model, prompts, settings), served=[0.11, 0.02, 0.0])
    # ["layer order: fc gets layers 6, 3, 0; it was made for 0, 3, 6"]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.model.draft import Draft
from specforge_lite.model.layers import RMSNorm

# Misreadings whose acceptance lies this near to each other are not told apart; one explains what is seen if it is at
# most HALF as far from it as the draft read right.
TIE, HALF = 0.015, 0.5
LEAST_GAIN = 0.2  # tokens a pass
RIGHT = ""  # the draft as it is
MOST_ORDERS = 3  # layers whose orders are all tried; of more, the reverse


def misreadings(draft: Draft, num_layers: int, head_VH: Tensor) -> Iterator[tuple[str, Draft]]:
    """(what went wrong, the draft read so). num_layers, head_VH: the target's."""
    config = draft.config
    yield from _other_layers(draft, num_layers)
    for name in [name for name, module in draft.named_modules() if isinstance(module, RMSNorm)]:
        other = copy.deepcopy(draft)
        nn.init.ones_(other.get_submodule(name).weight)  # type: ignore[arg-type]
        yield f"norm: {name} is left at one", other
    if config.algorithm == "eagle3":
        other = copy.deepcopy(draft)
        other.config = config.replace(norm_output=not config.norm_output)
        yield f"norm: the state of the next step is taken {'before' if config.norm_output else 'after'} norm", other
    if isinstance(head := getattr(draft, "lm_head", None), nn.Linear):
        rows_VH = head_VH[draft.target_ids]
        heads = {"the target's rows take the place of lm_head": rows_VH, "lm_head is left at random": None}
        for text, rows in heads.items():
            if rows is not None and rows.shape != head.weight.shape:
                continue
            other = copy.deepcopy(draft)
            other.lm_head.weight.data = torch.randn_like(head.weight) if rows is None else rows.to(head.weight)  # type: ignore[union-attr]
            yield f"head: {text}", other
    if config.draft_vocab_size < config.vocab_size:
        other = copy.deepcopy(draft)
        other.d2t.zero_()
        yield "d2t: draft ids are taken for target ids", other


def _other_layers(draft: Draft, num_layers: int) -> Iterator[tuple[str, Draft]]:
    ids = draft.config.aux_layer_ids
    if ids is None:  # EAGLE-1: the embedding and the last state
        other = copy.deepcopy(draft)
        other.fc.weight.data = torch.cat(other.fc.weight.chunk(2, 1)[::-1], 1)  # type: ignore[union-attr, operator]
        yield "layer order: fc gets the last state before the embedding", other
        return
    places = range(len(ids))
    orders = list(permutations(places))[1:] if len(ids) <= MOST_ORDERS else [tuple(reversed(places))]
    for order in orders:  # part n of fc gets layer order[n]
        other, back = copy.deepcopy(draft), [order.index(place) for place in places]
        parts = draft.fc.weight.chunk(len(ids), 1)  # type: ignore[union-attr, operator]
        other.fc.weight.data = torch.cat([parts[place] for place in back], 1)  # type: ignore[union-attr]
        if len(norms := getattr(draft, "fc_norm", ())):
            other.fc_norm = nn.ModuleList([norms[place] for place in back])
        got = ", ".join(str(ids[place]) for place in order)
        yield f"layer order: fc gets layers {got}; it was made for {', '.join(map(str, ids))}", other
    for shift in (-1, 1):
        shifted = tuple(min(max(i + shift, 0), num_layers - 2) for i in ids)  # as far as our decoder can read them
        if len({*shifted}) == len(ids):
            other = copy.deepcopy(draft)
            other.config = draft.config.replace(aux_layer_ids=shifted)
            yield f"layer ids: {', '.join(map(str, shifted))} for {', '.join(map(str, ids))}, off by one", other


def misread_acceptance(
    model: SpeculativeModel, prompts: Sequence[list[int]], settings: GenerationSettings
) -> dict[str, list[float]]:
    """Mistake -> share of passes that accepted at each position; RIGHT: without one."""
    assert model.drafter is not None
    target, draft = model.target, model.drafter.draft

    def accepted(reader: SpeculativeModel, **changes: Any) -> list[float]:
        return reader.run(list(prompts), replace(settings, **changes)).stats.acceptance_per_position

    found = {RIGHT: accepted(model)}
    if settings.temperature > 0 and settings.draw_drafts(draft):
        found["draft sampling: the most probable tokens are taken, not drawn ones"] = accepted(
            model, draft_sampling="greedy"
        )
    for cause, other in misreadings(draft, target.num_layers, target.model.get_output_embeddings().weight):
        misread = SpeculativeModel(target.model, other, model.tokenizer, model.shape, model.tie_units)
        found[cause] = accepted(misread)
    return found


def likely_causes(accepted: Mapping[str, Sequence[float]], served: Sequence[float] | None = None) -> list[str]:
    """Of the result of `misread_acceptance` the mistakes that come nearest to `served` (accepted at each position),
    none where no one explains it.

    served None: those with which our decoder accepts most, none where that is less than twice what it accepts of the
    draft as it is: the file itself holds the draft wrong.
    """

    def score(found: Sequence[float]) -> float:
        return -sum(found) if served is None else max(abs(a - b) for a, b in zip_longest(found, served, fillvalue=0.0))

    scores = {cause: score(found) for cause, found in accepted.items()}
    plain = scores.pop(RIGHT)
    best = min(scores.values(), default=math.inf)
    if best > (HALF * plain if served is not None else min(plain / HALF, -LEAST_GAIN)):
        return []
    tie = TIE if served is not None else LEAST_GAIN
    return sorted((cause for cause, found in scores.items() if found <= best + tie), key=scores.__getitem__)
