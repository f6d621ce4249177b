"""Prompts, stop strings, rules of the generation config, threads: what people meet around the decoder."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specforge_lite.core.errors import ConfigError
from specforge_lite.inference import GenerationSettings, SpeculativeModel
from specforge_lite.inference.output import Answer, StopRules
from tests.inference_drafts import random_draft
from tests.speculative_cases import CHAIN, PROMPTS, TREE, oracle_for, own_answer
from tests.target_families import HIDDEN, VOCAB


@pytest.fixture(scope="module")
def tiny(tiny_target: Path) -> SpeculativeModel:
    return SpeculativeModel.from_pretrained(str(tiny_target), dtype="float32", device="cpu")


# ------------------------------------------------------------------------------------------------- generation config

RULES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5], [7, 8]]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(64))},
    "sequence_bias": {"sequence_bias": [[[9], 4.0], [[11], -4.0]]},
    "min_new_tokens": {"min_new_tokens": 9},
    "two at once": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_greedy_follows_the_generation_config_as_generate_does(families, name: str, shape) -> None:
    """A draft that knows the answer under the rules, but for every third token; prompts of different lengths."""
    model = families("llama2")
    saved = {key: getattr(model.generation_config, key) for key in RULES[name]}
    eos = 2 if name == "min_new_tokens" else None
    try:
        plain = [own_answer(model, prompt, 24, eos_token_id=eos) for prompt in PROMPTS]
        for key, value in RULES[name].items():
            setattr(model.generation_config, key, value)
        expected = [own_answer(model, prompt, 24, eos_token_id=eos) for prompt in PROMPTS]
        assert expected != plain or name in ("min_new_tokens", "bad_words_ids")
        speculative = SpeculativeModel(model, oracle_for(model, expected, lambda p: 9 * (p % 3 == 0)), shape=shape)
        options = {"max_new_tokens": 24, "eos_token_id": [] if eos is None else [eos]}
        output = speculative.speculative_generate(PROMPTS, **options)
        assert [answer.all_tokens for answer in output.answers] == expected
        assert [a.all_tokens for a in speculative.generate(PROMPTS, **options).answers] == expected
        assert sum(output.stats.accepted_at) > 10
    finally:
        for key, value in saved.items():
            setattr(model.generation_config, key, value)


def test_what_cannot_be_applied_is_refused_by_name(families) -> None:
    model = families("llama2")
    for name, value in (("num_beams", 4), ("guidance_scale", 1.5), ("forced_eos_token_id", 2)):
        setattr(model.generation_config, name, value)
        try:
            with pytest.raises(ConfigError, match=f"generation_config of the target: {name} {value}"):
                SpeculativeModel(model, None)
        finally:
            setattr(model.generation_config, name, None)
    for name, value in (("num_beams", 1), ("guidance_scale", 1.0), ("temperature", 0.6), ("do_sample", True)):
        setattr(model.generation_config, name, value)
        SpeculativeModel(model, None)  # off, or the caller's
        setattr(model.generation_config, name, None)


@pytest.mark.parametrize("rule", [{"min_p": 0.2}, {"repetition_penalty": 1.8}, {"typical_p": 0.6}])
def test_sampling_follows_the_generation_config(families, rule: dict[str, float]) -> None:
    """First two tokens of 600 answers against the exact probabilities that transformers' processors give."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TypicalLogitsWarper,
    )

    model, prompt = families("llama2"), PROMPTS[1]
    (name, value), count = next(iter(rule.items())), 600
    make = {
        "min_p": MinPLogitsWarper,
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "typical_p": TypicalLogitsWarper,
    }[name]
    setattr(model.generation_config, name, value)
    try:
        speculative = SpeculativeModel(
            model, oracle_for(model, [own_answer(model, prompt, 8)], lambda p: 0), shape=TREE
        )
        output = speculative.speculative_generate(
            [prompt] * count, max_new_tokens=2, temperature=0.7, seed=0, eos_token_id=[]
        )
    finally:
        setattr(model.generation_config, name, None)
    first = torch.tensor([tokens[0] for tokens in output.new_tokens]).bincount(minlength=model.config.vocab_size)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(ids).logits[:, -1].float()
    rules = LogitsProcessorList([make(value)])
    warm = rules(ids, logits) / 0.7 if name == "repetition_penalty" else rules(ids, logits / 0.7)
    expected = count * warm.softmax(-1)[0]
    assert not first[expected == 0].any()
    kept = expected >= 5
    statistic = float(((first[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    degrees = int(kept.sum())
    assert (statistic - degrees) / (2 * degrees) ** 0.5 < 4


# ------------------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize(
    ("text", "stops", "before"),
    [
        ("one 🦊🦊 two three", ["🦊 two"], "one 🦊"),  # characters of several tokens
        ("Größe 雪雪雪雪雪雪雪雪雪雪 end", ["雪" * 10], "Größe "),
        ("a<|im_end|>b", ["<|im_end|>"], "a"),  # a special token, which text() does not show
        ("a<|im_end|>b c d", ["b c"], "a"),
        ("first second", ["second", "irst"], "f"),  # found at the same or an earlier token: the earlier one
    ],
)
def test_stop_strings(tiny: SpeculativeModel, text: str, stops: list[str], before: str) -> None:
    tokens = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = Answer([1], StopRules(1000, frozenset(), tuple(stops)), tiny.tokenizer)
    taken = answer.add(tokens, [False] * len(tokens))
    assert answer.finish_reason == "stop"
    assert answer.text() == before
    assert not any(stop in tiny.tokenizer.decode(tokens[: taken - 1]) for stop in stops)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": ""}, "stop_strings: an empty string"),
        ({"stop_strings": ["x", ""]}, "stop_strings: an empty string"),
        ({"temperature": float("nan")}, "temperature: expected a number of at least 0, found nan"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p: expected 0..1, found nan"),
    ],
)
def test_settings_that_mean_nothing(tiny: SpeculativeModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.generate([1, 2], max_new_tokens=4, **options)


# ------------------------------------------------------------------------------------------------------------ prompts

FORMS: dict[str, Callable[[Any, list[int]], Any]] = {
    "BatchEncoding": lambda tokenizer, ids: tokenizer(tokenizer.decode(ids), add_special_tokens=False),
    "BatchEncoding of tensors": lambda tokenizer, ids: tokenizer(
        tokenizer.decode(ids), add_special_tokens=False, return_tensors="pt"
    ),
    "numpy": lambda _, ids: np.array(ids),
    "numpy of two dimensions": lambda _, ids: np.array([ids], dtype=np.int32),
    "list of numpy numbers": lambda _, ids: list(np.array(ids)),
    "tuple": lambda _, ids: tuple(ids),
    "list of tensor numbers": lambda _, ids: list(torch.tensor(ids)),
    "list of tensors [1, T]": lambda _, ids: [torch.tensor([ids])],
    "padded on the left": lambda _, ids: {
        "input_ids": torch.tensor([[0, 0, *ids]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * len(ids)]]),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_prompts(tiny: SpeculativeModel, form: str) -> None:
    ids = tiny.tokenizer("Tom has 3 apples.", add_special_tokens=False)["input_ids"]
    assert tiny.token_ids(FORMS[form](tiny.tokenizer, ids)) == [ids]


@pytest.mark.parametrize("prompt", [[10**6], [-1, 5], [4096], [1.5], [[True]], {"input_ids": [[1, 10**6]]}, 5, None])
def test_prompts_that_are_none(tiny: SpeculativeModel, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        tiny.generate(prompt, max_new_tokens=2)


def test_rendered_text_gets_one_bos(tiny_target: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    speculative = SpeculativeModel.from_pretrained(str(tiny_target), dtype="float32", device="cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_target)
    bos, bos_id = "<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    speculative.tokenizer = tokenizer
    plain = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert speculative.token_ids("hi") == [[bos_id, *plain]]
    assert speculative.token_ids(f"{bos}hi") == [[bos_id, *plain]]
    assert speculative.token_ids([f"{bos}hi", "hi"]) == [[bos_id, *plain]] * 2


# ------------------------------------------------------------------------------------------------------------ threads


def test_threads_share_a_model(families) -> None:
    model = families("llama2")
    expected = [own_answer(model, prompt, 16) for prompt in PROMPTS]
    speculative = SpeculativeModel(model, oracle_for(model, expected, lambda p: p % 2), shape=TREE)
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        for _ in range(3):
            output = speculative.speculative_generate(PROMPTS[index], max_new_tokens=16)
            found[index] = output.answers[0].all_tokens

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected


def test_a_stream_and_a_call_in_one_thread(families) -> None:
    speculative = SpeculativeModel(families("llama2"), None)
    stream = speculative.stream(PROMPTS[0], GenerationSettings(max_new_tokens=4), speculative=False)
    next(stream)
    with pytest.raises(ConfigError, match="streaming an answer in this thread"):
        speculative.generate(PROMPTS[0], max_new_tokens=2)
    stream.close()
    assert len(speculative.generate(PROMPTS[0], max_new_tokens=2, eos_token_id=[]).new_tokens[0]) == 2


# -------------------------------------------------------------------------------------------------- waits and uploads


class Crossings(torch.overrides.TorchFunctionMode):
    """Counts what would make the host wait for a GPU, and what would send numbers to it."""

    WAITS = {"tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "numpy", "masked_select", "unique"}

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.uploads = 0
        self.places: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.WAITS:
            self.waits += 1
            self.places.append(traceback.format_stack(limit=4)[0])
        self.uploads += func in (torch.tensor, torch.as_tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_waits_and_uploads_of_a_pass(families, shape, num_prompts: int, temperature: float) -> None:
    """Rows of different lengths; the first pass, which also sends lengths and roots, is left out."""
    prompts = PROMPTS[:num_prompts]
    draft = random_draft(HIDDEN, VOCAB, 60, aux_layer_ids=(0, 1, 2), seed=3)
    speculative = SpeculativeModel(families("qwen2"), draft, shape=shape)
    settings = GenerationSettings(24, temperature=temperature, eos_token_id=[], seed=1)
    assert speculative.drafter is not None
    with torch.inference_mode():
        decoding, steps = speculative._open(prompts, settings, True)
        next(steps)  # prompts
        next(steps)
        passes = []
        while len(decoding.active) == num_prompts:
            with Crossings() as counted:
                try:
                    next(steps)
                except StopIteration:
                    break
            passes.append((counted.waits, counted.uploads, counted.places))
    complete = passes[:-1]
    assert len(complete) >= 2
    for waits, uploads, places in complete:
        assert waits <= 2, "".join(places)
        assert uploads <= 1
