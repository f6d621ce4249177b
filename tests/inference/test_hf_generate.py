"""Batched generation against one prompt at a time with transformers' own defaults, and sampling against its law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specforge_lite.inference import hf_generate
from specforge_lite.inference.hf_generate import (
    GenerationRequest,
    SeededSampler,
    eos_token_ids_of,
    generate_batch,
    uniform,
)

EOS = [2, 0]


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(tiny_target: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    questions = [
        "Tom has 3 apples and buys 4 more. How many apples does he have?",
        "A train runs 60 miles in one hour. How far does it run in 3 hours? Explain.",
        "What is 2 + 2?",
        "Anna reads 5 pages a day. How many pages does she read in a week? Then she reads 10 more.",
        "Bob sells 12 cakes at $3 each. How much money does he make?",
    ]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in questions
    ]


def plain_greedy(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """No cache, no padding: the whole prefix again for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in EOS:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("rule", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}])
def test_rules_of_the_generation_config_are_those_of_each_prompt_alone(
    tiny_target: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    """The padding is an end token here: a penalty on it, or a length with it, would move the end of an answer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    model.generation_config.update(**rule)
    monkeypatch.setattr(hf_generate, "SEGMENT_TOKENS", 7)
    results = generate_batch(model, [GenerationRequest(p, 40) for p in prompts], EOS, pad_token_id=EOS[0])
    plain = []
    for prompt, result in zip(prompts, results):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        assert result.token_ids == whole[0, len(prompt) :].tolist()
        plain.append(plain_greedy(model, prompt, 40))
    assert plain != [result.token_ids for result in results]  # the rule changes something


def test_greedy_equals_one_by_one_across_segments(
    target: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_generate, "SEGMENT_TOKENS", 7)
    monkeypatch.setattr(hf_generate, "CACHE_SLACK_TOKENS", 5)
    lengths = [40, 3, 40, 21, 40]
    requests = [GenerationRequest(p, n) for p, n in zip(prompts, lengths)]
    results = generate_batch(target, requests, EOS)
    for prompt, length, result in zip(prompts, lengths, results):
        assert result.token_ids == plain_greedy(target, prompt, length)
        assert result.finish_reason == ("stop" if result.token_ids[-1] in EOS else "length")
    assert len(results[1].token_ids) == 3


def test_end_token_is_kept_and_ends_the_answer(target: Any, prompts: list[list[int]]) -> None:
    (free,) = generate_batch(target, [GenerationRequest(prompts[0], 30)], [])
    assert free.finish_reason == "length"
    end = free.token_ids[10]
    first = free.token_ids.index(end)
    (ended, other) = generate_batch(target, [GenerationRequest(p, 30) for p in prompts[:2]], [end])
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.finish_reason == "stop"
    assert other.token_ids.count(end) <= 1


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "lfm2", "qwen3_next", "jamba"])
def test_other_cache_layouts(family: str) -> None:
    """Sliding windows shorter than the answer, learned positions, and states of convolutions and linear attention, with
    rows leaving the batch."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 97, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4}
    if family == "gpt2":
        config = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=128)
    elif family == "lfm2":
        config = AutoConfig.for_model(family, **shape, num_key_value_heads=2, intermediate_size=48, full_attn_idxs=[1])
    elif family == "jamba":
        config = AutoConfig.for_model(
            family,
            **shape,
            num_key_value_heads=2,
            intermediate_size=48,
            num_experts=2,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
            attn_layer_period=3,
            attn_layer_offset=1,
        )
    elif family == "qwen3_next":
        linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        shape |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
        config = AutoConfig.for_model(
            family, **shape, **linear, **experts, linear_value_head_dim=8, shared_expert_intermediate_size=16
        )
    else:
        shape |= {"head_dim": 8, "intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 8}
        config = AutoConfig.for_model(
            family, **shape, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22]]
    lengths = [50, 35, 4]
    results = generate_batch(model, [GenerationRequest(p, n) for p, n in zip(prompts, lengths)], EOS)
    for prompt, length, result in zip(prompts, lengths, results):
        assert result.token_ids == plain_greedy(model, prompt, length)


