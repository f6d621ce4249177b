"""The hf engine against transformers' own `output_hidden_states`, on random tiny models of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from specforge_lite.capture.base import check_aux_layer_ids, check_capture, default_aux_layer_ids
from specforge_lite.capture.hf import HfEngine, length_buckets, length_group
from specforge_lite.checkpoints.draft_files import unnamed_aux_layer_ids
from specforge_lite.core.errors import CaptureError, ConfigError
from specforge_lite.types import TokenizedSample

VOCAB, HIDDEN, LAYERS, POSITIONS = 97, 32, 5, 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def family_config(family: str) -> Any:
    if family == "gpt2":
        return AutoConfig.for_model(
            "gpt2",
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=4,
            n_positions=POSITIONS,
            bos_token_id=1,
            eos_token_id=2,
        )
    if family == "gemma3":  # multimodal: text decoder below a wrapper, vision tower with the same number of layers
        text = {**SMALL, "model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8}
        return transformers.Gemma3Config(
            text_config=text, vision_config={**VISION, "model_type": "siglip_vision_model"}, mm_tokens_per_image=4
        )
    if family == "mistral3":
        return transformers.Mistral3Config(
            text_config={**SMALL, "model_type": "mistral"}, vision_config={**VISION, "model_type": "pixtral"}
        )
    extra: dict[str, Any] = {}
    if family == "qwen3_moe":
        extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if family == "gpt_oss":
        extra = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    return AutoConfig.for_model(family, **SMALL, **extra)


def save_random_model(config: Any, directory: Path) -> Path:
    torch.manual_seed(0)
    architecture = {"mistral3": "Mistral3ForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration"}
    if config.model_type in architecture:
        model = getattr(transformers, architecture[config.model_type])(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(family_config("llama"), tmp_path_factory.mktemp("llama"))


def make_sample(name: str, length: int, seed: int = 0) -> TokenizedSample:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids = torch.randint(3, VOCAB, (length,), generator=generator)
    return TokenizedSample(name, ids, torch.ones(length, dtype=torch.bool))


def oracle(model: Any, sample: TokenizedSample, aux_layer_ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Aux [L, A, H] and last [L, H] from the full model, one unpadded sample at a time."""
    with torch.no_grad():
        output = model(input_ids=sample.input_ids_L[None], output_hidden_states=True, use_cache=False)
    aux = torch.stack([output.hidden_states[i + 1][0] for i in aux_layer_ids], dim=1)
    return aux, output.hidden_states[-1][0]


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral", "gemma3", "mistral3", "gpt2", "qwen3_moe", "gpt_oss", "phi3"]
)
def test_equal_to_output_hidden_states(family: str, tmp_path: Path) -> None:
    engine = HfEngine(str(save_random_model(family_config(family), tmp_path)), aux_layer_ids=(0, 2, 3), dtype="float32")
    samples = [make_sample(f"s{n}", n) for n in (17, 5, 31, 16, 1)]
    captured = engine.capture(samples)
    assert [c.sample_id for c in captured] == [s.sample_id for s in samples]
    for sample, states in zip(samples, captured):
        check_capture(sample, states, engine.info)
        aux, last = oracle(engine.model, sample, (0, 2, 3))
        torch.testing.assert_close(states.aux_LAH, aux, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states.last_LH, last, rtol=1e-5, atol=1e-5)
        assert states.last_is_normed
        assert not states.aux_LAH.requires_grad
    engine.close()
    engine.close()


def test_last_state_times_head_gives_the_logits(llama: Path) -> None:
    engine = HfEngine(str(llama), dtype="float32")
    sample = make_sample("s", 20)
    (states,) = engine.capture([sample])
    with torch.no_grad():
        logits = engine.model(input_ids=sample.input_ids_L[None]).logits[0]
    torch.testing.assert_close(engine.model.lm_head(states.last_LH), logits, rtol=1e-5, atol=1e-5)


def test_head_is_never_called_and_only_chosen_layers_are_hooked(llama: Path) -> None:
    engine = HfEngine(str(llama), aux_layer_ids=(1, 2, 3))
    calls: list[int] = []
    engine.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    engine.capture([make_sample("s", 9)])
    assert calls == []
    hooked = [i for i, layer in enumerate(engine.model.model.layers) if layer._forward_hooks]
    assert hooked == [1, 2, 3]


