"""Flags, YAML files, draft configs and DeepSpeed files that cannot work: one line each that names the place and what
was expected, exit code 2, and no run, checkpoint or cache under a final name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.script_runner import ROOT, end_of_script, visible

TINY_DRAFT = json.loads((ROOT / "configs" / "tiny-target-eagle3.json").read_text())
ROW = {"id": "a", "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]}


@dataclass(frozen=True)
class Case:
    """expected: what the error line holds; OUT and FILE stand for the run's directory and the case's file.
    content: of FILE, as text or as a JSON value."""

    expected: str
    flags: list[str] = field(default_factory=list)
    content: Any = None
    script: str = "train_eagle3_online"


def yaml(content: str, expected: str) -> Case:
    return Case(expected, ["--config", "FILE"], content)


def draft(expected: str, **changes: Any) -> Case:
    return Case(expected, ["--draft-model-config", "FILE"], {**TINY_DRAFT, **changes})


def draft_text(content: str, expected: str) -> Case:
    return Case(expected, ["--draft-model-config", "FILE"], content)


def flags(expected: str, *words: str, script: str = "train_eagle3_online") -> Case:
    return Case(expected, list(words), script=script)


CASES: dict[str, Case] = {
    # keys
    "unknown flag": flags("--ttt-lenght: unknown flag; did you mean '--ttt-length'?", "--ttt-lenght", "3"),
    "abbreviated flag": flags("--batch: unknown flag", "--batch", "3"),
    "a word too many": flags("unexpected argument 'surplus'", "surplus"),
    "a flag without its value": flags("--batch-size/--bs: expected one argument", "--batch-size"),
    "unknown key": yaml("ttt_lenght: 3\n", "ttt_lenght: unknown key; did you mean 'ttt_length'?"),
    "unknown key in a section": yaml("training:\n  lr: 3\n", "training.lr: unknown key"),
    "unknown section": yaml("trainig:\n  seed: 3\n", "trainig: unknown key; did you mean 'training'?"),
    "a key in another section": yaml("optimizer:\n  seed: 3\n", "optimizer.seed: unknown key"),
    "a number for a key": yaml("3: 4\n", "3: unknown key"),
    # types
    "text for a number": yaml(
        "training:\n  batch_size: many\n", "training.batch_size: Input should be a valid integer"
    ),
    "a fraction of a sample": flags("--batch-size: Input should be a valid integer", "--batch-size", "1.5"),
    "a list for a number": yaml("training:\n  seed: [1]\n", "training.seed: Input should be a valid integer"),
    "a mapping for a number": yaml("training:\n  seed: {a: 1}\n", "training.seed: Input should be a valid integer"),
    "a scalar for a section": yaml("training: 7\n", "training: expected a mapping of keys to values, found 7"),
    "perhaps for yes": yaml("training:\n  compile: perhaps\n", "training.compile: Input should be a valid boolean"),
    "a choice nobody offers": flags("--precision: unknown value 'fp61'; did you mean", "--precision", "fp61"),
    "a list of words for layers": flags("--aux-layer-ids: Input should be", "--aux-layer-ids", "one", "two"),
    # values
    "no batch": flags("--batch-size: Input should be greater than or equal to 1", "--batch-size", "0"),
    "a negative rate": flags("--learning-rate: Input should be greater than 0", "--learning-rate", "-1"),
    "a rate that is no number": flags("--learning-rate: Input should be", "--learning-rate", "nan"),
    "an infinite rate": flags("--learning-rate: Input should be", "--learning-rate", "inf"),
    "a warm-up longer than the run": flags("--warmup-ratio: Input should be less", "--warmup-ratio", "1.5"),
    "33 draft steps": flags("--ttt-length: Input should be less than or equal to 32", "--ttt-length", "33"),
    "no time": flags("--dist-timeout: Input should be greater", "--dist-timeout", "0"),
    "a huge number": flags("--seed: ", "--seed", "9" * 400),
    "a key on the command line": flags("--wandb-key: keys on a command line", "--wandb-key", "s3cret"),
    # YAML
    "no yaml": yaml("a: [1\n", "FILE:2: not valid YAML"),
    "two documents": yaml("a: 1\n---\nb: 2\n", "FILE:2: not valid YAML"),
    "a list of settings": yaml("- a\n", "FILE: expected a mapping of keys to values, found list"),
    "code in yaml": yaml("!!python/object/apply:os.system ['touch OUT']\n", "not valid YAML: could not determine"),
    "a yaml bomb": yaml(
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
        "a: unknown key",
    ),
    "nested without end": yaml("[" * 1200, "FILE"),
    "no utf-8": Case("FILE: not valid YAML", ["--config", "FILE"], b"\xff\xfea\x00"),
    "a missing file": flags("OUT/none.yaml: No such file or directory", "--config", "OUT/none.yaml"),
    "a directory for a file": flags("/: Is a directory", "--config", "/"),
    # the shape of the draft
    "heads that do not divide": draft(
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3", num_key_value_heads=3
    ),
    "no heads": draft("num_attention_heads: expected a positive number, found 0", num_attention_heads=0),
    "no key heads": draft("num_key_value_heads: expected a positive number, found 0", num_key_value_heads=0),
    "an odd head": draft("head_dim 31: RoPE needs an even number", head_dim=31),
    "a head without width": draft("head_dim: expected a positive number, found -2", head_dim=-2),
    "no width": draft("hidden_size: expected a positive number, found 0", hidden_size=0),
    "width as text": draft("FILE: hidden_size: expected int, found '128'", hidden_size="128"),
    "width as yes": draft("FILE: hidden_size: expected int, found True", hidden_size=True),
    "a fraction of a head": draft("FILE: num_attention_heads: expected int, found 2.5", num_attention_heads=2.5),
    "a vocabulary larger than the target's": draft(
        "draft_vocab_size 5000 is not in 1..vocab_size 4096", draft_vocab_size=5000
    ),
    "a vocabulary larger than the target's, by flag": flags(
        "draft_vocab_size 5000 is not in 1..vocab_size 4096", "--draft-vocab-size", "5000"
    ),
    "no vocabulary": draft("draft_vocab_size -1 is not in 1..vocab_size", draft_vocab_size=-1),
    "another target's vocabulary": draft("vocab_size 9999, the target has 4096", vocab_size=9999),
    "another target's width": draft("target_hidden_size 64, the target has 128", target_hidden_size=64),
    "an activation nobody has": draft("hidden_act: unknown value 'sillu'; did you mean 'silu'?", hidden_act="sillu"),
    "an algorithm nobody has": draft("algorithm: unknown value 'eagle4'", algorithm="eagle4"),
    "an EAGLE-1 draft": draft("is trained with --draft-kind eagle1", architectures=["LlamaForCausalLMEagle"]),
    "no epsilon": draft("FILE: rms_norm_eps: expected float, found 'small'", rms_norm_eps="small"),
    "a rope nobody knows": draft(
        "rope_type: unknown value 'spiral'; known:", rope_scaling={"rope_type": "spiral", "factor": 2.0}
    ),
    "a rope that is text": draft("FILE: rope_scaling: expected an object, found 'linear'", rope_scaling="linear"),
    "a rope without its factor": draft(
        "rope scaling 'linear' with {'rope_type': 'linear'}: KeyError: 'factor'", rope_scaling={"rope_type": "linear"}
    ),
    "aux layers as text": draft("FILE: aux_layer_ids: expected a list of layers, found '1,2'", aux_layer_ids="1,2"),
    "other aux layers than the engine's": draft(
        "aux layers [0, 2, 4], the target's engine captures", aux_layer_ids=[0, 2, 4]
    ),
    "eagle_config as a list": draft("FILE: eagle_config: expected an object, found [1]", eagle_config=[1]),
    "architectures as text": draft(
        "FILE: architectures: expected a list, found 'LlamaForCausalLMEagle3'", architectures="LlamaForCausalLMEagle3"
    ),
    "a draft config in half": draft_text(json.dumps(TINY_DRAFT)[:80], "FILE: not valid JSON"),
    "a draft config that is a list": draft_text("[]", "FILE: expected a JSON object, found list"),
    "an empty draft config": draft_text("{}", "FILE: hidden_size, intermediate_size"),
    "a draft config nested without end": draft_text("[" * 100_000, "FILE: not valid JSON"),
    "a draft config in latin-1": Case(
        "FILE: not valid JSON",
        ["--draft-model-config", "FILE"],
        json.dumps({"a": "é"}, ensure_ascii=False).encode("latin-1"),
    ),
    "a draft config that is missing": flags(
        "--draft-model-config: no such file: OUT/none.json", "--draft-model-config", "OUT/none.json"
    ),
    # what the target cannot do
    "a layer the target has not": flags("aux_layer_ids", "--aux-layer-ids", "1", "3", "40"),
    "the same layer twice": flags("aux_layer_ids", "--aux-layer-ids", "1", "3", "3"),
    "a target that is not there": flags(
        "--target-model-path OUT/nobody: no such directory", "--target-model-path", "OUT/nobody"
    ),
    "a server's flag for the fake": flags(
        "--target-url: only for --target-backend sglang or vllm", "--target-url", "h:1"
    ),
    # deepspeed
    "a deepspeed file in half": Case("FILE", ["--deepspeed-config", "FILE"], "{"),
    "a deepspeed file with a text batch": Case(
        "training.batch_size: Input should be a valid integer",
        ["--deepspeed-config", "FILE"],
        {"train_micro_batch_size_per_gpu": "x"},
    ),
    # the other scripts
    "eagle-1, a flag of eagle-3": flags(
        "--draft-vocab-size: an EAGLE-1 draft has no such option", "--draft-vocab-size", "9", script="train_eagle1"
    ),
    "eagle-1, weight as text": flags("--v-weight: Input should be", "--v-weight", "x", script="train_eagle1"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line(name: str, tmp_path: Path, tiny_target: Path, capsys: Any) -> None:
    case, output, file, data = CASES[name], tmp_path / "out", tmp_path / "file", tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROW) + "\n")
    if isinstance(case.content, bytes):
        file.write_bytes(case.content)
    elif case.content is not None:
        file.write_text(case.content if isinstance(case.content, str) else json.dumps(case.content))
    words = [word.replace("OUT", str(output)).replace("FILE", str(file)) for word in case.flags]
    required = {
        "--target-model-path": str(tiny_target), "--target-backend": "fake", "--train-data-path": str(data),
        "--output-dir": str(output / "run"), "--cache-dir": str(tmp_path / "cache"), "--max-length": "64",
        "--total-steps": "1",
    }  # fmt: skip
    for flag, value in required.items():
        if flag not in words:
            words += [flag, value]
    code, line = end_of_script(case.script, words, capsys)
    assert case.expected.replace("OUT", str(output)).replace("FILE", str(file)) in line
    assert code == 2
    assert line.startswith("error: ")
    lines = line.split("\n")  # several mistakes are told at once, one line each
    assert all(part.isprintable() for part in lines)
    assert len(lines) == 1 or re.match(r"error: \d+ mistakes:", lines[0])
    assert max(map(len, lines)) < 1000
    assert [path for path in visible(output / "run") if path.startswith(("step", "metrics"))] == []
    assert "s3cret" not in line
