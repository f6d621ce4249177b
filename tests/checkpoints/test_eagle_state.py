"""EAGLE's `state_N` directories: continued by our trainers, evaluated over all epochs, and refused in clear words."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from specforge_lite.checkpoints.compat.eagle_state import optimizer_moments, read_state_files
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.errors import CheckpointError, ConfigError, SpecforgeError
from specforge_lite.core.settings import parse_config
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import load_target_head
from specforge_lite.training.settings import TrainConfig
from tests.eagle_states import eagle1_tensors, write_accelerate_state, write_deepspeed_state
from tests.inference_drafts import random_vocabulary
from tests.script_runner import run_in_process
from tests.training_runs import run_ranks

NUM_SAMPLES, STEPS_PER_EPOCH = 6, 3
DRAFT_VOCAB = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eagle-state")
    rows = [
        {"id": str(i), "conversations": [
            {"role": "user", "content": f"Tom has {i} apples and buys {i + 2} more. How many?"},
            {"role": "assistant", "content": f"He has {i}+{i + 2}={2 * i + 2} apples."},
        ]}
        for i in range(NUM_SAMPLES)
    ]  # fmt: skip
    for name, part in (("train", rows), ("eval", rows[:3])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def flags(data: Path, target: Path, output_dir: Path, *words: str) -> list[str]:
    """EAGLE's own flag names; a learning rate so small that weights stay what they were."""
    return [
        "--basepath", str(target), "--trainpath", str(data / "train.jsonl"), "--savedir", str(output_dir),
        "--target-backend", "hf", "--target-dtype", "float32", "--cache-dir", str(data / "cache"), "--batch-size", "2",
        "--max-length", "96", "--learning-rate", "1e-30", "--log-interval", "1", *words,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def target_config(tiny_target: Path) -> Any:
    return AutoConfig.from_pretrained(tiny_target)


@pytest.fixture(scope="module")
def eagle1(target_config: Any) -> Draft:
    config = DraftConfig.from_target(target_config, algorithm="eagle1")
    draft = build_draft(config, torch.zeros(4096, dtype=torch.int64), torch.ones(4096, dtype=torch.bool))
    init_random(draft, 7)
    return draft


def eagle3_draft(intermediate_size: int, num_key_value_heads: int) -> Draft:
    config = DraftConfig(128, intermediate_size, 4, num_key_value_heads, 4096, DRAFT_VOCAB)
    draft = build_draft(config, *random_vocabulary(DRAFT_VOCAB, 4096))
    init_random(draft, 3)
    return draft


def table(tiny_target: Path, target_config: Any) -> torch.Tensor:
    return load_target_head(tiny_target, target_config).embed_VH.float()


def test_eagle1_continues_with_its_optimizer(
    data: Path, tiny_target: Path, target_config: Any, eagle1: Draft, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One step after state_1. With the moments of optimizer.bin, exp_avg is 0.9 of theirs plus what a fresh run has."""
    tensors = eagle1_tensors(eagle1, table(tiny_target, target_config), bias=0.1)
    saved: dict[str, torch.Tensor] = {}
    for name in ("with", "without"):
        write_accelerate_state(tmp_path / name / "state_0", tensors)
        saved = write_accelerate_state(tmp_path / name / "state_1", {n: t + 0.01 for n, t in tensors.items()})
    (tmp_path / "without" / "state_1" / "optimizer.bin").unlink()
    steps = ["--num-epochs", "3", "--total-steps", str(2 * STEPS_PER_EPOCH + 1), "--noise", "0"]
    found = {}
    for name in ("with", "without"):
        run_in_process("train_eagle1", flags(data, tiny_target, tmp_path / name, *steps))
        checkpoint = tmp_path / name / f"step_{2 * STEPS_PER_EPOCH + 1}"
        found[name] = load_file(checkpoint / "optimizer.safetensors")
        state = json.loads((checkpoint / "state.json").read_text())
        assert (state["data"]["epoch"], state["data"]["consumed"]) == (2, 2)
        weights = load_file(checkpoint / "draft.safetensors")
        for parameter, value in tensors_as_trained(tmp_path / name / "state_1").items():
            assert torch.equal(weights[parameter], value)
    printed = capsys.readouterr().out
    assert "state_1: epoch 2 begins\n" in printed
    assert "state_1: epoch 2 begins, optimizer fresh" in printed
    assert printed.count("the optimizer starts fresh: no optimizer.bin") == 1
    assert printed.count("fc.bias is left out") == 2
    trained = [name for name in saved if name != "fc.bias"]
    for parameter in trained:
        change = found["with"][f"exp_avg.{parameter}"] - found["without"][f"exp_avg.{parameter}"]
        torch.testing.assert_close(change, 0.9 * saved[parameter], rtol=1e-4, atol=1e-6)
        assert float(found["with"][f"step.{parameter}"]) == 4
        assert float(found["without"][f"step.{parameter}"]) == 1


def train_rank(words: list[str]) -> None:
    run_in_process("train_eagle1", words)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_ranks_continue_from_what_rank_0_reads(
    data: Path, tiny_target: Path, target_config: Any, eagle1: Draft, tmp_path: Path, sharding: str
) -> None:
    """Three pairs of samples, two ranks: two steps an epoch, so state_0 is two steps."""
    saved = write_accelerate_state(
        tmp_path / "run" / "state_0", eagle1_tensors(eagle1, table(tiny_target, target_config))
    )
    words = flags(data, tiny_target, tmp_path / "run", "--total-steps", "3", "--sharding", sharding)
    words += ["--v-weight", "0", "--p-weight", "0"]  # no gradient: the moments only decay
    assert run_ranks(2, train_rank, (words,), tmp_path / "logs") == [0, 0], (tmp_path / "logs/rank_0.log").read_text()
    weights = load_file(tmp_path / "run" / "step_3" / "draft.safetensors")
    moments = load_file(tmp_path / "run" / "step_3" / "optimizer.safetensors")
    for name, value in tensors_as_trained(tmp_path / "run" / "state_0").items():
        assert torch.equal(weights[name], value)
        assert float(moments[f"step.{name}"]) == 4
        torch.testing.assert_close(moments[f"exp_avg.{name}"], 0.9 * saved[name], rtol=1e-5, atol=1e-9)


def tensors_as_trained(state: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(state / "pytorch_model.bin", weights_only=True)
    return {name: tensor for name, tensor in loaded.items() if name not in ("embed_tokens.weight", "fc.bias")}


def test_eagle3_takes_the_vocabulary_map_along(
    data: Path, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    draft = eagle3_draft(352, 2)
    write_deepspeed_state(tmp_path / "run" / "state_0", draft)
    words = flags(data, tiny_target, tmp_path / "run", "--ttt-length", "2", "--num-epochs", "2")
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight has shape .*--draft-vocab-size {DRAFT_VOCAB}$"):
        run_in_process("train_eagle3_online", [*words, "--draft-vocab-size", "200"])
    words += ["--draft-vocab-size", str(DRAFT_VOCAB)]
    run_in_process("train_eagle3_online", [*words, "--total-steps", "4"])
    weights = load_file(tmp_path / "run" / "step_4" / "draft.safetensors")
    for name, tensor in draft.state_dict().items():
        assert torch.equal(weights[name], tensor.half().to(tensor.dtype) if tensor.is_floating_point() else tensor)
    capsys.readouterr()
    run_in_process("train_eagle3_online", [*words, "--total-steps", "5"])  # from here on our own checkpoints count
    assert "resumed from" in (printed := capsys.readouterr().out)
    assert "state_0" not in printed


@pytest.mark.parametrize("words", [("--savedir", "--trainpath"), ("--cpdir", "--train-data-path")])
def test_eagles_flags(data: Path, tmp_path: Path, words: tuple[str, str]) -> None:
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps({"draft_vocab_size": 32000, "length": 4}))
    config = parse_config(
        TrainConfig,
        ["--basepath", "m", words[1], str(data / "train.jsonl"), "--testpath", str(data / "eval.jsonl"), words[0], "o",
         "--configpath", str(config_file), "--bs", "3", "--lr", "3e-5", "--gradient-accumulation-steps", "2"],
    )  # fmt: skip
    assert (config.target.target_model_path, config.checkpoint.output_dir) == ("m", Path("o"))
    assert (config.data.train_data_path, config.data.eval_data_path) == (
        str(data / "train.jsonl"), str(data / "eval.jsonl"),
    )  # fmt: skip
    assert (config.draft.draft_model_config, config.training.ttt_length) == (config_file, 4)
    assert (config.training.batch_size, config.training.accumulation_steps) == (3, 2)
    assert config.optimizer.learning_rate == 3e-5


def test_when_a_state_is_not_continued(
    data: Path, tiny_target: Path, target_config: Any, eagle1: Draft, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_accelerate_state(tmp_path / "state_4", eagle1_tensors(eagle1, table(tiny_target, target_config)))
    words = flags(data, tiny_target, tmp_path)
    with pytest.raises(CheckpointError, match=r"state_4: 5 epochs are done \(15 steps\), the run ends after 6 steps"):
        run_in_process("train_eagle1", [*words, "--num-epochs", "2"])
    run_in_process("train_eagle1", [*words, "--total-steps", "1", "--no-resume"])
    assert "from the start" in capsys.readouterr().out


def test_curve_over_states(
    data: Path, tiny_target: Path, target_config: Any, eagle1: Draft, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "ckpt"
    for epoch in (0, 1):
        tensors = eagle1_tensors(eagle1, table(tiny_target, target_config), bias=0.1 * epoch)
        write_accelerate_state(run / f"state_{epoch}", tensors)
    words = [
        str(run), "--basepath", str(tiny_target), "--testpath", str(data / "eval.jsonl"), "--cache-dir",
        str(data / "cache"), "--max-length", "96", "--target-backend", "hf", "--target-dtype", "float32", "--device",
        "cpu", "--ttt-length", "2",
    ]  # fmt: skip
    assert run_in_process("evaluate_checkpoints", words) == 0
    results = json.loads((run / "evaluation" / "checkpoints.json").read_text())
    assert [(entry["name"], entry["epoch"]) for entry in results["checkpoints"]] == [("state_0", 0), ("state_1", 1)]
    first, second = results["checkpoints"]
    assert first["loss"] != second["loss"]  # the bias of fc counts
    assert f"best by tau_walk: {results['best']}" in capsys.readouterr().out
    single = ["--draft-model-path", str(run / "state_1"), *words[1:], "--save-results"]
    run_in_process("evaluate_draft", [*single, str(tmp_path / "new" / "single.json")])
    assert json.loads((tmp_path / "new" / "single.json").read_text())["loss"] == second["loss"]
    with pytest.raises(ConfigError, match=r"save_results .*ckpt: is a directory, expected a file name"):
        run_in_process("evaluate_draft", [*single, str(run)])


# --------------------------------------------------------------------------------------------------------------- files


def test_the_shape_is_read_off_the_tensors(tiny_target: Path, target_config: Any, tmp_path: Path) -> None:
    draft = eagle3_draft(200, 4)
    write_deepspeed_state(tmp_path / "state_2", draft, torch.float32)
    loaded = load_draft(tmp_path / "state_2", target_config)
    assert (loaded.config.intermediate_size, loaded.config.num_key_value_heads) == (200, 4)
    assert loaded.config.draft_vocab_size == DRAFT_VOCAB
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in draft.state_dict().items())


def test_eagles_config_json_is_understood(target_config: Any, tmp_path: Path) -> None:
    """The config.json that EAGLE's trainer reads: a Llama config with draft_vocab_size."""
    draft = eagle3_draft(200, 4)
    write_deepspeed_state(tmp_path / "run" / "state_0", draft, torch.float32)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 200, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_hidden_layers": 1, "vocab_size": 4096, "draft_vocab_size": DRAFT_VOCAB,
        "rms_norm_eps": 1e-6, "length": 5,
    }  # fmt: skip
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    loaded = load_draft(tmp_path / "run" / "state_0", target_config)
    assert (loaded.config.rms_norm_eps, loaded.config.draft_vocab_size) == (1e-6, DRAFT_VOCAB)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no weights here; expected pytorch_model.bin or model.safetensors$"),
        (lambda folder: (folder / "zero_to_fp32.py").touch(), "DeepSpeed shards: run its zero_to_fp32.py"),
        (lambda folder: torch.save(SimpleNamespace(a=1), folder / "pytorch_model.bin"), "not a file of plain tensors"),
        (lambda folder: torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin"), "not the state of an EAGLE"),
    ],
)
def test_unusable_states(target_config: Any, tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "state_0").mkdir()
    make(tmp_path / "state_0")
    with pytest.raises(SpecforgeError, match=message):
        load_draft(tmp_path / "state_0", target_config)


def test_moments_that_cannot_be_told(tiny_target: Path, target_config: Any, eagle1: Draft, tmp_path: Path) -> None:
    state = tmp_path / "state_0"
    write_accelerate_state(state, eagle1_tensors(eagle1, table(tiny_target, target_config)))
    files = read_state_files(state)
    moments, reason = optimizer_moments(state, files, "eagle1")
    assert reason == ""
    assert "embed_tokens.weight" not in moments
    assert len(moments) == 10
    broken = torch.load(state / "optimizer.bin", weights_only=True)
    broken["param_groups"][0]["params"].append(99)
    torch.save(broken, state / "optimizer.bin")
    assert optimizer_moments(state, files, "eagle1") == ({}, "optimizer.bin counts 12 parameters, pytorch_model.bin 10")
    save_file(torch.load(state / "pytorch_model.bin", weights_only=True), state / "model.safetensors")
    assert "has lost the order" in optimizer_moments(state, read_state_files(state), "eagle1")[1]
