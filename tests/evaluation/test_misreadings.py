"""A draft that a server reads wrong: the mistake is told from others by what is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_lite.capture.hf import load_target_model
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.hub import load_config, load_tokenizer
from specforge_lite.data.prompts import encode_prompt_file
from specforge_lite.evaluation import misreadings
from specforge_lite.evaluation.misreadings import RIGHT, likely_causes, misread_acceptance
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.model.target_head import load_target_head
from tests.doctor.test_verify_acceptance import write_answers
from tests.inference_drafts import random_draft
from tests.script_runner import run_in_process

Change = Callable[[Tensor], Tensor]
SETTINGS, SAMPLED = GenerationSettings(24), GenerationSettings(24, temperature=1.0, draft_sampling="sampled", seed=0)
# What reads the states that a norm scales.
READERS = {
    "midlayer.hidden_norm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "midlayer.post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "norm": ["lm_head"],
}


def replaced(source: Path, directory: Path, config: dict[str, Any], tensors: dict[str, Change]) -> Path:
    """A copy of a draft with other values of config.json and of tensors."""
    shutil.copytree(source, directory)
    stored = load_file(directory / "model.safetensors")
    stored |= {name: change(stored[name]).contiguous() for name, change in tensors.items()}
    save_file(stored, directory / "model.safetensors")
    values = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def columns(*order: int) -> Change:
    """The thirds of fc in another order."""
    return lambda weight: torch.cat([weight.chunk(3, dim=1)[place] for place in order], dim=1)


@pytest.fixture(scope="module")
def draft(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft that knows its answers by heart. Its norms are made far from one, as trained ones are, and the weights
    behind them scale back, so that it computes what it did."""
    root = tmp_path_factory.mktemp("misreadings")
    write_answers(root / "train.jsonl", tiny_target, range(24))
    words = [
        "--target-model-path", str(tiny_target), "--target-backend", "hf", "--target-dtype", "float32",
        "--train-data-path", str(root / "train.jsonl"), "--cache-dir", str(root / "cache"), "--output-dir",
        str(root / "run"), "--max-length", "128", "--ttt-length", "2", "--batch-size", "6", "--total-steps", "60",
        "--learning-rate", "3e-3", "--draft-vocab-size", "256", "--save-interval", "0", "--lr-schedule", "constant",
    ]  # fmt: skip
    assert run_in_process("train_eagle3_online", words) == 0
    export = ["--checkpoint", str(root / "run"), "--output-dir", str(root / "exported"), "--dtype", "float32"]
    assert run_in_process("export_draft", export) == 0
    torch.manual_seed(0)
    changes: dict[str, Change] = {}
    for norm, names in READERS.items():
        scale = torch.exp(torch.randn(128))
        changes[f"{norm}.weight"] = lambda weight, scale=scale: weight * scale  # type: ignore[misc]
        for name in names:
            full = name if name == "lm_head" else f"midlayer.{name}"
            changes[f"{full}.weight"] = (
                lambda weight, scale=scale: torch.cat(  # type: ignore[misc]
                    [weight[:, :-128], weight[:, -128:] / scale], dim=1
                )
            )
    return replaced(root / "exported", root / "draft", {}, changes)


@pytest.fixture(scope="module")
def decode(draft: Path, tiny_target: Path) -> Callable[..., Any]:
    """decode(directory, function): `function` of a model with that draft, the prompts and settings."""
    target = load_target_model(str(tiny_target), "float32", "cpu", False)
    tokenizer = load_tokenizer(str(tiny_target))
    prompts = [ids for _, ids in encode_prompt_file(draft.parent / "train.jsonl", 12, str(tiny_target))]

    def run(directory: Path, function: Any, settings: GenerationSettings = SETTINGS) -> Any:
        loaded = load_draft(directory, target.config, torch.float32)
        return function(SpeculativeModel(target, loaded, tokenizer, TreeShape.chain(2)), prompts, settings)

    return run


