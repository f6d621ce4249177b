"""A bundle holds what the hub needs, tells what is known, and no local path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge_lite.checkpoints.bundle import CardFacts, copy_tokenizer, launch_commands, without_paths, write_bundle
from specforge_lite.checkpoints.contract import check_draft
from specforge_lite.checkpoints.export import export_draft
from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.serving.engine import ServingOptions
from tests.inference_drafts import random_draft

RUN = {
    "step": 800,
    "config": {
        "training": {"batch_size": 8, "ttt_length": 7, "total_steps": None},
        "optimizer": {"learning_rate": 1e-4},
        "data": {"train_data_path": "/home/someone/secret/train.jsonl"},
    },
    "provenance": {"command": ["x.py", "/home/someone/a"], "packages": {"torch": "2.13.0"}, "git": {"commit": "a1"}},
}  # fmt: skip


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export_draft(random_draft(), tmp_path / "exported", provenance=RUN)


def test_bundle_of_an_eagle3_draft(exported: Path, tmp_path: Path, tiny_target: Path) -> None:
    evaluation, decoding = tmp_path / "evaluation.json", tmp_path / "decoding.json"
    evaluation.write_text(
        json.dumps({"chain_length": 5, "num_samples": 40, "tau_walk": 2.341, "accuracy": [0.61, 0.5]})
    )
    decoding.write_text(json.dumps({"num_prompts": 30, "acceptance_length": 2.218, "num_identical": 30}))
    facts = CardFacts("meta-llama/Llama-3.1-8B-Instruct", evaluation, decoding, "apache-2.0")
    folder = write_bundle(exported, tmp_path / "my-draft", facts, tiny_target)

    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()
    }
    assert not [finding for finding in check_draft(folder) if finding.is_broken]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: meta-llama/Llama-3.1-8B-Instruct\n")
    assert "--speculative-algorithm EAGLE3" in card
    vllm = (
        '{"method": "eagle3", "model": "my-draft", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}'
    )
    assert vllm in card
    assert "rejection-sampling \\\n" not in card  # sglang refuses to start with it where the vocabulary is reduced
    assert "the draft's tokens are drawn from its distribution" in card
    for row in (
        "| decoded acceptance length, 30 prompts | 2.22 |",
        "| outputs identical to the target's | 30 of 30 |",
        "| estimated acceptance length, chain of 5, 40 conversations | 2.34 |",
        "| accuracy, step 1 | 50.0% |",
        "| steps | 800 |",
        "| data | train.jsonl |",
        "| torch | 2.13.0 |",
    ):
        assert row in card
    assert "total steps" not in card
    everything = card + (folder / "config.json").read_text()
    assert "someone" not in everything
    assert str(tmp_path) not in everything


def test_bundle_of_an_eagle1_draft_without_results(tmp_path: Path) -> None:
    exported = export_draft(random_draft(algorithm="eagle1"), tmp_path / "exported")
    card = (write_bundle(exported, tmp_path / "d", CardFacts(str(tmp_path / "target"))) / "README.md").read_text()
    assert "base_model: target\n" in card
    assert "--speculative-algorithm EAGLE \\\n" in card
    assert "  --speculative-use-rejection-sampling\n" in card  # it drafts with the target's own head
    assert '"method": "eagle",' in card
    assert "## Results" not in card


def test_nothing_is_left_of_a_bundle_that_fails(exported: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"results\.json: No such file"):
        write_bundle(exported, tmp_path / "d", CardFacts("t", evaluation=tmp_path / "results.json"))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json or tokenizer\.model"):
        write_bundle(exported, tmp_path / "d", CardFacts("t"), tokenizer_from=exported)
    with pytest.raises(ConfigError, match="exists already"):
        write_bundle(exported, exported, CardFacts("t"))
    assert set(tmp_path.iterdir()) == before


def test_hub_names_and_addresses_stay() -> None:
    value = {"a": ["org/model", "https://host/a/b", "/x/y/z.json", "data/sub/train.jsonl", 3, None]}
    assert without_paths(value) == {"a": ["org/model", "https://host/a/b", "z.json", "train.jsonl", 3, None]}


def test_tokenizer_files_only(tiny_target: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_target, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()


def test_an_old_bundle_is_replaced_only_when_told(exported: Path, tmp_path: Path) -> None:
    folder = write_bundle(exported, tmp_path / "d", CardFacts("first"))
    with pytest.raises(ConfigError, match="exists already"):
        write_bundle(exported, folder, CardFacts("second"))
    write_bundle(exported, folder, CardFacts("second"), overwrite=True)
    assert "base_model: second" in (folder / "README.md").read_text()


def test_a_block_draft_is_served_with_its_own_length_and_sampled() -> None:
    options, draft = ServingOptions("vllm", "T", "D"), {"architectures": ["Qwen3DSparkModel"], "block_size": 7}
    commands = launch_commands(options, draft)
    assert "--speculative-algorithm DSPARK" in commands
    assert "--speculative-num-draft-tokens 8" in commands
    assert '"num_speculative_tokens": 7, "draft_sample_method": "probabilistic"' in commands
    assert "draft_sample_method" not in launch_commands(options, draft, temperature=0.0)
    commands = launch_commands(options, {"architectures": ["DFlashDraftModel"], "block_size": 16})
    assert "--speculative-dflash-block-size 16" in commands
    assert '"num_speculative_tokens": 15}' in commands
