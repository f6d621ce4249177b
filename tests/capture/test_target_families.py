"""Every target family: capture, teacher logits, five training steps, export, decoding identical to the target's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from specforge_lite.capture.base import check_capture
from specforge_lite.capture.hf import HfEngine
from specforge_lite.checkpoints.export import export_draft
from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.initialize import init_from_target, init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead, load_target_head
from specforge_lite.types import DraftBatch, TokenizedSample, collate
from tests.target_families import FAMILIES, HIDDEN, REMOTE_FAMILIES, VOCAB, save_family

AUX_LAYERS = (0, 1, 2)
NUM_STEPS = 5
# Families whose head is scaled, capped, tied or in a wrapper: what an EAGLE-1 draft sees the target through.
EAGLE1_FAMILIES = ("llama3", "gemma3", "cohere", "granite", "minicpm3", "minicpm4", "deepseek-v3", "qwen2.5-vl")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """family -> directory of its random model, each made once."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            made[family] = save_family(family, tmp_path_factory.mktemp("family") / family)
        return made[family]

    return directory


def open_engine(family: str, directory: Path) -> HfEngine:
    return HfEngine(str(directory), AUX_LAYERS, "float32", "cpu", trust_remote_code=family in REMOTE_FAMILIES)


def make_samples(lengths: tuple[int, ...] = (24, 17, 30)) -> list[TokenizedSample]:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        samples.append(TokenizedSample(f"s{number}", ids, torch.arange(length) > 4))
    return samples


def capture_batch(engine: HfEngine) -> DraftBatch:
    samples = make_samples()
    states = engine.capture(samples)
    for sample, captured in zip(samples, states):
        check_capture(sample, captured, engine.info)
    return collate(samples, [s.last_LH for s in states], [s.aux_LAH for s in states])


