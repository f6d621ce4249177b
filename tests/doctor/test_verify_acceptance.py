"""A draft that was trained on layers in another order than decoding gives it: training looks healthy, `check_draft.py
--decode` says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_lite.capture.hf import HfEngine
from specforge_lite.core.errors import CheckpointError
from specforge_lite.doctor.acceptance import Recorded, compare, read_run, recorded_acceptance
from specforge_lite.inference import SpeculativeModel
from specforge_lite.types import CapturedStates, TokenizedSample
from tests.script_runner import end_of_script, run_in_process

NAMES = ("Tom", "Ann", "Kim", "Leo", "Eva", "Max", "Sam", "Pia")


def write_answers(path: Path, target: Path, numbers: range) -> None:
    """Questions with the target's own greedy answers."""
    model = SpeculativeModel.from_pretrained(str(target), dtype="float32", device="cpu")
    people = [(i, NAMES[i % len(NAMES)]) for i in numbers]
    questions = [f"{name} has {i + 3} apples and buys {2 * i + 5} more. How many has {name}?" for i, name in people]
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]
    answers = model.generate(chats, max_new_tokens=32)
    with open(path, "w") as file:
        for number, (question, text) in enumerate(zip(questions, answers.texts)):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")


class OtherOrder(HfEngine):
    """Hands out the aux layers from the highest to the lowest, as a wrong plugin might."""

    def capture(self, samples: Sequence[TokenizedSample]) -> list[CapturedStates]:
        return [replace(state, aux_LAH=state.aux_LAH.flip(1)) for state in super().capture(samples)]


@pytest.fixture(scope="module")
def run(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose engine mixed up the layers; its draft is exported beside it."""
    root = tmp_path_factory.mktemp("order")
    write_answers(root / "train.jsonl", tiny_target, range(24))
    write_answers(root / "eval.jsonl", tiny_target, range(24, 32))
    words = [
        "--target-model-path", str(tiny_target), "--target-backend", "hf", "--target-dtype", "float32",
        "--train-data-path", str(root / "train.jsonl"), "--eval-data-path", str(root / "eval.jsonl"), "--cache-dir",
        str(root / "cache"), "--output-dir", str(root / "run"), "--max-length", "128", "--ttt-length", "2",
        "--batch-size", "6", "--total-steps", "60", "--learning-rate", "3e-3", "--eval-chain-length", "2",
        "--draft-vocab-size", "2048", "--save-interval", "0", "--lr-schedule", "constant", "--init", "random",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specforge_lite.capture.hf.HfEngine", OtherOrder)
        assert run_in_process("train_eagle3_online", words) == 0
    export = ["--checkpoint", str(root / "run"), "--output-dir", str(root / "draft"), "--dtype", "float32"]
    assert run_in_process("export_draft", export) == 0
    return root


def words(run: Path, draft: Path, target: Path) -> list[str]:
    checkpoint = str(run / "run" / "step_60")
    return [str(draft), "--target-model-path", str(target), "--checkpoint", checkpoint, "--decode", "--device", "cpu"]


def test_training_looks_healthy_and_decoding_does_not(run: Path, tiny_target: Path, capsys: Any) -> None:
    recorded = read_run(run / "run" / "step_60").recorded
    assert recorded.tau > 1.4
    capsys.readouterr()
    assert run_in_process("check_draft", words(run, run / "draft", tiny_target)) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken: ")]
    assert line.startswith(f"broken: acceptance: the evaluation after step 60 estimated {recorded.tau:.2f} tokens per")
    assert "compare the order of its aux layers" in line


def test_with_the_order_mended_the_same_draft_passes(run: Path, tiny_target: Path, tmp_path: Path, capsys: Any) -> None:
    """The other side of the test above: what is told apart is the order and nothing else."""
    draft = shutil.copytree(run / "draft", tmp_path / "draft")
    tensors = load_file(draft / "model.safetensors")
    tensors["fc.weight"] = torch.cat(tensors["fc.weight"].chunk(3, dim=1)[::-1], dim=1).contiguous()
    save_file(tensors, draft / "model.safetensors")
    assert run_in_process("check_draft", words(run, draft, tiny_target)) == 0
    assert "nothing found that an engine would refuse or serve wrong" in capsys.readouterr().out


def test_what_decoding_needs_is_asked_for(run: Path, tiny_target: Path, tmp_path: Path, capsys: Any) -> None:
    code, error = end_of_script("check_draft", ["--draft-model-path", str(run / "draft"), "--decode"], capsys)
    assert (code, error) == (2, "error: target_model_path: required with --decode")
    copy = shutil.copytree(run / "run", tmp_path / "run")
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: missing; it holds the acceptance"):
        read_run(copy / "step_60")


def test_the_record_is_that_of_the_checkpoint() -> None:
    rows: list[dict[str, Any]] = [{"step": s, "tau": 1.0 + s / 10} for s in range(1, 9)]
    assert recorded_acceptance(rows, 6, 3, 7).tau == pytest.approx(1.4)  # the mean of 1.2 .. 1.6
    assert recorded_acceptance(rows, 6, 3, 7).chain_length == 7
    rows += [{"step": 4, "eval/tau_walk": 2.5}, {"step": 8, "eval/tau_walk": 3.5}]
    assert recorded_acceptance(rows, 7, 3, 7) == Recorded(2.5, 3, "the evaluation after step 4")
    with pytest.raises(CheckpointError, match="no acceptance was recorded up to step 0"):
        recorded_acceptance(rows, 0, 3, 7)


@pytest.mark.parametrize(
    ("decoded", "reproduced", "level"),
    [
        (1.8, 1.0, "broken"), (1.9, 1.0, "ok"), (2.4, 0.95, "ok"),
        (1.4, 0.1, "broken"), (1.6, 0.1, "warning"), (1.9, 0.1, "ok"),
    ],
)  # fmt: skip
def test_levels(decoded: float, reproduced: float, level: str) -> None:
    ((found, message),) = compare(Recorded(2.0, 3, "the evaluation after step 4"), decoded, reproduced)
    assert found == level
    assert f"decoding gives {decoded:.2f}" in message