def test_the_prompt_runs_once_however_many_segments_follow(
    target: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values stay between segments, for the rows that go on as well."""
    monkeypatch.setattr(hf_generate, "SEGMENT_TOKENS", 4)
    shapes: list[tuple[int, int]] = []
    hook = target.register_forward_pre_hook(
        lambda _m, _args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    try:
        generate_batch(target, [GenerationRequest(p, n) for p, n in zip(prompts, (12, 3, 9, 12, 6))], [])
    finally:
        hook.remove()
    rows = [5] * 4 + [4] * 4 + [3] * 4  # the request of 3 tokens leaves after the first segment, that of 6 after two
    assert shapes == [(5, max(map(len, prompts))), *((count, 1) for count in rows[1:])]


def test_sampling_depends_on_the_seed_only(target: Any, prompts: list[list[int]]) -> None:
    requests = [GenerationRequest(p, 24, temperature=1.0, top_p=0.9, seed=i) for i, p in enumerate(prompts)]
    together = generate_batch(target, requests, EOS)
    alone = [generate_batch(target, [r], EOS)[0] for r in reversed(requests)][::-1]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    (other,) = generate_batch(target, [GenerationRequest(prompts[0], 24, temperature=1.0, seed=99)], EOS)
    assert other.token_ids != together[0].token_ids


def test_greedy_and_sampled_rows_share_a_batch(target: Any, prompts: list[list[int]]) -> None:
    mixed = [GenerationRequest(prompts[0], 20), GenerationRequest(prompts[1], 20, temperature=1.0, seed=1)]
    greedy, sampled = generate_batch(target, mixed, EOS)
    assert greedy.token_ids == plain_greedy(target, prompts[0], 20)
    assert sampled.token_ids != plain_greedy(target, prompts[1], 20)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_sampler_follows_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 0.0, 1.5, -1.0, 1.0])
    num_draws = 20_000
    requests = [GenerationRequest([1], 1, temperature, top_p, seed=i) for i in range(num_draws)]
    left = SeededSampler(requests, [0] * num_draws)(torch.zeros(num_draws, 1), logits.repeat(num_draws, 1))
    counts = torch.bincount(left.argmax(dim=1), minlength=5)
    assert int(torch.isfinite(left).sum()) == num_draws
    expected = torch.softmax(logits / temperature, dim=0)
    if top_p < 1:  # 0.8: by hand, the likeliest tokens 0, 2, 4 have 0.41 + 0.28 + 0.19 = 0.88
        expected[[1, 3]] = 0
        assert counts[1] == counts[3] == 0
    expected = expected / expected.sum()
    error = (expected * (1 - expected) / num_draws).sqrt()
    assert ((counts / num_draws - expected).abs() <= 4 * error + 1e-9).all()


def test_tiny_top_p_is_greedy() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.9]])
    for seed in range(50):
        sampler = SeededSampler([GenerationRequest([1], 1, 1.0, 0.01, seed)], [0])
        assert int(sampler(torch.zeros(1, 1), logits).argmax()) == 1


def test_uniform_numbers() -> None:
    numbers = torch.tensor([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert 0 <= numbers.min() < numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert len(numbers.unique()) > 9900


def test_end_tokens_of_a_model(target: Any, tiny_target: Path) -> None:
    assert eos_token_ids_of(target, AutoTokenizer.from_pretrained(tiny_target)) == [2, 0]
    config = transformers.LlamaConfig(vocab_size=10, hidden_size=8, num_attention_heads=2, num_hidden_layers=1,
                                      intermediate_size=8, eos_token_id=7)  # fmt: skip
    assert eos_token_ids_of(AutoModelForCausalLM.from_config(config), None) == [7]


def test_impossible_requests(target: Any) -> None:
    assert generate_batch(target, [], EOS) == []
    for request in (GenerationRequest([], 5), GenerationRequest([1], 0)):
        with pytest.raises(ValueError, match="at least one"):
            generate_batch(target, [request], EOS)
