"""Targets, drafts and training checkpoints that are not what they should be: one line that names the place, exit code
2, nothing executed, nothing under a final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_lite.checkpoints.export import export_draft
from tests.inference_drafts import random_draft
from tests.script_runner import end_of_script, visible

WIDTH, VOCAB = 32, 4096
AUX = (0, 2, 3)
EXECUTED = "executed"
Change = Callable[[Path], None]
ROW = {"id": "a", "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]}


class Bomb:
    """Unpickling this makes a file, where code in a checkpoint would do worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# ------------------------------------------------------------------------------------------------------------- changes


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any], name: str = "model.safetensors") -> Change:
    """Change the tensors of a safetensors file."""

    def change(directory: Path) -> None:
        content = load_file(directory / name)
        edit(content)
        save_file({key: value.contiguous() for key, value in content.items()}, directory / name, {"format": "pt"})

    return change


def without(tensor: str, name: str = "model.safetensors") -> Change:
    return tensors(lambda content: content.pop(tensor), name)


def other_shape(tensor: str, name: str = "model.safetensors") -> Change:
    return tensors(lambda content: content.update({tensor: torch.zeros(3, 5)}), name)


def config(file: str = "config.json", **values: Any) -> Change:
    """Change keys of a JSON file."""

    def change(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(content | values))

    return change


