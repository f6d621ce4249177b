"""Training DSpark drafts: the same bytes after a resume, the same losses on any number of ranks, settings, shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from specforge_lite.checkpoints.draft_files import read_draft_config
from specforge_lite.cli.train import asked_kind
from specforge_lite.core.errors import DataError
from specforge_lite.model.draft import DraftConfig
from specforge_lite.training.block import DflashConfig, DsparkConfig, spread_aux_layers, unused_token
from tests.training.test_training_runs import assert_same_checkpoint, stop_after
from tests.training_runs import VOCAB_SIZE, Run, make_dataset, run_ranks, train

STEPS = {"training": {"total_steps": 30, "num_epochs": None}}


def test_a_stopped_run_ends_with_the_bytes_of_a_whole_one(tmp_path: Path) -> None:
    """30 steps of 2 samples from 24: two and a half epochs, so other anchors are drawn twice."""
    whole = Run(tmp_path, "whole", STEPS, kind="dspark")
    train(whole)
    parts = Run(tmp_path, "parts", STEPS, kind="dspark")
    for steps in (7, 19):
        with pytest.raises(SystemExit):
            train(parts, stop_after(steps))
    train(parts)
    assert_same_checkpoint(whole.output_dir / "step_30", parts.output_dir / "step_30")
    losses = whole.losses()
    assert sum(losses[-6:]) < 0.98 * sum(losses[:6])


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_does(tmp_path: Path, sharding: str) -> None:
    settings = {
        "training": {"total_steps": 14, "batch_size": 4}, "optimizer": {"lr_schedule": "constant", "warmup_ratio": 0.0},
    }  # fmt: skip
    one = Run(tmp_path, "one", settings, kind="dspark")
    train(one)
    shared = {**settings, "training": {"total_steps": 14, "batch_size": 2}, "distributed": {"sharding": sharding}}
    two = Run(tmp_path, "two", shared, kind="dspark")
    assert run_ranks(2, train, (two,), tmp_path / "log") == [0, 0], (tmp_path / "log" / "rank_0.log").read_text()
    assert two.losses() == pytest.approx(one.losses(), rel=2e-5)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(36, (1, 9, 17, 25, 33)), (40, (1, 10, 19, 28, 37)), (8, (1, 2, 3, 4, 5)), (5, (1, 2)), (2, (1,))],
)
def test_default_layers_are_those_of_the_authors(layers: int, expected: tuple[int, ...]) -> None:
    assert spread_aux_layers(layers) == expected


def config(tmp_path: Path, kind: type[DsparkConfig] = DsparkConfig, **sections: dict[str, object]) -> DsparkConfig:
    data = tmp_path / "d.jsonl"
    data.touch()
    values: dict[str, dict[str, object]] = {
        "target": {"target_model_path": "specforge_lite/assets/tiny_target"},
        "data": {"train_data_path": str(data)},
        "checkpoint": {"output_dir": str(tmp_path / "run")},
    }
    return kind.model_validate({**values, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"loss": "lk"}}, "loss: a dspark draft has no such option"),
        ({"training": {"ttt_length": 5}}, "ttt_length: a dspark draft has no such option"),
        ({"distributed": {"sp_size": 2}}, "sp_size: a dspark draft has no such option"),
        ({"draft": {"draft_vocab_size": 100}}, "draft_vocab_size: a block draft has no such option"),
        ({"draft": {"init": "target"}}, "a block draft starts from random weights"),
        ({"draft": {"draft_kind": "eagle3"}}, "draft_kind eagle3: this command trains dspark"),
    ],
)
def test_options_of_other_kinds_are_refused(
    tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **sections)


def test_the_shape_follows_flags_then_file_then_the_authors(tmp_path: Path, tiny_target: Path) -> None:
    from transformers import AutoConfig

    target = AutoConfig.from_pretrained(tiny_target)
    plain = DraftConfig.from_target(target, algorithm="dspark")
    assert plain.draft_vocab_size == plain.vocab_size
    default = config(tmp_path).draft_shape(plain, target)
    # The tiny target's padding row ends nothing and no text has it.
    assert default == {
        "block_size": 7, "num_hidden_layers": 5, "mask_token_id": 0, "markov_rank": 256, "confidence_head": True,
    }  # fmt: skip
    given = config(tmp_path, draft={"block_size": 4, "num_draft_layers": 2, "mask_token_id": 9, "markov_rank": 8})
    assert given.draft_shape(plain, target)["block_size"] == 4
    assert given.draft_shape(plain, target)["mask_token_id"] == 9
    assert config(tmp_path, DflashConfig).draft_shape(plain, target)["block_size"] == 16
    assert config(tmp_path).with_target_defaults().target.aux_layer_ids == (1, 2, 3, 4, 5)


def test_without_an_unused_row_a_special_token_outside_the_template_is_the_mask(
    tmp_path: Path, tiny_target: Path
) -> None:
    """As SmolLM2: the padding ends answers, the tokenizer fills the table; special tokens are left."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    before = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<gh_stars>", "<empty_output>", "<|in_template|>"]})
    tokenizer.chat_template = "<|in_template|>" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "target")
    shape = AutoConfig.from_pretrained(tiny_target)
    shape.vocab_size, shape.pad_token_id = len(tokenizer), shape.eos_token_id
    shape.save_pretrained(tmp_path / "target")
    settings = config(tmp_path, target={"target_model_path": str(tmp_path / "target")})
    assert unused_token(settings, shape) == before + 1


def test_a_mask_token_that_answers_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path / "data")
    ids, mask = dataset.token_arrays()
    shape = DraftConfig(16, 24, 4, 2, VOCAB_SIZE + 5, VOCAB_SIZE + 5, algorithm="dspark", block_size=4)
    settings = config(tmp_path)
    count = int((ids[mask] == 2).sum())
    line = (
        rf"mask_token_id 2: {count} answer tokens of the data are this token; give --mask-token-id {VOCAB_SIZE + 4} or"
    )
    with pytest.raises(DataError, match=line):
        settings.check_dataset(shape.replace(mask_token_id=2), dataset)
    prompt_only = next(token for token in ids if not (ids[mask] == token).any())
    settings.check_dataset(shape.replace(mask_token_id=int(prompt_only)), dataset)
    assert "prompt tokens of the data are this token" in capsys.readouterr().err
    settings.check_dataset(shape.replace(mask_token_id=VOCAB_SIZE), dataset)
    assert capsys.readouterr().err == ""


def test_a_config_file_of_the_engines_form_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        """{"architectures": ["Qwen3DSparkModel"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 200, "block_size": 5, "num_hidden_layers": 3, "markov_rank": 16,
        "enable_confidence_head": true, "dflash_config": {"mask_token_id": 7, "target_layer_ids": [0, 2]}}"""
    )
    shape = read_draft_config(file, "dspark")
    assert (shape.block_size, shape.num_hidden_layers, shape.markov_rank) == (5, 3, 16)
    assert (shape.mask_token_id, shape.aux_layer_ids, shape.confidence_head) == (7, (0, 2), True)


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        (["--draft-kind", "dspark"], "dspark"),
        (["--draft_kind=dflash", "--lr", "1"], "dflash"),
        (["--config", "FILE"], "dspark"),
        (["--lr", "1"], None),
        (["--draft-kind"], None),
    ],
)
def test_the_kind_comes_from_flags_or_file(tmp_path: Path, argv: list[str], kind: str | None) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("draft: {draft_kind: dspark}\n")
    assert asked_kind([str(file) if word == "FILE" else word for word in argv]) == kind
