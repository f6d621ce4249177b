"""Speculative decoding against the target's own `generate`: whatever the draft, the text is the target's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import embedding, scaled_dot_product_attention

from specforge_lite.engines.hf import load_target_model
from specforge_lite.errors import CheckpointError, ConfigError
from specforge_lite.export import export_draft
from specforge_lite.inference import GenerationSettings, SpeculativeModel, TreeShape
from specforge_lite.inference.decode import Decoding
from specforge_lite.inference.drafter import Drafter
from specforge_lite.inference.fused import FusedStep, step_of
from specforge_lite.inference.output import StopRules
from specforge_lite.inference.target import ExactReplay
from specforge_lite.inference.verify import Sampling
from tests.inference_drafts import OracleDraft, random_draft
from tests.target_families import FAMILIES, HIDDEN, REMOTE_FAMILIES, VOCAB, save_family

CHAIN, TREE = TreeShape.chain(4), TreeShape(total_token=20, depth=3, top_k=4)
CPU = torch.device("cpu")
PROMPTS = [[5, 17, 9, 33, 21, 8, 60, 2, 11], [7, 8, 9], [90, 100, *range(3, 26)]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory):
    """Tiny models by family, loaded once."""
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            folder = save_family(family, tmp_path_factory.mktemp(family))
            loaded[family] = load_target_model(str(folder), "float32", CPU, family in REMOTE_FAMILIES)
        return loaded[family]

    return get


def own_answer(model: Any, prompt: list[int], max_new_tokens: int = 32, **options: Any) -> list[int]:
    """The oracle: transformers' greedy `generate`, prompt included."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
    )
    return output[0].tolist()


def oracle_for(model: Any, texts: list[list[int]], rank_of) -> OracleDraft:
    return OracleDraft(model.get_input_embeddings().weight, texts, rank_of)


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


# ------------------------------------------------------------------------------------------------ the draft's cache


def watched(speculative: SpeculativeModel, prompts: list[list[int]], shape: TreeShape, check) -> Decoding:
    """Decode 12 tokens; `check(text, tree, row)` sees every tree of every row with the text accepted before it."""
    rules = StopRules(max_new_tokens=12)
    decoding = Decoding(speculative.target, prompts, rules, Sampling(), None, None, tie_units=256)
    drafter = speculative.drafter
    assert drafter is not None
    propose = drafter.propose

    def checked(root_B, shape):
        tree = propose(root_B, shape)
        for row, index in enumerate(decoding.active):
            check(decoding.answers[index].all_tokens, tree, row)
        return tree

    drafter.propose = checked  # type: ignore[method-assign]
    try:
        with torch.inference_mode():
            for _chunks in decoding.speculative(drafter, shape):
                pass
    finally:
        drafter.propose = propose  # type: ignore[method-assign]
    return decoding


class DenseDraft:
    """The draft without a cache: everything is recomputed from the text with one full causal attention."""

    def __init__(self, speculative: SpeculativeModel) -> None:
        self.draft, self.target = speculative.drafter.draft, speculative.target
        self.head = speculative.drafter.head

    def features(self, text: list[int]) -> torch.Tensor:
        output = self.target.model(torch.tensor([text]), output_hidden_states=True)
        if self.target.last_state:
            return output.hidden_states[-1]
        return torch.cat([output.hidden_states[i + 1] for i in self.target.aux_layer_ids], -1)

    def log_probs(self, text: list[int], path: list[int]) -> torch.Tensor:
        """After `text` and a drafted `path`: log-probabilities of the next token, [V] with -inf outside the draft's."""
        states = self.draft.first_state(self.features(text[:-1]))
        tokens = text[1:] + path
        for depth in range(len(path) + 1):
            inputs = torch.tensor([tokens[: len(text) - 1 + depth]])
            embeds = embedding(inputs, self.target.embedding_VH)
            positions = torch.arange(inputs.shape[1])[None]

            def attend(q, k, v):
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
                return scaled_dot_product_attention(q, k, v, is_causal=True)

            out, head_in = self.draft.step(states, embeds, positions, attend)
            states = torch.cat([states, out[:, -1:]], 1)
        logits = self.head(head_in[0, -1]).log_softmax(-1)
        full = torch.full((self.draft.config.vocab_size,), -torch.inf)
        full[torch.arange(len(logits)) + self.draft.d2t] = logits
        return full


