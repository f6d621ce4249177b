"""Speculative decoding against the target's own `generate`: whatever the draft, the text is the target's."""

from __future__ import annotations

import json
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from specforge_lite.capture.hf import load_target_model
from specforge_lite.checkpoints.export import export_draft
from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.evaluation.compare_generation import is_near_tie
from specforge_lite.inference import GenerationSettings, SpeculativeModel, TreeShape
from specforge_lite.inference.output import Metered
from specforge_lite.inference.target import ExactReplay, rounding_units
from tests.inference_drafts import random_draft
from tests.speculative_cases import CHAIN, CPU, PROMPTS, TREE, oracle_for, own_answer
from tests.target_families import FAMILIES, HIDDEN, VOCAB

# --------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("family", FAMILIES)
def test_any_target_family_and_a_draft_that_is_right_now_and_then(family: str, families) -> None:
    """Batch of prompts of different lengths. The draft's rank for the right token varies, so paths zigzag through the
    tree and the cache is compacted."""
    model = families(family)
    texts = [own_answer(model, prompt) for prompt in PROMPTS]
    draft = oracle_for(model, texts, rank_of=lambda position: (0, 1, 0, 3, 0, 2, 5)[position % 7])
    speculative = SpeculativeModel(model, draft)
    for shape in (CHAIN, TREE):
        output = speculative.speculative_generate(PROMPTS, max_new_tokens=32, shape=shape)
        assert [answer.all_tokens for answer in output.answers] == texts
        assert output.stats.tokens_per_pass > 1.5
    plain = speculative.generate(PROMPTS, max_new_tokens=32)
    assert [answer.all_tokens for answer in plain.answers] == texts


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle1"])
@pytest.mark.parametrize("shape", [CHAIN, TREE, TreeShape()], ids=["chain", "tree", "default tree"])
def test_random_drafts_on_the_shipped_target(tiny_target: Path, algorithm: str, shape: TreeShape) -> None:
    model = load_target_model(str(tiny_target), "float32", CPU, False)
    draft = random_draft(128, 4096, 500, algorithm=algorithm, max_position_embeddings=1024)
    speculative = SpeculativeModel(model, draft, shape=shape)
    prompt = [1, 400, 900, 30, 31, 77, 2, 10]
    output = speculative.speculative_generate(prompt, max_new_tokens=48)
    assert output.answers[0].all_tokens == own_answer(model, prompt, 48)


def test_text_prompts_on_the_shipped_target(tiny_target: Path, tmp_path: Path) -> None:
    """Several chats at once, through `from_pretrained` and an exported draft; equal to `generate` of each alone."""
    folder = export_draft(random_draft(128, 4096, 800, max_position_embeddings=1024), tmp_path / "draft")
    speculative = SpeculativeModel.from_pretrained(
        str(tiny_target), folder, total_token=16, depth=3, top_k=4, dtype="float32", device="cpu"
    )
    tokenizer, model = speculative.tokenizer, speculative.target.model
    questions = ["Tom has 3 apples and buys 5 more. How many has he?", "What is 7 times 8?", "Ann runs 4 miles a day."]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    output = speculative.speculative_generate(chats, max_new_tokens=40)
    for chat, answer in zip(chats, output.answers):
        assert answer.all_tokens == own_answer(model, tokenizer(chat)["input_ids"], 40)
        assert answer.text() == tokenizer.decode(answer.tokens, skip_special_tokens=True)
    assert output.sequences_BT.shape[0] == 3


