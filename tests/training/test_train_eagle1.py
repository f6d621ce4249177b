"""EAGLE-1 from the command line to a decoded answer: online and from disk, exact resume, EAGLE's defaults and clip."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from scripts import capture_hidden_states, train_eagle1
from specforge_lite.capture.hf import HfEngine
from specforge_lite.checkpoints.contract import check_draft
from specforge_lite.checkpoints.draft_files import read_draft_config
from specforge_lite.checkpoints.export import export_checkpoint
from specforge_lite.checkpoints.loading import load_draft, read_draft_files
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import parse_config
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.model.config_json import config_from_file
from specforge_lite.training.eagle1 import Eagle1Config
from specforge_lite.training.optimizer import DraftOptimizer, learning_rate_at
from specforge_lite.training.settings import OptimizerSection
from tests.training_runs import weights

NUM_STEPS = 6


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a few made-up arithmetic chats."""
    root = tmp_path_factory.mktemp("eagle1")
    generator = random.Random(0)
    for name, count in (("train", 12), ("eval", 4)):
        with (root / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                a, b = generator.randint(2, 99), generator.randint(2, 99)
                messages = [
                    {"role": "user", "content": f"Tom has {a} apples and buys {b} more. How many?"},
                    {
                        "role": "assistant",
                        "content": f"He has <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}",
                    },
                ]
                file.write(json.dumps({"conversations": messages}) + "\n")
    return root


def flags(workshop: Path, target: Path, name: str) -> list[str]:
    return [
        "--target-model-path", str(target), "--output-dir", str(workshop / name), "--target-backend", "hf",
        "--target-dtype", "float32", "--cache-dir", str(workshop / "cache"), "--batch-size", "2",
        "--learning-rate", "1e-3", "--warmup-steps", "1", "--schedule-steps", "none", "--log-interval", "1",
        "--max-length", "128",
    ]  # fmt: skip


def data_flags(workshop: Path) -> list[str]:
    return ["--train-data-path", str(workshop / "train.jsonl"), "--eval-data-path", str(workshop / "eval.jsonl")]


def run(script, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    assert not script.main()


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(workshop: Path, tiny_target: Path) -> Path:
    """Output directory of a whole run of `NUM_STEPS` steps, one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*flags(workshop, tiny_target, "run"), *data_flags(workshop), "--num-epochs", "1"]
        run(train_eagle1, arguments, patch)
    return workshop / "run"


def test_online_run_learns_and_evaluates_every_epoch(trained: Path) -> None:
    losses = [row["loss"] for row in metrics(trained) if "loss" in row]
    assert len(losses) == NUM_STEPS
    assert losses[-1] < losses[0]
    evaluated = [row for row in metrics(trained) if "eval/tau_walk" in row]
    assert [row["step"] for row in evaluated] == [NUM_STEPS]
    assert len(evaluated[0]["eval/accuracy"]) == 5  # a chain, although one step is trained


def test_from_disk_equals_online(
    trained: Path, workshop: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured once with the three layers of EAGLE-3; the noise is that of the seed."""
    common = ["--target-model-path", str(tiny_target), "--target-backend", "hf", "--target-dtype", "float32"]
    data = [*data_flags(workshop), "--cache-dir", str(workshop / "cache"), "--max-length", "128"]
    offline = ["--offline-dir", str(workshop / "states")]
    run(capture_hidden_states, [*common, *data, *offline, "--states-dtype", "fp32"], monkeypatch)
    arguments = [*flags(workshop, tiny_target, "disk"), *offline, "--num-epochs", "1"]
    run(train_eagle1, arguments, monkeypatch)
    online, disk = (weights(workshop / name / f"step_{NUM_STEPS}") for name in ("run", "disk"))
    for name, tensor in online.items():
        torch.testing.assert_close(disk[name], tensor, rtol=1e-4, atol=1e-5)


def test_resume_repeats_the_noise(
    trained: Path, workshop: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*flags(workshop, tiny_target, "halves"), *data_flags(workshop), "--lr-schedule", "constant"]
    whole = [*flags(workshop, tiny_target, "whole"), *data_flags(workshop), "--lr-schedule", "constant"]
    run(train_eagle1, [*whole, "--total-steps", "4"], monkeypatch)
    run(train_eagle1, [*arguments, "--total-steps", "2"], monkeypatch)
    run(train_eagle1, [*arguments, "--total-steps", "4"], monkeypatch)
    first, second = (weights(workshop / name / "step_4") for name in ("whole", "halves"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_export_is_served_as_eagle1_and_decodes(trained: Path, workshop: Path, tiny_target: Path) -> None:
    exported = export_checkpoint(trained, workshop / "draft", dtype="float32")
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"][0] == "LlamaForCausalLMEagle"
    bias = read_draft_files(exported).tensors["fc.bias"]
    assert bias.shape == (128,)
    assert not bias.any()
    assert not [finding for finding in check_draft(exported) if finding.level != "ok"]
    assert load_draft(exported).config.algorithm == "eagle1"

    model = SpeculativeModel.from_pretrained(str(tiny_target), exported, dtype="float32", device="cpu")
    prompt = "<|im_start|>user\nTom has 3 apples and buys 4 more.<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    expected = model.target.model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    for shape in (TreeShape.chain(4), TreeShape(20, 4, 4)):
        assert model.speculative_generate(ids, max_new_tokens=24, shape=shape).answers[0].tokens == expected


def test_only_one_layer_is_captured_for_it(workshop: Path, tiny_target: Path) -> None:
    config = parse_config(Eagle1Config, [*flags(workshop, tiny_target, "x"), *data_flags(workshop)])
    engine = HfEngine(str(tiny_target), config.target.aux_layer_ids)
    assert engine.info.aux_layer_ids == (0,)


# ------------------------------------------------------------------------------------------------------------ settings


def eagle_config(workshop: Path, *words: str) -> Eagle1Config:
    required = ["--target-model-path", "m", "--output-dir", "o", "--train-data-path", str(workshop / "train.jsonl")]
    return parse_config(Eagle1Config, [*required, *words])


def test_defaults_are_eagles(workshop: Path) -> None:
    config = eagle_config(workshop)
    optimizer, training = config.optimizer, config.training
    assert (optimizer.learning_rate, optimizer.adam_beta1, optimizer.adam_beta2) == (3e-5, 0.9, 0.95)
    assert (optimizer.max_grad_norm, optimizer.max_grad_value) == (0.0, 0.5)
    assert (training.v_weight, training.p_weight, training.noise, training.ttt_length) == (1.0, 0.1, 0.2, 1)
    assert training.num_epochs == 20
    # linear warm-up over 2000 steps, linear decay to 800000, whatever the length of the run
    rates = [learning_rate_at(optimizer, step, 100) / 3e-5 for step in (0, 999, 1999, 2000, 401_000, 799_999)]
    assert rates == pytest.approx([1 / 2000, 0.5, 1.0, 1.0, 0.5, 1 / 798_000], rel=1e-6)


def test_what_is_given_replaces_a_default_that_contradicts_it(workshop: Path) -> None:
    config = eagle_config(workshop, "--warmup-ratio", "0.1", "--max-grad-norm", "1.0", "--total-steps", "9")
    assert config.optimizer.warmup_steps is None
    assert config.optimizer.max_grad_value == 0.0
    assert config.training.num_epochs is None
    with pytest.raises(ConfigError, match="--max-grad-norm and --max-grad-value: give one"):
        eagle_config(workshop, "--max-grad-norm", "1.0", "--max-grad-value", "0.5")
    with pytest.raises(ConfigError, match="--draft-vocab-size: an EAGLE-1 draft has no such option"):
        eagle_config(workshop, "--draft-vocab-size", "100")


def test_clipping_by_value_clips_the_mean_gradient() -> None:
    """Sums over 4 positions: means are 0.25, -1, 3; clipped at 0.5. Adam sees 0.25, -0.5, 0.5."""
    weight = torch.zeros(3, 1, requires_grad=True)
    weight.grad = torch.tensor([[1.0], [-4.0], [12.0]])
    settings = OptimizerSection(max_grad_norm=0.0, max_grad_value=0.5, warmup_steps=0, lr_schedule="constant")
    optimizer = DraftOptimizer({"weight": weight}, settings, 10)
    optimizer.step(0, torch.tensor(4.0), torch.tensor(1.0), weight.grad.square().sum())
    moments = optimizer.state_tensors()["weight"]["exp_avg"].flatten() / (1 - settings.adam_beta1)
    torch.testing.assert_close(moments, torch.tensor([0.25, -0.5, 0.5]))


def test_draft_configs_of_either_kind(tmp_path: Path, tiny_target: Path) -> None:
    """EAGLE's own configs are plain Llama configs and fit both; one that names the other architecture is refused."""
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 100, "rms_norm_eps": 1e-5, "model_type": "llama",
    }  # fmt: skip
    plain, eagle1, eagle3 = (tmp_path / name for name in ("plain.json", "eagle1.json", "eagle3.json"))
    plain.write_text(json.dumps({**shape, "architectures": ["LlamaForCausalLM"]}))
    eagle1.write_text(json.dumps({**shape, "architectures": ["LlamaForCausalLMEagle"]}))
    eagle3.write_text(json.dumps({**shape, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 50}))
    for path in (plain, eagle1):
        config = read_draft_config(path, "eagle1")
        assert (config.algorithm, config.draft_vocab_size) == ("eagle1", 100)
    assert read_draft_config(plain, "eagle3").algorithm == "eagle3"
    with pytest.raises(ConfigError, match="trained with --draft-kind eagle3"):
        read_draft_config(eagle3, "eagle1")
    with pytest.raises(ConfigError, match="trained with --draft-kind eagle1"):
        read_draft_config(eagle1, "eagle3")
    assert config_from_file(eagle3).draft_vocab_size == 50
