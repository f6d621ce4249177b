"""What a draft path may be, and a config.json that says little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from specforge_lite.checkpoints.contract import check_draft
from specforge_lite.checkpoints.draft_files import read_draft_config
from specforge_lite.checkpoints.export import export_draft
from specforge_lite.checkpoints.loading import find_draft, load_draft
from specforge_lite.core.errors import CheckpointError, ConfigError, SpecforgeError
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.registry import build_draft
from tests.checkpoints.test_load_draft import same_weights, write_checkpoint
from tests.eagle_states import write_deepspeed_state
from tests.inference_drafts import random_draft, random_vocabulary

SHORT = {"hidden_size": 128, "num_hidden_layers": 1, "draft_vocab_size": 300, "length": 7}


@pytest.fixture(scope="module")
def target_config(tiny_target: Path) -> Any:
    return AutoConfig.from_pretrained(tiny_target)


def fitting_draft(target_config: Any) -> Draft:
    config = DraftConfig.from_target(target_config, 300).replace(aux_layer_ids=None)
    torch.manual_seed(1)
    return build_draft(config, *random_vocabulary(300, 4096)).eval().requires_grad_(False)


def test_the_output_of_a_run_is_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    first, second = random_draft(seed=1), random_draft(seed=2)
    write_checkpoint(tmp_path / "run" / "step_3", first, 3)
    write_checkpoint(tmp_path / "run" / "step_12", second, 12)
    (tmp_path / "run" / "step_20").mkdir()  # a save that was interrupted
    assert same_weights(load_draft(tmp_path / "run"), second)
    assert same_weights(load_draft(tmp_path / "run" / "step_3"), first)


def test_epochs_of_other_trainers(tmp_path: Path) -> None:
    drafts = {name: random_draft(seed=seed) for seed, name in enumerate(("epoch_2", "epoch_10", "epoch_9_step_700"))}
    for name, draft in drafts.items():
        export_draft(draft, tmp_path / name, dtype="float32")
    assert find_draft(tmp_path) == tmp_path / "epoch_10"
    assert same_weights(load_draft(tmp_path / "epoch_2"), drafts["epoch_2"])


@pytest.mark.parametrize("name", ["run", "run/state_3", "run/state_3/pytorch_model.bin"])
def test_states_of_eagle(tmp_path: Path, target_config: Any, name: str) -> None:
    draft = fitting_draft(target_config)
    write_deepspeed_state(tmp_path / "run" / "state_0", fitting_draft(target_config).half(), torch.float32)
    write_deepspeed_state(tmp_path / "run" / "state_3", draft, torch.float32)
    assert same_weights(load_draft(tmp_path / name, target_config), draft)


@pytest.mark.parametrize("config", [SHORT, {**SHORT, "rms_norm_eps": 0.25}])
def test_a_short_config_is_completed_from_the_target(tmp_path: Path, target_config: Any, config: dict) -> None:
    draft = fitting_draft(target_config)
    save_file({name: t.contiguous() for name, t in draft.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_draft(tmp_path, target_config)
    assert same_weights(loaded, draft)
    assert loaded.config.rms_norm_eps == config.get("rms_norm_eps", target_config.rms_norm_eps)
    assert loaded.config.rope_theta == draft.config.rope_theta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, r"num_hidden_layers 4: expected 1"),
        ({"draft_vocab_size": 9000}, r"draft_vocab_size 9000 is not in 1..vocab_size 4096"),
        ({"draft_vocab_size": 200}, r"d2t names target ids .* with 300 entries; expected .* 200 entries"),
        ({"num_attention_heads": 5, "head_dim": 32}, r"num_attention_heads 5 is not a multiple"),
        ({"intermediate_size": 77}, r"gate_proj.weight has shape .*config.json makes it \(77, 128\)"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, target_config: Any, change: dict, message: str) -> None:
    draft = fitting_draft(target_config)
    save_file({name: t.contiguous() for name, t in draft.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**SHORT, "num_key_value_heads": 2, **change}))
    with pytest.raises(SpecforgeError, match=message):
        load_draft(tmp_path, target_config)


def test_what_is_no_draft_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_draft(tmp_path / "absent")
    with pytest.raises(ConfigError, match="draft_model_path nobody/nothing: no such directory, and not from the hub"):
        load_draft("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        load_draft(tmp_path)


def test_the_contract_names_how_to_export_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "step_12", random_draft(), 12)
    for path in (tmp_path / "run", tmp_path / "run" / "step_12"):
        (finding,) = check_draft(path)
        assert finding.is_broken
        assert "step_12: a training checkpoint, which engines do not read: scripts/export_draft.py" in finding.message


def test_the_contract_names_files_that_engines_would_read_as_well(tmp_path: Path) -> None:
    folder = export_draft(random_draft(), tmp_path / "draft")
    save_file({"norm.weight": torch.ones(32)}, folder / "old.safetensors")
    found = [finding.message for finding in check_draft(folder) if finding.is_broken]
    assert found == ["old.safetensors beside model.safetensors: engines read both; delete it"]


def test_a_short_config_trains(tmp_path: Path, target_config: Any) -> None:
    """--draft-model-config with what EAGLE's tutorials write; a width that is not the target's is named."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHORT))
    config = read_draft_config(file, "eagle3", target_config)
    derived = DraftConfig.from_target(target_config, 300)
    assert config == derived.replace(target_hidden_size=128)
    file.write_text(json.dumps({**SHORT, "num_hidden_layers": 32}))
    with pytest.raises(CheckpointError, match=r"config\.json: num_hidden_layers 32: expected 1"):
        read_draft_config(file, "eagle3", target_config)
    assert read_draft_config(write_short(file, hidden_size=64), "eagle3", target_config).hidden_size == 64


def write_short(file: Path, **changes: Any) -> Path:
    file.write_text(json.dumps({**SHORT, **changes}))
    return file
