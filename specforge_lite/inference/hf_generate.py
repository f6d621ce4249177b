"""Batched generation with transformers, for regeneration without a server.

Rows of a batch are padded on the left. Three things are added to `model.generate`:
- it runs in segments, and rows that have ended leave the batch between two of them;
- the cache keeps spare room instead of copying all keys and values for each token (40% of the time on a CPU);
- sampling draws one uniform number per (row seed, position), so that a row's answer does not depend on its batch.

Shape letters: B rows, T padded length, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge_lite.inference.logit_rules import PLACE_RULES, TEXT_RULES, check_generation_config, rules_in_force

SEGMENT_TOKENS = 32
CACHE_SLACK_TOKENS = 64


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it. temperature 0 is greedy; `seed` decides all of a row's random choices."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class GenerationResult:
    """New token ids, the end token included where there is one. finish_reason as servers say it: `stop`, `length`."""

    token_ids: list[int]
    finish_reason: str


def generate_batch(
    model: Any,
    requests: Sequence[GenerationRequest],
    eos_token_ids: Sequence[int],
    pad_token_id: int = 0,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[GenerationResult]:
    """Continue all `requests` as one batch; results in their order. `is_stopped` is asked between segments; once it
    says yes, answers end where they are.

    Greedy answers equal those of each prompt alone up to fp rounding of the logits. Raises ValueError for an empty
    prompt or a request for no token.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    if any(not request.prompt_ids or request.max_new_tokens < 1 for request in requests):
        raise ValueError("a request needs a prompt of at least one token and at least one new token")
    # `generate` applies the rest of the model's own config; a segment's beginning is not the end of the prompt.
    check_generation_config(model.generation_config, PLACE_RULES)
    lengths = [len(request.prompt_ids) for request in requests]
    if len(set(lengths)) > 1 and rules_in_force(model.generation_config, TEXT_RULES):
        # A rule would take padding for text: a penalty on an end token that is the padding as well.
        results: dict[int, GenerationResult] = {}
        for length in dict.fromkeys(lengths):
            rows = [row for row, other in enumerate(lengths) if other == length]
            alike = [requests[row] for row in rows]
            results |= zip(rows, generate_batch(model, alike, eos_token_ids, pad_token_id, is_stopped))
        return [results[row] for row in range(len(requests))]
    answers: list[list[int]] = [[] for _ in requests]
    rows, cache = list(range(len(requests))), growing_cache(model)
    tokens_BT = _left_padded([request.prompt_ids for request in requests], pad_token_id).to(model.device)
    mask_BT = _left_padded([[1] * len(request.prompt_ids) for request in requests], 0).to(model.device)
    while rows and not is_stopped():
        asked, done = [requests[row] for row in rows], [len(answers[row]) for row in rows]
        missing = max(request.max_new_tokens - count for request, count in zip(asked, done))
        config = GenerationConfig(
            max_new_tokens=min(SEGMENT_TOKENS, missing),
            do_sample=False,  # the sampler leaves one choice; the model's own sampling defaults must not apply
            eos_token_id=list(eos_token_ids) or None,
            pad_token_id=pad_token_id,
        )
        samplers = [SeededSampler(asked, done)] if any(request.temperature > 0 for request in asked) else []
        with torch.no_grad():
            longer_BT: Tensor = model.generate(
                tokens_BT,
                attention_mask=mask_BT,
                past_key_values=cache,
                generation_config=config,
                logits_processor=LogitsProcessorList(samplers),
            )
        new_BT = longer_BT[:, tokens_BT.shape[1] :]
        keep: list[int] = []
        for at, (row, new) in enumerate(zip(rows, new_BT.tolist())):
            answers[row] += new
            if len(answers[row]) < requests[row].max_new_tokens and not set(eos_token_ids) & set(new):
                keep.append(at)
        tokens_BT, mask_BT = longer_BT, torch.cat([mask_BT, torch.ones_like(new_BT)], dim=1)
        if 0 < len(keep) < len(rows):
            index_B = torch.tensor(keep, device=tokens_BT.device)
            tokens_BT, mask_BT = tokens_BT[index_B], mask_BT[index_B]
            cache.reorder_cache(index_B)  # unlike `batch_select_indices`, every kind of layer has it
        rows = [rows[at] for at in keep]
    return [_cut(request, tokens, eos_token_ids) for request, tokens in zip(requests, answers)]