def accepted(model: SpeculativeModel, prompts: list[list[int]], settings: GenerationSettings) -> list[float]:
    return model.run(prompts, settings).stats.acceptance_per_position


@pytest.fixture(scope="module")
def misread(draft: Path, decode: Callable[..., Any]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = decode(draft, misread_acceptance)
    assert found[RIGHT][0] > 0.6  # of a draft that guesses nothing every reading accepts the same
    return found


def layers(*ids: int) -> dict[str, Any]:
    both = {"eagle_aux_hidden_state_layer_ids": [i + 1 for i in ids], "aux_layer_ids": ids}
    return both | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}


@pytest.mark.parametrize(
    ("cause", "config", "tensors"),
    [
        ("layer order: fc gets layers 6, 3, 0; it was made for 0, 3, 6", {}, {"fc.weight": columns(2, 1, 0)}),
        ("layer order: fc gets layers 3, 6, 0; it was made for 0, 3, 6", {}, {"fc.weight": columns(2, 0, 1)}),
        ("layer ids: 1, 4, 6 for 0, 3, 6, off by one", layers(1, 4, 6), {}),
        ("norm: midlayer.hidden_norm is left at one", {}, {"midlayer.hidden_norm.weight": torch.ones_like}),
        ("norm: midlayer.post_attention_layernorm is left at one", {},
         {"midlayer.post_attention_layernorm.weight": torch.ones_like}),
        ("norm: norm is left at one", {}, {"norm.weight": torch.ones_like}),
        ("norm: the state of the next step is taken after norm", {"norm_output": True}, {}),
        ("head: lm_head is left at random", {}, {"lm_head.weight": torch.randn_like}),
        ("d2t: draft ids are taken for target ids", {}, {"d2t": torch.zeros_like}),
    ],
)  # fmt: skip
def test_the_mistake_is_told_apart(
    draft: Path,
    decode: Callable[..., Any],
    misread: dict[str, list[float]],
    tmp_path: Path,
    cause: str,
    config: dict[str, Any],
    tensors: dict[str, Change],
) -> None:
    """What a server accepts is what our decoder accepts of a draft that was damaged on disk."""
    served = decode(replaced(draft, tmp_path / "draft", config, tensors), accepted)
    found = likely_causes(misread, served)
    assert cause in found, (served, misread)
    assert len({text.partition(":")[0] for text in found}) == 1 or max(served) < 0.05, (served, misread)


def test_the_targets_head_in_place_of_the_drafts_is_told(
    draft: Path, decode: Callable[..., Any], misread: dict[str, list[float]], tmp_path: Path, tiny_target: Path
) -> None:
    head_VH = load_target_head(tiny_target, load_config(tiny_target, False)).lm_head_VH
    rows = head_VH[load_draft(draft).target_ids]
    served = decode(replaced(draft, tmp_path / "draft", {}, {"lm_head.weight": rows.to}), accepted)
    found = likely_causes(misread, served)
    assert "head: the target's rows take the place of lm_head" in found, (served, misread)
    assert {text.partition(":")[0] for text in found} == {"head"} or max(served) < 0.05, (served, misread)