@torch.no_grad()
def logits_of(model: Any, ids_L: Tensor) -> Tensor:
    return model(input_ids=ids_L[None], use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_logits_and_final_norm_are_the_models_own(family: str, saved) -> None:
    engine = open_engine(family, saved(family))
    head = load_target_head(saved(family), engine.model.config)
    before_norm: list[Tensor] = []
    last_layer = engine.decoder.get_submodule("layers")[-1]
    last_layer.register_forward_hook(
        lambda module, inputs, output: before_norm.append(output[0] if isinstance(output, tuple) else output)
    )
    (sample,) = make_samples((24,))
    (states,) = engine.capture([sample])
    expected = logits_of(engine.model, sample.input_ids_L)
    torch.testing.assert_close(head.logits(states.last_LH), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.05  # a head that returned zeros would pass otherwise
    # vLLM hands over the state before the final norm
    torch.testing.assert_close(head.norm(before_norm[0][0]), states.last_LH, rtol=1e-5, atol=1e-5)
    assert (before_norm[0][0] - states.last_LH).abs().max() > 0.1
    table = engine.model.get_input_embeddings().weight
    assert torch.equal(head.embed(sample.input_ids_L), table[sample.input_ids_L])


def make_draft(algorithm: str, engine: HfEngine, directory: Path, head: TargetHead) -> Draft:
    config = DraftConfig.from_target(engine.model.config, VOCAB * 3 // 4, algorithm)
    config = config.replace(aux_layer_ids=AUX_LAYERS if algorithm == "eagle3" else None)
    ids = torch.arange(config.draft_vocab_size)
    t2d = torch.arange(config.vocab_size) < config.draft_vocab_size
    draft = build_draft(config, torch.zeros_like(ids), t2d)
    init_random(draft)
    init_from_target(draft, directory, engine.model.config, head)
    return draft


def train(draft: Draft, batch: DraftBatch, head: TargetHead) -> list[float]:
    """Mean loss of `NUM_STEPS` steps on one batch."""
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    settings = TTTSettings(num_steps=3 if draft.config.algorithm == "eagle3" else 1, noise=0.0)
    losses = []
    for _ in range(NUM_STEPS):
        output = draft(batch, head, settings)
        optimizer.zero_grad()
        (output.loss / output.counted_K[0]).backward()
        optimizer.step()
        losses.append(output.loss.item() / output.counted_K[0].item())
    return losses


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [(family, "eagle3") for family in FAMILIES] + [(family, "eagle1") for family in EAGLE1_FAMILIES],
)
def test_capture_train_export_decode(family: str, algorithm: str, saved, tmp_path: Path) -> None:
    directory = saved(family)
    engine = open_engine(family, directory)
    head = load_target_head(directory, engine.model.config)
    batch = capture_batch(engine)
    engine.close()
    draft = make_draft(algorithm, engine, directory, head)
    losses = train(draft, batch, head)
    assert losses[-1] < losses[0]
    exported = export_draft(draft, tmp_path / "draft", dtype="float32")

    model = SpeculativeModel.from_pretrained(
        str(directory), exported, dtype="float32", device="cpu", trust_remote_code=family in REMOTE_FAMILIES
    )
    for prompt, shape in zip(make_samples((12, 20)), (TreeShape(16, 4, 4), TreeShape.chain(3))):
        ids = prompt.input_ids_L
        output = model.speculative_generate(ids, max_new_tokens=20, shape=shape)
        expected = model.target.model.generate(ids[None], max_new_tokens=20, do_sample=False)
        assert output.answers[0].tokens == expected[0, len(ids) :].tolist()


def test_remote_code_runs_only_when_allowed(saved) -> None:
    with pytest.raises(ConfigError, match=r"target_model_path .*minicpm4"):
        HfEngine(str(saved("minicpm4")), AUX_LAYERS, "float32", "cpu", trust_remote_code=False)


def test_warm_start_copies_what_has_the_same_meaning(saved) -> None:
    """Fused and plain projections alike; experts, MLA and norms of another kind stay random and are named."""
    left = {}
    for family in ("llama3", "phi3", "glm4", "gpt-oss", "deepseek-v3", "gemma3", "cohere"):
        engine = open_engine(family, saved(family))
        head = load_target_head(saved(family), engine.model.config)
        draft = build_draft(
            DraftConfig.from_target(engine.model.config),
            torch.zeros(VOCAB, dtype=torch.int64),
            torch.ones(VOCAB, dtype=torch.bool),
        )
        left[family] = init_from_target(draft, saved(family), engine.model.config, head)
    assert left["llama3"] == left["phi3"] == []
    assert "midlayer.mlp.gate_proj" not in left["glm4"]
    assert {"midlayer.mlp.gate_proj", "midlayer.mlp.down_proj"} <= set(left["gpt-oss"])
    assert "midlayer.self_attn.k_proj" in left["deepseek-v3"]
    for family in ("gemma3", "cohere"):
        assert not [name for name in left[family] if "mlp" in name]


def test_phi3_halves_are_split_in_order(saved) -> None:
    engine = open_engine("phi3", saved("phi3"))
    config = engine.model.config
    draft = build_draft(
        DraftConfig.from_target(config), torch.zeros(VOCAB, dtype=torch.int64), torch.ones(VOCAB, dtype=torch.bool)
    )
    init_from_target(draft, saved("phi3"), config, load_target_head(saved("phi3"), config))
    layer = engine.decoder.get_submodule("layers")[-1]
    fused = layer.get_parameter("self_attn.qkv_proj.weight")  # 32 query rows, 16 key rows, 16 value rows
    for name, rows in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
        assert torch.equal(draft.get_parameter(f"midlayer.self_attn.{name}_proj.weight")[:, HIDDEN:], fused[rows])
    gate_up = layer.get_parameter("mlp.gate_up_proj.weight")
    assert torch.equal(draft.get_parameter("midlayer.mlp.gate_proj.weight"), gate_up[:48])
    assert torch.equal(draft.get_parameter("midlayer.mlp.up_proj.weight"), gate_up[48:])


@pytest.mark.parametrize(
    ("model_type", "values", "expected"),
    [  # (heads, key/value heads, head width, feed-forward width)
        (
            "deepseek_v3",
            {"hidden_size": 7168, "num_attention_heads": 128, "intermediate_size": 18432},
            (56, 8, 128, 18432),
        ),
        ("minicpm3", {"hidden_size": 2560, "num_attention_heads": 40, "intermediate_size": 6400}, (20, 4, 128, 6400)),
        (
            "gpt_oss",
            {"hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880},
            (64, 8, 64, 8640),
        ),
        (
            "qwen3_moe",
            {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
            (32, 4, 128, 6144),
        ),
        ("gpt2", {"n_embd": 768, "n_head": 12}, (12, 12, 64, 2304)),
    ],
)
def test_draft_shapes_of_full_size_targets(model_type: str, values: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = DraftConfig.from_target(transformers.AutoConfig.for_model(model_type, **values))
    found = (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size)
    assert found == expected


def test_longrope_factors_of_a_partly_rotated_target_are_left_out() -> None:
    """Phi-4-mini rotates 3/4 of each head, so it has 48 factors for heads of 128; the draft rotates all 64 pairs."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 48, "long_factor": [1.0] * 48, "partial_rotary_factor": 0.75,
    }  # fmt: skip
    sizes = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8}
    target = transformers.AutoConfig.for_model(
        "phi3", **sizes, rope_parameters=rope, max_position_embeddings=131072, original_max_position_embeddings=4096
    )
    assert DraftConfig.from_target(target).rope_scaling is None
    fitting = {**rope, "short_factor": [1.0] * 64, "long_factor": [1.0] * 64, "partial_rotary_factor": 1.0}
    target = transformers.AutoConfig.for_model(
        "phi3", **sizes, rope_parameters=fitting, max_position_embeddings=131072, original_max_position_embeddings=4096
    )
    kept = DraftConfig.from_target(target).rope_scaling
    assert kept is not None
    assert kept["rope_type"] == "longrope"