@pytest.fixture(scope="module")
def two_hundred_answers(tiny_target: Path) -> tuple[Any, list[list[int]]]:
    """(the shipped target, prompt and 128 tokens for each of the first 200 questions of GSM8K)."""
    model = load_target_model(str(tiny_target), "float32", CPU, False)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_target)
    with resources.files("specforge_lite.assets").joinpath("prompts/gsm8k_test.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in islice(lines, 200)]
    prompts = [tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n")["input_ids"] for question in questions]
    return model, [own_answer(model, prompt, 128, eos_token_id=[]) for prompt in prompts]


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", [TreeShape.chain(5), TreeShape()], ids=["chain", "default tree"])
def test_two_hundred_prompts_of_128_tokens(two_hundred_answers: tuple[Any, list[list[int]]], shape: TreeShape) -> None:
    """Eight at once, with a draft that is right now and then."""
    model, texts = two_hundred_answers
    for first in range(0, 200, 8):
        eight = texts[first : first + 8]
        draft = oracle_for(model, eight, rank_of=lambda position: (0, 0, 1, 0, 3, 0, 9)[position % 7])
        output = SpeculativeModel(model, draft).speculative_generate(
            [text[:-128] for text in eight], max_new_tokens=128, shape=shape, eos_token_id=[]
        )
        assert [answer.all_tokens for answer in output.answers] == eight
        assert output.stats.tokens_per_pass > 1.5


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_draft_that_is_always_right(families, shape: TreeShape) -> None:
    """Every pass yields the longest path and the bonus token: the count of passes is known beforehand."""
    model = families("llama2")
    text = own_answer(model, PROMPTS[0], 32, eos_token_id=[])
    speculative = SpeculativeModel(model, oracle_for(model, [text], lambda position: 0))
    output = speculative.speculative_generate(PROMPTS[0], max_new_tokens=32, shape=shape, eos_token_id=[])
    assert output.answers[0].all_tokens == text
    per_pass = shape.longest_path + 1
    stats = output.stats
    assert stats.verification_passes == -(-31 // per_pass)  # the first token comes from the prompt's pass
    assert stats.target_forwards == stats.verification_passes + 1
    assert stats.acceptance_length == 32 / stats.verification_passes
    assert stats.accepted_at[0] == stats.verification_passes
    assert all(output.answers[0].drafted[i] != (i % per_pass == 0) for i in range(32))


def test_a_draft_that_is_never_right(families) -> None:
    model = families("qwen3")
    speculative = SpeculativeModel(model, oracle_for(model, [own_answer(model, PROMPTS[0])], lambda position: 9))
    output = speculative.speculative_generate(PROMPTS[0], max_new_tokens=32, shape=CHAIN)
    assert output.answers[0].all_tokens == own_answer(model, PROMPTS[0])
    assert output.stats.tokens_per_pass == 1.0
    assert output.stats.accepted_at == [0, 0, 0, 0]


# --------------------------------------------------------------------------------------------------------- near-ties


def test_near_ties_are_decided_by_the_targets_own_passes(families, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens with all but equal head rows, so that the argmax is decided by rounding again and again."""
    model = load_twin_model(families)
    texts = [own_answer(model, prompt, 40) for prompt in PROMPTS]
    draft = oracle_for(model, texts, lambda position: (0, 1)[position % 2])
    speculative = SpeculativeModel(model, draft)
    # Rounding of this machine may or may not flip one; a worse one certainly would.
    verify = speculative.target.verify

    def rounded(cache, tree):
        logits, features = verify(cache, tree)
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(len(cache.lengths)))
        return logits + noise * 40 * torch.finfo(torch.float32).eps * logits.abs().amax(), features

    monkeypatch.setattr(speculative.target, "verify", rounded)
    for shape in (CHAIN, TREE):
        output = speculative.speculative_generate(PROMPTS, max_new_tokens=40, shape=shape)
        assert [answer.all_tokens for answer in output.answers] == texts
        assert output.stats.near_ties > 10
        assert output.stats.near_ties_flipped > 0
    speculative.tie_units = 0.0
    output = speculative.speculative_generate(PROMPTS, max_new_tokens=40, shape=CHAIN)
    assert [answer.all_tokens for answer in output.answers] != texts  # so it was the replay that kept it exact
    assert output.stats.near_ties == 0


def test_the_margin_of_near_ties_is_what_the_target_shows(families) -> None:
    """A target whose logits move by 100 units in the last place where more than one row is read."""
    model = load_twin_model(families)
    settings = GenerationSettings(max_new_tokens=4, shape=CHAIN)
    draft = oracle_for(model, [own_answer(model, PROMPTS[0], 4)], lambda position: 0)
    steady = SpeculativeModel(model, draft)
    assert 0 < rounding_units(steady.target, PROMPTS[0]) < 100
    steady.run(PROMPTS[0], settings)
    assert steady.tie_units == 256

    def move(_module: Any, _inputs: Any, output: Any) -> None:
        if len(output.logits) > 1:
            output.logits += 100 * torch.finfo(torch.float32).eps * output.logits.abs().amax(-1, keepdim=True)

    handle = model.register_forward_hook(move)
    moved = SpeculativeModel(model, draft)
    assert rounding_units(moved.target, PROMPTS[0]) == pytest.approx(100, rel=0.3)
    moved.run(PROMPTS[0], settings)
    assert moved.tie_units == pytest.approx(800, rel=0.3)
    handle.remove()


def test_answers_that_differ_at_a_near_tie_are_told_from_others(families) -> None:
    model = load_twin_model(families)  # tokens i and i + 64 are twins
    speculative = SpeculativeModel(model, None)
    answer = own_answer(model, PROMPTS[0], 6)[len(PROMPTS[0]) :]
    twin, other = ([*answer[:3], (answer[3] + shift) % 128, 7] for shift in (64, 1))
    assert is_near_tie(speculative, PROMPTS[0], answer, twin)
    assert not is_near_tie(speculative, PROMPTS[0], answer, other)
    assert not is_near_tie(speculative, PROMPTS[0], answer, answer)


class DeviceEvent:
    """An event of a device that works 2 ms at a time, long after the calls that queue the work have returned."""

    queued = done = waits = 0.0

    def record(self, _stream: object) -> None:
        self.at = DeviceEvent.queued

    def query(self) -> bool:
        return self.at <= DeviceEvent.done

    def synchronize(self) -> None:
        DeviceEvent.waits += 1
        DeviceEvent.done = max(DeviceEvent.done, self.at)

    def elapsed_time(self, end: DeviceEvent) -> float:
        assert self.query()
        assert end.query()
        return end.at - self.at


class QueuedWork(Metered):
    device = torch.device("cpu")

    def mark(self) -> Any:
        event = DeviceEvent()
        event.record(None)
        return event


def test_a_networks_time_is_that_of_its_work_and_nothing_waits_for_it() -> None:
    network = QueuedWork()

    def work() -> None:
        with network.measured():
            DeviceEvent.queued += 2.0
        DeviceEvent.queued += 5.0  # of another network

    for _ in range(3):
        work()
    assert (DeviceEvent.waits, len(network._running)) == (0, 3)
    DeviceEvent.done = 8.0  # the first is done when the next one is queued
    work()
    assert (network._seconds, len(network._running)) == (pytest.approx(0.002), 3)
    assert network.seconds == pytest.approx(0.008)
    assert network.seconds == pytest.approx(0.008)
    assert not network._running


@pytest.mark.gpu
def test_a_networks_time_on_a_gpu_is_longer_than_its_launch() -> None:
    network = Metered()
    network.device = torch.device("cuda", 0)
    a = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    start = network.clock()
    with network.measured():
        for _ in range(10):
            a @ a
    launched = network.clock() - start
    assert network.seconds > 5 * launched


def load_twin_model(families) -> Any:
    import copy

    model = copy.deepcopy(families("llama2"))
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[64:] = weight[:64] * (1 + 2e-7)
    return model


def test_the_replay_is_generates_own_arithmetic(families) -> None:
    model = families("llama3")
    text = own_answer(model, PROMPTS[0], 12)
    target = SpeculativeModel(model, None).target
    ids = torch.tensor([PROMPTS[0]])
    scores = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    ).logits  # fmt: skip
    replay = ExactReplay(target)
    with torch.inference_mode():
        for step in (0, 3, 4, 11):  # skips some, as near-ties do
            logits = replay.logits_after(text[: len(PROMPTS[0]) + step], len(PROMPTS[0]))
            assert torch.equal(logits, scores[step][0])


# ------------------------------------------------------------------------------------------------- ends, streams, names


def test_every_way_to_end(families, tiny_target: Path) -> None:
    model = families("llama2")
    text = own_answer(model, PROMPTS[0], 30, eos_token_id=[])
    answer = text[len(PROMPTS[0]) :]
    speculative = SpeculativeModel(model, oracle_for(model, [text], lambda position: 0), shape=TREE)

    def run(**options: Any):
        return speculative.speculative_generate(PROMPTS[0], **options).answers[0]

    third = answer[7]
    first_place = answer.index(third)
    for eos in (third, [third], [3999, third]):
        stopped = run(max_new_tokens=30, eos_token_id=eos)
        assert (stopped.tokens, stopped.finish_reason) == (answer[: first_place + 1], "eos")
    for limit in (1, 2, 6, 7, 29):
        cut = run(max_new_tokens=limit, eos_token_id=[])
        assert (cut.tokens, cut.finish_reason) == (answer[:limit], "length")
    assert run(max_new_tokens=30, max_length=len(PROMPTS[0]) + 4, eos_token_id=[]).tokens == answer[:4]
    with pytest.raises(ConfigError, match=r"prompt 0 has 9 tokens; expected 1..8"):
        run(max_length=9)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        run(max_new_tokens=0)


def test_stop_strings_end_the_text_before_them(tiny_target: Path) -> None:
    speculative = SpeculativeModel.from_pretrained(str(tiny_target), dtype="float32", device="cpu")
    prompt = "<|im_start|>user\nWhat is 7 times 8?<|im_end|>\n<|im_start|>assistant\n"
    full = speculative.generate(prompt, max_new_tokens=40).answers[0]
    text = full.text()
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = speculative.generate(prompt, max_new_tokens=40, stop_strings=["never in there", stop]).answers[0]
    assert cut.finish_reason == "stop"
    assert cut.text() == text[: text.index(stop)]
    assert full.tokens[: len(cut.tokens)] == cut.tokens
    assert stop not in speculative.tokenizer.decode(cut.tokens[:-1])
    with pytest.raises(ConfigError, match="stop_strings: need a tokenizer"):
        SpeculativeModel(speculative.target.model, None).generate([1, 2], stop_strings="x")


def test_answers_of_a_batch_end_at_their_own_time(families) -> None:
    """Rows leave the batch one after another; the ones left are not disturbed."""
    model = families("mistral")
    texts = [own_answer(model, prompt, 40, eos_token_id=[]) for prompt in PROMPTS]
    eos = [text[len(prompt) + place] for text, prompt, place in zip(texts, PROMPTS, (3, 17, 30))]
    expected = [own_answer(model, prompt, 40, eos_token_id=eos) for prompt in PROMPTS]
    assert len({len(text) - len(prompt) for text, prompt in zip(expected, PROMPTS)}) > 1
    draft = oracle_for(model, texts, lambda position: (0, 1, 0)[position % 3])
    for shape in (CHAIN, TREE):
        output = SpeculativeModel(model, draft, shape=shape).speculative_generate(
            PROMPTS, max_new_tokens=40, eos_token_id=eos
        )
        assert [answer.all_tokens for answer in output.answers] == expected
        assert output.stats.num_tokens == sum(len(t) - len(p) for t, p in zip(expected, PROMPTS))


@pytest.mark.parametrize("speculate", [True, False])
def test_streams_add_up_to_the_answers(families, speculate: bool) -> None:
    model = families("qwen3")
    texts = [own_answer(model, prompt, 20) for prompt in PROMPTS]
    speculative = SpeculativeModel(model, oracle_for(model, texts, lambda position: position % 2), shape=TREE)
    streamed: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ended = {}
    for chunk in speculative.stream(PROMPTS, GenerationSettings(max_new_tokens=20), speculative=speculate):
        streamed[chunk.prompt_index] += chunk.tokens
        assert len(chunk.tokens) == len(chunk.drafted)
        ended[chunk.prompt_index] = chunk.finish_reason
    assert [prompt + streamed[i] for i, prompt in enumerate(PROMPTS)] == texts
    assert all(ended.values())


def test_the_names_and_results_of_eagle(families) -> None:
    model = families("llama2")
    speculative = SpeculativeModel(model, oracle_for(model, [own_answer(model, PROMPTS[0])], lambda position: 0))
    ids = torch.tensor([PROMPTS[0]])
    expected = own_answer(model, PROMPTS[0], 10)
    for call in (speculative.eagenerate, speculative.naivegenerate):
        assert call(ids, temperature=0.0, max_new_tokens=10).tolist() == [expected]
        output, new_tokens, index = call(ids, max_new_tokens=10, log=True)
        assert (output.tolist(), new_tokens) == ([expected], 10)
    assert index == 9


@pytest.mark.parametrize("form", ["flat", "nested", "tensor 1d", "tensor 2d", "list of tensors"])
def test_forms_of_prompts(families, form: str) -> None:
    model = families("llama2")
    prompt = PROMPTS[0]
    forms: dict[str, Any] = {
        "flat": prompt,
        "nested": [prompt],
        "tensor 1d": torch.tensor(prompt),
        "tensor 2d": torch.tensor([prompt]),
        "list of tensors": [torch.tensor(prompt)],
    }
    output = SpeculativeModel(model, None).generate(forms[form], max_new_tokens=5)
    assert output.new_tokens == [own_answer(model, prompt, 5)[len(prompt) :]]


def test_mistakes_are_named(families, tiny_target: Path, tmp_path: Path) -> None:
    model = families("llama2")
    with pytest.raises(CheckpointError, match=r"another target: target_hidden_size 64 != 32"):
        SpeculativeModel(model, random_draft(64, VOCAB, 60, aux_layer_ids=(0, 1, 2)))
    with pytest.raises(CheckpointError, match=r"vocab_size 100 != 128"):
        SpeculativeModel(model, random_draft(32, 100, 60, aux_layer_ids=(0, 1, 2)))
    with pytest.raises(ConfigError, match="aux_layer_ids"):
        SpeculativeModel(model, random_draft(32, VOCAB, 60, aux_layer_ids=(1, 3, 4)))
    plain = SpeculativeModel(model, None)
    with pytest.raises(ConfigError, match="no draft was loaded"):
        plain.speculative_generate([1, 2])
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        plain.generate("hello")
    with pytest.raises(ConfigError, match="prompt 0 has 0 tokens"):
        plain.generate([[]])
    folder = export_draft(random_draft(128, 4096, 60), tmp_path / "draft")
    with pytest.raises(ConfigError, match="use_eagle3=False"):
        SpeculativeModel.from_pretrained(str(tiny_target), folder, use_eagle3=False, device="cpu")


def test_a_target_with_a_recurrent_state_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=32, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="linear_attention"):
        SpeculativeModel(AutoModelForCausalLM.from_config(config), None)


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "shape", [TreeShape.chain(3), TreeShape(total_token=8, depth=2, top_k=3)], ids=["chain", "tree"]
)
def test_sampled_answers_follow_the_targets_distribution(shape: TreeShape) -> None:
    """The whole decoder, 900 answers of three tokens from a model of 6 tokens, against its exact probabilities."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    draft = random_draft(16, 6, 5, aux_layer_ids=(0, 1, 2))
    speculative = SpeculativeModel(model, draft, shape=shape)
    prompt, temperature = [1, 4, 2], 0.9
    num_answers, batch = 900, 300
    counts = torch.zeros(6, 6, 6)
    accepted = 0
    for seed in range(num_answers // batch):
        output = speculative.speculative_generate(
            [prompt] * batch, max_new_tokens=3, temperature=temperature, seed=seed, eos_token_id=[]
        )
        accepted += sum(output.stats.accepted_at)
        for a, b, c in output.new_tokens:
            counts[a, b, c] += 1
    assert accepted > num_answers / 4
    with torch.inference_mode():
        texts = torch.cartesian_prod(*[torch.arange(6)] * 2)
        logits = model(torch.cat([torch.tensor([prompt]).expand(36, -1), texts], 1)).logits[:, 2:] / temperature
        p = logits.softmax(-1).view(6, 6, 3, 6)
    expected = num_answers * p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]
    kept = expected >= 5
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    degrees = int(kept.sum())
    assert (statistic - degrees) / (2 * degrees) ** 0.5 < 4


def test_seeded_sampling_repeats_itself(families) -> None:
    model = families("llama2")
    speculative = SpeculativeModel(model, random_draft(HIDDEN, VOCAB, 60, aux_layer_ids=(0, 1, 2)), shape=TREE)

    def run(seed: int):
        return speculative.speculative_generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed).new_tokens

    assert run(1) == run(1)
    assert run(1) != run(2)