def _left_padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows] or [torch.zeros(0, dtype=torch.int64)]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")


def eos_token_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """All ids that end an answer: those of the generation config, else of the model's, and the tokenizer's own."""
    found: list[int] = []
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(found))


def _cut(request: GenerationRequest, tokens: list[int], eos_token_ids: Sequence[int]) -> GenerationResult:
    tokens = tokens[: request.max_new_tokens]
    end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), None)
    if end is None:
        return GenerationResult(tokens, "length")
    return GenerationResult(tokens[: end + 1], "stop")


class SeededSampler:
    """A logits processor that samples: it leaves each row the one token its seed and position choose.

    Rows with temperature 0 are left alone. Sampling follows softmax(logits / temperature), cut to the smallest set of
    likeliest tokens with at least `top_p` of the mass.
    """

    def __init__(self, requests: Sequence[GenerationRequest], num_done: Sequence[int]) -> None:
        self.requests = requests
        self.num_done = list(num_done)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] logits -> the same, with every token but the chosen one at -inf in the sampled rows."""
        sampled = [i for i, r in enumerate(self.requests) if r.temperature > 0]
        rows_S = torch.tensor(sampled, device=scores.device)
        temperature_S = torch.tensor([self.requests[i].temperature for i in sampled], device=scores.device)
        top_p_S = torch.tensor([self.requests[i].top_p for i in sampled], device=scores.device, dtype=torch.float64)
        uniforms = [uniform(self.requests[i].seed, self.num_done[i]) for i in sampled]
        uniform_S = torch.tensor(uniforms, device=scores.device, dtype=torch.float64)
        self.num_done = [n + 1 for n in self.num_done]

        probs_SV = torch.softmax(scores[rows_S].double() / temperature_S[:, None], dim=-1)
        if (top_p_S >= 1).all():
            chosen_S1 = draw(probs_SV.cumsum(dim=-1), uniform_S)
        else:  # sorting the vocabulary costs more than the rest of a small model
            sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
            mass_SV = sorted_SV.cumsum(dim=-1)
            dropped_SV = (mass_SV - sorted_SV) >= top_p_S[:, None]  # enough mass lies before this token
            kept_mass_SV = sorted_SV.masked_fill(dropped_SV, 0).cumsum(dim=-1)
            chosen_S1 = order_SV.gather(1, draw(kept_mass_SV, uniform_S))

        scores = scores.clone()
        scores[rows_S] = torch.full_like(scores[rows_S], -torch.inf).scatter(1, chosen_S1, 0.0)
        return scores


def draw(mass_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """Cumulative mass [S, V] (fp64) and uniform numbers [S] in [0, 1) -> chosen index [S, 1]."""
    threshold_S1 = uniform_S[:, None] * mass_SV[:, -1:]
    return torch.searchsorted(mass_SV, threshold_S1, right=True).clamp_(max=mass_SV.shape[1] - 1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a hash, so that it needs no generator state and no batch order."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def growing_cache(model: Any) -> Any:
    """A DynamicCache for `model` whose plain layers grow in place; sliding, linear and other layers stay."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """`keys`, `values` [B, heads, T, d] are the filled part of buffers with room for some more tokens."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.key_buffer, self.value_buffer = key_states[:, :, :0], value_states[:, :, :0]
                self.keys, self.values = self.key_buffer, self.value_buffer
            assert self.keys is not None
            assert self.values is not None
            self.key_buffer, self.keys = append(self.key_buffer, self.keys, key_states)
            self.value_buffer, self.values = append(self.value_buffer, self.values, value_states)
            return self.keys, self.values

    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def append(buffer: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """old [B, heads, n, d] and new [B, heads, m, d] -> (buffer, filled part [B, heads, n + m, d]).

    `old` is copied only where it is not the start of `buffer` (rows have left the batch) or the buffer is full.
    """
    num_old, num_all = old.shape[2], old.shape[2] + new.shape[2]
    if old.data_ptr() != buffer.data_ptr() or len(old) != len(buffer) or num_all > buffer.shape[2]:
        buffer = new.new_empty(*new.shape[:2], num_all + CACHE_SLACK_TOKENS, new.shape[3])
        buffer[:, :, :num_old] = old
    buffer[:, :, num_old:num_all] = new
    return buffer, buffer[:, :, :num_all]