def small_case(families, algorithm: str, family: str = "llama2", **options: Any) -> SpeculativeModel:
    draft = random_draft(HIDDEN, VOCAB, 60, algorithm=algorithm, aux_layer_ids=(0, 1, 2), seed=3, **options)
    return SpeculativeModel(families(family), draft)


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle1"])
def test_chains_are_those_of_a_draft_without_a_cache(families, algorithm: str) -> None:
    """Two texts of different lengths; every drafted token is the argmax of the uncached computation."""
    speculative = small_case(families, algorithm)
    dense = DenseDraft(speculative)
    checked = []

    def check(text, tree, row) -> None:
        tokens = tree.tokens_BQ[row].tolist()
        assert tokens[0] == text[-1]
        for depth in range(1, len(tokens)):
            scores = dense.log_probs(text, tokens[1:depth])
            assert float(scores.max() - scores[tokens[depth]]) < 1e-4
        checked.append(len(text))

    watched(speculative, PROMPTS[:2], CHAIN, check)
    assert len(checked) >= 10


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle1"])
@pytest.mark.parametrize("norm_output", [False, True])
def test_trees_are_those_of_a_plain_search_without_a_cache(families, algorithm: str, norm_output: bool) -> None:
    """EAGLE-2's search written plainly: same nodes, for every step of two texts."""
    options = {"norm_output": True, "fc_norm": True} if norm_output and algorithm == "eagle3" else {}
    speculative = small_case(families, algorithm, **options)
    dense = DenseDraft(speculative)
    shape = TreeShape(total_token=8, depth=2, top_k=3)
    checked = []

    def search(text: list[int]) -> set[tuple[int, ...]]:
        pool: list[tuple[float, tuple[int, ...]]] = []
        frontier: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for _level in range(shape.depth + 1):
            children = []
            for score, path in frontier:
                best = dense.log_probs(text, list(path)).topk(shape.top_k)
                children += [(score + v, (*path, i)) for v, i in zip(best.values.tolist(), best.indices.tolist())]
            pool += children
            frontier = sorted(children, reverse=True)[: shape.top_k]
        return {path for _, path in sorted(pool, reverse=True)[: shape.total_token - 1]}

    def check(text, tree, row) -> None:
        if len(checked) >= 8:
            return
        tokens, seen = tree.tokens_BQ[row].tolist(), tree.ancestors_BQQ[row]
        paths = {tuple(tokens[j] for j in seen[i].nonzero().flatten().tolist()[1:]) for i in range(1, len(tokens))}
        assert paths == search(text)
        checked.append(text)

    watched(speculative, PROMPTS[:2], shape, check)
    assert len(checked) == 8


@pytest.mark.parametrize("options", [{}, {"norm_output": True, "fc_norm": True}, {"target_hidden_size": 48}])
def test_the_fused_step_equals_the_drafts_own(options: dict) -> None:
    """Also after the table of positions has grown, and with the fused matrices behind the draft's own parameters."""
    draft, oracle = random_draft(**options), random_draft(**options)
    step = step_of(draft)
    assert isinstance(step, FusedStep)
    for first, last in ((0, 5), (290, 300)):
        positions = torch.arange(first, last).expand(2, -1)
        state, embeds = torch.randn(2, last - first, 32), torch.randn(2, last - first, 32)

        def attend(q, k, v):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        step.cover(last, CPU, torch.float32)
        torch.testing.assert_close(
            step(state, embeds, positions, attend), oracle.step(state, embeds, positions, attend)
        )
    torch.testing.assert_close(
        draft.step(state, embeds, positions, attend), oracle.step(state, embeds, positions, attend)
    )
    draft.requires_grad_(True)
    assert step_of(draft) == draft.step  # a draft in training keeps its parameters


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_true_rows_are_computed_once(families, shape: TreeShape) -> None:
    """The draft reads every position of the text once, and none again: prompt plus answer, less the last tokens that no
    proposal needed."""
    model = families("qwen2")
    texts = [own_answer(model, prompt, 30) for prompt in PROMPTS]
    draft = oracle_for(model, texts, lambda position: (0, 1, 0, 2, 9)[position % 5])
    speculative = SpeculativeModel(model, draft)
    rows_of: dict[int, int] = {}

    def check(text, tree, row) -> None:
        assert speculative.drafter.cache.lengths[row] == len(text) - 1  # row t for every token but the last
        rows_of[tuple(text[:3])] = len(text) - 1

    rows_before = speculative.drafter.num_true_rows
    watched(speculative, PROMPTS, shape, check)
    assert speculative.drafter.num_true_rows - rows_before == sum(rows_of.values())

    answers = speculative.speculative_generate(PROMPTS, max_new_tokens=30, shape=shape)
    assert answers.stats.draft_true_rows <= sum(len(text) - 1 for text in texts)


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
    with pytest.raises(ConfigError, match="stop strings need a tokenizer"):
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


def test_the_drafter_counts_its_rows(families) -> None:
    speculative = small_case(families, "eagle3")
    drafter = speculative.drafter
    assert isinstance(drafter, Drafter)
    stats = speculative.speculative_generate(PROMPTS[1], max_new_tokens=6, shape=CHAIN, eos_token_id=[]).stats
    passes = stats.verification_passes
    assert stats.draft_speculative_rows == passes * (CHAIN.longest_path - 1)
    assert (
        stats.draft_forwards == passes * CHAIN.longest_path
    )  # of these one reads the prompt, the last pass's reads none