def test_independent_of_the_batch(llama: Path) -> None:
    engine = HfEngine(str(llama), dtype="float32")
    samples = [make_sample(f"s{i}", 3 + 7 * i % 50, seed=i) for i in range(12)]
    together = engine.capture(samples)
    for sample, states in zip(samples, together):
        (alone,) = engine.capture([sample])
        torch.testing.assert_close(states.aux_LAH, alone.aux_LAH, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states.last_LH, alone.last_LH, rtol=1e-5, atol=1e-5)
        assert states.aux_LAH.untyped_storage().nbytes() == states.aux_LAH.numel() * 4  # not a view of the batch


def test_states_can_be_trained_on(llama: Path) -> None:
    (states,) = HfEngine(str(llama), dtype="float32").capture([make_sample("s", 9)])
    weight = torch.ones(3 * HIDDEN, 2, requires_grad=True)
    (states.aux_LAH.flatten(1) @ weight).sum().backward()
    assert weight.grad is not None


def test_default_aux_layers_are_told(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = HfEngine(str(llama))
    assert engine.info.aux_layer_ids == (0, 2, 3)
    assert "collapse on 5 layers; using (0, 2, 3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_layers", "ids"),
    [(3, (0, 1)), (4, (0, 1, 2)), (5, (0, 2, 3)), (6, (0, 2, 4)), (8, (0, 3, 6)), (11, (0, 4, 9)), (12, (1, 5, 8)),
     (30, (1, 14, 26)), (32, (1, 15, 28))],
)  # fmt: skip
def test_default_aux_layers_of_a_depth(num_layers: int, ids: tuple[int, ...]) -> None:
    assert default_aux_layer_ids(num_layers)[0] == ids == check_aux_layer_ids(ids, num_layers)


def test_a_draft_that_names_no_layers_reads_what_engines_give_it() -> None:
    assert unnamed_aux_layer_ids(8) == (1, 3, 4)  # not the default that new drafts are trained with
    assert unnamed_aux_layer_ids(32) == (1, 15, 28)
    assert unnamed_aux_layer_ids(5) == (0, 2, 3)


def test_user_mistakes(llama: Path, tmp_path: Path) -> None:
    engine = HfEngine(str(llama))
    with pytest.raises(
        CaptureError, match=f"sample long has {POSITIONS + 1} tokens, the target accepts 1 to {POSITIONS}"
    ):
        engine.capture([make_sample("ok", 4), make_sample("long", POSITIONS + 1)])
    wrong = TokenizedSample("w", torch.tensor([5, VOCAB]), torch.ones(2, dtype=torch.bool))
    with pytest.raises(CaptureError, match=f"sample w: token ids .*{VOCAB}, the vocabulary is 0..{VOCAB - 1}"):
        engine.capture([wrong])
    with pytest.raises(ConfigError, match="aux_layer_ids"):
        HfEngine(str(llama), aux_layer_ids=(1, 4))
    with pytest.raises(ConfigError, match="target_model_path"):
        HfEngine(str(tmp_path / "nothing"))
    assert len(engine.capture([make_sample("ok", POSITIONS)])) == 1


def test_buckets_bound_padding_and_tokens() -> None:
    assert length_buckets([10, 9, 2, 10, 2]) == [[0, 3, 1], [2, 4]]
    assert length_buckets([9000, 9000, 100]) == [[0], [1], [2]]
    buckets = length_buckets([10, 12, 9, 13], lambda length: int(length > 10))
    assert buckets == [[3, 1], [0, 2]]


def test_length_dependent_rope_is_kept_apart() -> None:
    config = family_config("llama")
    assert length_group(config)(5) == length_group(config)(63)
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 1e4}
    group = length_group(config)
    assert group(16) == group(3) != group(17) == group(60)
    config.rope_parameters = {"rope_type": "dynamic", "original_max_position_embeddings": 16, "rope_theta": 1e4}
    group = length_group(config)
    assert group(16) == group(3) != group(17) != group(18)