def text(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda directory: (directory / name).write_bytes(data) and None


def gone(name: str) -> Change:
    return lambda directory: (directory / name).unlink()


def cut(name: str, keep: int) -> Change:
    return lambda directory: os.truncate(directory / name, keep)


def pickled(name: str) -> Change:
    """In the place of the safetensors file lies a pickle that runs code."""

    def change(directory: Path) -> None:
        for file in directory.glob("*.safetensors"):
            file.unlink()
        torch.save({"fc.weight": Bomb(directory.parent / EXECUTED)}, directory / name)

    return change


def pickled_list(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save([1], directory / "pytorch_model.bin")


def index(weight_map: Any, rest: Change | None = None) -> Change:
    """A shard index; "*" stands for every tensor."""

    def change(directory: Path) -> None:
        names = list(load_file(directory / "model.safetensors"))
        if isinstance(weight_map, dict) and "*" in weight_map:
            content: Any = {"metadata": {}, "weight_map": dict.fromkeys(names, weight_map["*"])}
        else:
            content = weight_map
        (directory / "model.safetensors.index.json").write_text(json.dumps(content))
        if rest is not None:
            rest(directory)

    return change


def move_outside(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")


# -------------------------------------------------------------------------------------------------------------- target

LAYER = "model.layers.1.mlp.up_proj.weight"
TARGETS: dict[str, tuple[Change, str]] = {
    "a layer's weight is missing": (without(LAYER), f"{LAYER}: missing in the weight files"),
    "all layers are missing": (
        tensors(lambda t: [t.pop(name) for name in list(t) if ".layers." in name]),
        "more: missing in the weight files",
    ),
    "the embedding is missing": (without("model.embed_tokens.weight"), "model.embed_tokens.weight: missing"),
    "the head is missing": (without("lm_head.weight"), "lm_head.weight: missing in the weight files"),
    "a weight of another shape": (other_shape(LAYER), f"{LAYER}: of another shape in the weight files"),
    "cut off": (cut("model.safetensors", 5000), "DIR"),
    "an empty weight file": (text("model.safetensors", b""), "DIR"),
    "text for weights": (text("model.safetensors", "<html>not found</html>" * 9), "DIR"),
    "a header of an exabyte": (text("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"), "DIR"),
    "a git lfs pointer": (
        text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "DIR",
    ),
    "no weights": (gone("model.safetensors"), "DIR"),
    "a pickle": (pickled("pytorch_model.bin"), "DIR"),
    "an index that climbs": (
        index({"*": "../outside.safetensors"}, move_outside),
        "DIR/model.safetensors.index.json: file name '../outside.safetensors' leaves the directory",
    ),
    "an index with an absolute path": (index({"*": "/etc/passwd"}), "file name '/etc/passwd' leaves the directory"),
    "an index of a missing shard": (index({"*": "model-7.safetensors"}), "DIR/model-7.safetensors: missing"),
    "an index that is a list": (index([1]), "index.json: expected a JSON object with a 'weight_map'"),
    "an index without a map": (index({"a": 1}), "index.json: expected a JSON object with a 'weight_map'"),
    "an index of numbers": (index({"weight_map": {"a": 3}}), "file name 3 leaves the directory"),
    "no config": (gone("config.json"), "target_model_path DIR"),
    "half a config": (text("config.json", '{"model_type": "lla'), "target_model_path DIR"),
    "a config that is a list": (text("config.json", "[]"), "target_model_path DIR"),
    "an unknown architecture": (config(model_type="lama"), "target_model_path DIR"),
    "code that came along": (
        config(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        "its own code runs only with --trust-remote-code",
    ),
    "a config of more layers": (config(num_hidden_layers=9), "missing in the weight files"),
    "a config of another width": (config(hidden_size=64), "of another shape in the weight files"),
    "heads that do not divide": (config(num_attention_heads=5), "target_model_path DIR"),
    "no tokenizer": (lambda d: [f.unlink() for f in d.glob("*token*")] and None, "DIR"),
    "half a tokenizer": (cut("tokenizer.json", 1000), "target_model_path DIR"),
    "another model's tokenizer": (
        lambda d: small_vocabulary(d),
        ">= vocab_size 64 of the target",
    ),
}


def small_vocabulary(directory: Path) -> None:
    """The model knows 64 tokens, its tokenizer 4096."""
    config(vocab_size=64)(directory)
    tensors(lambda t: t.update({n: t[n][:64] for n in ("model.embed_tokens.weight", "lm_head.weight")}))(directory)


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """A random Llama of five narrow layers with the tiny target's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("target") / "small"
    shutil.copytree(tiny_target, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    shape = AutoConfig.from_pretrained(tiny_target)
    for key, value in {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "num_hidden_layers": 5, "tie_word_embeddings": False,
    }.items():  # fmt: skip
        setattr(shape, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
    return directory


def check_end(code: int, error: str, expected: str, directory: Path) -> None:
    assert expected.replace("DIR", str(directory)) in error
    assert code == 2
    assert error.startswith("error: ")
    assert error.isprintable()
    assert not (directory.parent / EXECUTED).exists()


def training_words(target: Path, directory: Path, backend: str) -> list[str]:
    rows = directory / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    return [
        "--target-model-path", str(target), "--target-backend", backend, "--train-data-path", str(rows),
        "--output-dir", str(directory / "run"), "--cache-dir", str(directory / "cache"), "--max-length", "64",
        "--total-steps", "2", "--ttt-length", "2", "--draft-vocab-size", "50",
    ]  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_a_broken_target(name: str, small_target: Path, tmp_path: Path, capsys: Any) -> None:
    change, expected = TARGETS[name]
    target = shutil.copytree(small_target, tmp_path / "target")
    change(target)
    code, error = end_of_script("train_eagle3_online", training_words(target, tmp_path, "hf"), capsys)
    check_end(code, error, expected, target)
    assert not [entry for entry in visible(tmp_path / "run") if entry.startswith(("step", "metrics"))]


# --------------------------------------------------------------------------------------------------------------- draft

DRAFTS: dict[str, tuple[Change, str]] = {
    "fc is missing": (without("fc.weight"), "missing fc.weight"),
    "a norm is missing": (without("norm.weight"), "missing norm.weight"),
    "the map is missing": (without("d2t"), "d2t is missing"),
    "another target's width": (lambda d: other_draft(d, hidden_size=64), "64"),
    "another target's vocabulary": (lambda d: other_draft(d, vocab_size=100), "100"),
    "a weight of another shape": (other_shape("fc.weight"), "fc"),
    "a tensor too many": (tensors(lambda t: t.update(extra=torch.ones(2))), "no place for extra"),
    "absolute ids in the map": (tensors(lambda t: t["d2t"].add_(4090)), "d2t names target ids"),
    "a map that is too short": (tensors(lambda t: t.update(d2t=t["d2t"][:-1])), "d2t names target ids"),
    "negative ids in the map": (tensors(lambda t: t["d2t"].sub_(9999)), "d2t names target ids"),
    "cut off": (cut("model.safetensors", 4000), "DIR/model.safetensors: not a readable safetensors file"),
    "an empty file": (text("model.safetensors", b""), "DIR/model.safetensors: not a readable safetensors file"),
    "a header of an exabyte": (text("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"), "not a readable"),
    "no weights": (gone("model.safetensors"), "DIR: no weights here"),
    "a pickle that runs code": (pickled("pytorch_model.bin"), "DIR/pytorch_model.bin: not a file of plain tensors"),
    "a pickle named safetensors": (pickled("model.safetensors"), "DIR/model.safetensors: not a readable"),
    "a pickle of a list": (
        pickled_list,
        "expected a mapping of names to tensors",
    ),
    "no config": (gone("config.json"), "DIR/config.json: No such file"),
    "half a config": (text("config.json", "{"), "DIR/config.json: not valid JSON"),
    "a config nested without end": (text("config.json", "[" * 100_000), "DIR/config.json: not valid JSON"),
    "a config that is text": (text("config.json", '"eagle"'), "expected a JSON object, found str"),
    "a config without a width": (config(hidden_size=None), "hidden_size: required"),
    "a width as text": (config(hidden_size="32"), "hidden_size"),
    "heads that do not divide": (config(num_key_value_heads=3), "is not a multiple of num_key_value_heads 3"),
    "two layers": (config(num_hidden_layers=2), "num_hidden_layers 2: expected 1"),
    "aux layers the target has not": (config(aux_layer_ids=[1, 3, 77]), "77"),
    "two aux layers": (config(aux_layer_ids=[1, 3]), "2 aux layer ids, but fc is"),
    "aux layers as text": (config(aux_layer_ids="134"), "aux"),
    "an eagle_config that is a list": (config(eagle_config=[1]), "eagle_config: expected an object"),
    "architectures as a number": (config(architectures=7), "architectures: expected a list"),
    "another algorithm": (config(speculators_model_type="dflash"), "only eagle3 is read"),
}


def other_draft(directory: Path, **options: Any) -> None:
    shutil.rmtree(directory)
    export_draft(
        random_draft(**({"hidden_size": WIDTH, "vocab_size": VOCAB, "aux_layer_ids": AUX} | options)),
        directory,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_draft(
        random_draft(WIDTH, VOCAB, aux_layer_ids=AUX), tmp_path_factory.mktemp("draft") / "draft", dtype="float32"
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_a_broken_draft(name: str, exported: Path, small_target: Path, tmp_path: Path, capsys: Any) -> None:
    change, expected = DRAFTS[name]
    draft = shutil.copytree(exported, tmp_path / "draft")
    change(draft)
    words = ["--target-model-path", str(small_target), "--draft-model-path", str(draft), "--prompt", "hello"]
    code, error = end_of_script("chat", [*words, "--max-new-tokens", "2", "--device", "cpu"], capsys)
    check_end(code, error, expected, draft)


def test_a_good_draft_and_target_would_pass(exported: Path, small_target: Path, capsys: Any) -> None:
    words = ["--target-model-path", str(small_target), "--draft-model-path", str(exported), "--prompt", "hello"]
    code, _ = end_of_script("chat", [*words, "--max-new-tokens", "2", "--device", "cpu"], capsys)
    assert code == 0


# ------------------------------------------------------------------------------------------------- training checkpoint


def signed(change: Change) -> Change:
    """The change, and a manifest that agrees with it: not damaged, but made so."""

    def both(step: Path) -> None:
        change(step)
        files = [path for path in step.iterdir() if path.name != "manifest.json"]
        hashes = {
            f.name: {"size": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files
        }
        (step / "manifest.json").write_text(json.dumps({"format": 1, "files": hashes}))

    return both


ALL_DAMAGED = "1 checkpoint(s), all damaged; --overwrite"
CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "no manifest": (gone("manifest.json"), ALL_DAMAGED),
    "half a manifest": (text("manifest.json", "{"), ALL_DAMAGED),
    "a manifest of a later version": (config("manifest.json", format=9), ALL_DAMAGED),
    "a manifest that climbs": (
        config("manifest.json", files={"../../rows.jsonl": {"size": 1, "sha256": ""}}),
        ALL_DAMAGED,
    ),
    "a bit flipped": (lambda d: flip(d / "optimizer.safetensors"), ALL_DAMAGED),
    "cut off": (cut("draft.safetensors", 3000), ALL_DAMAGED),
    "a tensor missing": (signed(without("fc.weight", "draft.safetensors")), "1 tensor(s) missing, first fc.weight"),
    "a moment missing": (
        signed(without("exp_avg.fc.weight", "optimizer.safetensors")),
        "missing, first exp_avg.fc.weight",
    ),
    "a weight of another shape": (signed(other_shape("fc.weight", "draft.safetensors")), "fc.weight"),
    "a moment of another shape": (signed(other_shape("exp_avg.fc.weight", "optimizer.safetensors")), "fc.weight"),
    "the map of another vocabulary": (
        signed(tensors(lambda t: t.update(d2t=t["d2t"][:-3]), "draft.safetensors")),
        "d2t",
    ),
    "a pickle named safetensors": (
        signed(lambda d: torch.save({"a": Bomb(d.parent / EXECUTED)}, d / "draft.safetensors")),
        "draft.safetensors",
    ),
    "state without a step": (signed(text("state.json", "{}")), "state.json: 'step' is missing"),
    "state that is a list": (signed(text("state.json", "[]")), "state.json"),
    "no state": (signed(gone("state.json")), "state.json"),
    "state of text": (signed(config("state.json", step="many")), "state.json"),
    "no identity": (signed(gone("identity.json")), "identity.json"),
    "another target": (signed(config("identity.json", target="0" * 32)), "target was 0000"),
    "another tokenizer or data": (signed(config("identity.json", data="0" * 40)), "data was 0000"),
    "another draft": (
        signed(lambda d: replace_in(d / "identity.json", '"intermediate_size": 48', '"intermediate_size": 96')),
        "draft.intermediate_size was 96, this run has 48",
    ),
    "random numbers of another length": (
        signed(lambda d: save_file({"cpu": torch.zeros(1, 7, dtype=torch.uint8)}, d / "rng.safetensors")),
        "rng",
    ),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def replace_in(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


@pytest.fixture(scope="module")
def trained(small_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of two steps."""
    from tests.script_runner import run_in_process

    directory = tmp_path_factory.mktemp("trained")
    assert run_in_process("train_eagle3_online", training_words(small_target, directory, "fake")) == 0
    return directory


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_broken_checkpoint(name: str, trained: Path, small_target: Path, tmp_path: Path, capsys: Any) -> None:
    change, expected = CHECKPOINTS[name]
    shutil.copytree(trained, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    change(run / "step_2")
    before = (run / "step_2" / "draft.safetensors").read_bytes()
    words = training_words(small_target, tmp_path / "copy", "fake")
    words[words.index("--total-steps") + 1] = "3"
    code, error = end_of_script("train_eagle3_online", words, capsys)
    check_end(code, error, expected, run / "step_2")
    assert not (run / EXECUTED).exists()
    assert [entry for entry in visible(run) if entry.startswith("step")] == ["step_2"]
    assert (run / "step_2" / "draft.safetensors").read_bytes() == before  # never overwritten by a new start


@pytest.mark.parametrize(
    "name", ["no manifest", "a manifest that climbs", "a bit flipped", "a pickle named safetensors"]
)
def test_a_broken_checkpoint_is_not_exported(name: str, trained: Path, tmp_path: Path, capsys: Any) -> None:
    step = shutil.copytree(trained / "run" / "step_2", tmp_path / "step_2")
    CHECKPOINTS[name][0](step)
    words = ["--checkpoint", str(step), "--output-dir", str(tmp_path / "out" / "draft")]
    code, error = end_of_script("export_draft", words, capsys)
    check_end(code, error, str(step), step)
    assert visible(tmp_path / "out") == []


def test_there_are_enough_cases() -> None:
    assert len(TARGETS) + len(DRAFTS) + len(CHECKPOINTS) >= 60