def test_a_state_that_is_taken_before_the_norm_is_told(
    draft: Path, decode: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft of EAGLE-3.1 that is served as one of EAGLE-3."""
    every = misreadings.misreadings
    monkeypatch.setattr(
        misreadings, "misreadings", lambda *parts: [each for each in every(*parts) if "next step" in each[0]]
    )
    found = decode(replaced(draft, tmp_path / "draft", {"norm_output": True}, {}), misread_acceptance)
    cause = "norm: the state of the next step is taken before norm"
    assert found.keys() == {RIGHT, cause}
    assert found[cause] == decode(draft, accepted)
    assert likely_causes(found, found[cause]) == [cause]


@pytest.mark.parametrize("ids", [(1, 3, 4), (0, 2, 4, 6)])
def test_layers_in_another_order_are_what_fc_and_its_norms_get(ids: tuple[int, ...]) -> None:
    """What the draft reads wrong is what it would compute of the layers that are named."""
    draft, parts = random_draft(aux_layer_ids=ids, fc_norm=True), torch.randn(len(ids), 5, 32)
    place_of = {str(layer): place for place, layer in enumerate(ids)}
    found = [each for each in misreadings.misreadings(draft, 8, torch.randn(100, 32)) if "layer order" in each[0]]
    assert len(found) == (5 if len(ids) == 3 else 1)
    for text, other in found:
        named = text.removeprefix("layer order: fc gets layers ").partition(";")[0].split(", ")
        wrong = torch.cat([parts[place_of[layer]] for layer in named], -1)
        assert torch.allclose(other.first_state(torch.cat([*parts], -1)), draft.first_state(wrong), atol=1e-5)


def test_layer_ids_off_by_one_keep_within_the_target() -> None:
    found = [
        (text, other.config.aux_layer_ids)
        for text, other in misreadings.misreadings(random_draft(aux_layer_ids=(1, 3, 6)), 8, torch.randn(100, 32))
        if text.startswith("layer ids")
    ]
    shifts = {"0, 2, 5": (0, 2, 5), "2, 4, 6": (2, 4, 6)}  # the last layer but one is the last that is captured
    assert found == [(f"layer ids: {text} for 1, 3, 6, off by one", ids) for text, ids in shifts.items()]


def test_an_eagle1_draft_may_get_state_and_embedding_the_other_way_round() -> None:
    draft, (state, embeds) = random_draft(algorithm="eagle1"), torch.randn(2, 1, 4, 32)
    found = dict(misreadings.misreadings(draft, 8, torch.randn(100, 32)))
    other = found.pop("layer order: fc gets the last state before the embedding")
    assert torch.allclose(other.layer_input(state, embeds)[0], draft.layer_input(embeds, state)[0], atol=1e-5)  # type: ignore[operator]
    assert {text.partition(":")[0] for text in found} == {"norm"}


def test_a_damaged_file_is_told_from_a_draft_that_learnt_little(
    draft: Path, decode: Callable[..., Any], misread: dict[str, list[float]], tmp_path: Path
) -> None:
    damaged = replaced(draft, tmp_path / "draft", {}, {"fc.weight": columns(1, 2, 0)})
    found = likely_causes(decode(damaged, misread_acceptance))
    assert "layer order: fc gets layers 3, 6, 0; it was made for 0, 3, 6" in found  # back to where they belong
    assert {text.partition(":")[0] for text in found} == {"layer order"}
    assert likely_causes(misread) == []


def test_no_mistake_is_named_for_what_none_explains(misread: dict[str, list[float]]) -> None:
    right = misread[RIGHT]
    assert likely_causes(misread, [right[0] - 0.1, right[1] - 0.1]) == []


def test_drafts_that_are_not_drawn_are_told_at_a_temperature(
    draft: Path, decode: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(misreadings, "misreadings", lambda *_: ())
    found = decode(draft, misread_acceptance, SAMPLED)
    (cause,) = found.keys() - {RIGHT}
    assert cause == "draft sampling: the most probable tokens are taken, not drawn ones"
    assert likely_causes(found, found[cause]) == [cause]
    assert found[cause][0] != pytest.approx(found[RIGHT][0], abs=0.01)
    assert decode(draft, misread_acceptance).keys() == {RIGHT}


@pytest.mark.parametrize(("name", "words"), [("auto", "OK"), ("llama3", "WARNING")])
def test_another_template_than_the_servers_is_named(
    draft: Path, tiny_target: Path, tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = json.loads((draft / "config.json").read_text())["specforge_lite"]
    recorded["config"]["data"]["chat_template"] = name
    other = replaced(draft, tmp_path / "draft", {"specforge_lite": recorded}, {})
    assert run_in_process("check_draft", [str(other), "--target-model-path", str(tiny_target)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "chat template" in line]
    assert any(words in line for line in lines), lines
