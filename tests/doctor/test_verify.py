"""`verify_target` says yes to a good target, and names what is wrong with each kind of bad one."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_lite.capture.remote import PLUGIN_VERSION
from specforge_lite.checkpoints.contract import Finding
from specforge_lite.cli import doctor as script
from specforge_lite.doctor import installation, model, target
from specforge_lite.doctor.settings import VerifyConfig
from specforge_lite.doctor.target import CHECKS, verify_target
from specforge_lite.model import losses, target_head
from specforge_lite.serving.environment import SERVING_ENGINES, Interpreter, ask_registry
from tests.target_families import save_family


def levels(findings: list[Finding]) -> dict[str, str]:
    """check -> its worst level."""
    order = ("ok", "skipped", "warning", "broken")
    worst: dict[str, str] = {}
    for finding in findings:
        worst[finding.check] = max(worst.get(finding.check, "ok"), finding.level, key=order.index)
    return worst


def message(findings: list[Finding], check: str, level: str) -> str:
    return next(f.message for f in findings if f.check == check and f.level == level)


def examine(directory: Path, **changes) -> list[Finding]:
    return verify_target(
        VerifyConfig(target_model_path=str(directory), target_dtype="float32", device="cpu", engines=(), **changes)
    )


@pytest.fixture
def copy_of_tiny(tiny_target: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target, tmp_path / "target"))


def test_a_good_target_passes_every_check(tiny_target: Path) -> None:
    findings = examine(tiny_target)
    assert levels(findings) == dict.fromkeys(CHECKS, "ok")
    expected = "outputs of layers [0, 3, 6] of 8 (vLLM names them as inputs: [1, 4, 7])"
    assert message(findings, "aux layers", "ok") == expected
    assert "answers end with '<|im_end|>'" in message(findings, "loss mask", "ok")


def test_files_only_says_what_was_not_checked(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = levels(examine(tiny_target, load_model=False))
    assert found["teacher logits"] == found["decoding"] == "skipped"
    assert "broken" not in found.values()
    monkeypatch.setattr(sys, "argv", ["verify_target.py", str(tiny_target), "--engines", "--no-load-model"])
    assert script.target() == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "works" not in last
    assert last.startswith("checked and in order: config, weights, embedding and head, aux layers, draft, tokenizer, ")
    assert "NOT checked: model, hidden states, teacher logits, final norm, training, decoding" in last
    assert last.endswith("run again without --no-load-model")


def test_a_target_that_passes_everything_works(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify_target.py", str(tiny_target), "--engines", "--target-dtype", "float32"])
    assert script.target() == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("works; train with: ")


def test_the_teacher_that_training_asks_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head with a bias (Phi-2): dropping it in the teacher alone, as `TargetHead.logits` keeps it, is found."""
    family = save_family("phi2", tmp_path / "model")
    weights = load_file(family / "model.safetensors")
    weights["lm_head.bias"] = torch.linspace(-2, 2, len(weights["lm_head.bias"]))
    save_file(weights, family / "model.safetensors", {"format": "pt"})
    assert levels(examine(family))["teacher logits"] == "ok"

    def without_bias(head, last_MH, draft_ids_Vd, want_lse=False):
        return losses.ask_teacher(replace(head, head_bias_V=None), last_MH, draft_ids_Vd, want_lse)

    monkeypatch.setattr(model, "ask_teacher", without_bias)
    findings = examine(family)
    assert "training's teacher logits differ from the model's own by" in message(findings, "teacher logits", "broken")


def test_another_prompt_than_the_tokenizers_own_is_found(copy_of_tiny: Path) -> None:
    """A system prompt that the target's template adds and the chosen family does not."""
    file = copy_of_tiny / "chat_template.jinja"
    file.write_text("<|im_start|>system\nBe kind.<|im_end|>\n" + file.read_text())
    assert levels(examine(copy_of_tiny, load_model=False))["prompt"] == "ok"
    findings = examine(copy_of_tiny, load_model=False, chat_template="chatml")
    text = message(findings, "prompt", "broken")
    assert "trained after '<|im_start|>user" in text
    assert "served after '<|im_start|>system" in text


def test_without_a_tokenizer_the_model_is_still_checked(tmp_path: Path) -> None:
    findings = examine(save_family("gemma3", tmp_path / "model"))
    found = levels(findings)
    assert found["tokenizer"] == "broken"
    assert message(findings, "loss mask", "skipped") == "not checked, because of: chat template"
    assert [found[name] for name in ("teacher logits", "final norm", "training", "decoding")] == ["ok"] * 4
    assert "embedding scale 5.65685, soft cap 3" in message(findings, "embedding and head", "ok")


def test_a_scaling_nobody_knows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_head, "family_scales", lambda text: (1.0, 1.0, None))
    findings = examine(save_family("granite", tmp_path / "model"))
    assert "teacher logits differ from the model's own by" in message(findings, "teacher logits", "broken")


def test_a_norm_of_another_convention_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_head, "ONE_PLUS_WEIGHT", ())
    findings = examine(save_family("gemma2", tmp_path / "model"))
    assert "capture with vLLM would be wrong" in message(findings, "final norm", "warning")


def test_another_models_tokenizer_is_found(copy_of_tiny: Path, tmp_path: Path) -> None:
    small = save_family("llama3", tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(copy_of_tiny / name, small)
    findings = examine(small, load_model=False)
    assert message(findings, "tokenizer", "broken").startswith(
        "token ids go up to 4095, the model's vocabulary is 0..127"
    )


def test_a_template_that_is_not_the_models_is_found(copy_of_tiny: Path) -> None:
    file = copy_of_tiny / "chat_template.jinja"
    file.write_text(file.read_text().replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    assert "{% generation" not in file.read_text()
    findings = examine(copy_of_tiny, load_model=False, chat_template="llama3")
    assert levels(findings)["chat template"] == "warning"
    assert "renders other text than the tokenizer's own" in message(findings, "chat template", "warning")


def test_weights_that_are_not_there(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "model.safetensors").unlink()
    findings = examine(copy_of_tiny)
    assert "no *.safetensors here" in message(findings, "weights", "broken")
    assert message(findings, "model", "skipped") == "not checked, because of: weights"


def test_script_ends_with_2_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify_target.py", str(tmp_path / "absent"), "--engines"])
    assert script.target() == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken: ")]
    assert len(lines) == 1
    assert "absent" in lines[0]


# ------------------------------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize(
    ("answer", "level", "words"),
    [
        ({"known": True, "eagle3": True}, "ok", "serves Arch, with EAGLE-3"),
        ({"known": True, "eagle3": False}, "warning", "hands out no aux hidden states"),
        ({"known": False, "eagle3": False}, "warning", "does not serve Arch"),
    ],
)
def test_engine_answers(answer: dict, level: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    interpreter = Interpreter(sys.executable, "sglang", "0.5.23", PLUGIN_VERSION)
    monkeypatch.setattr(target, "find_interpreter", lambda engine, python: interpreter)
    first = f"import sys; print('noise'); print({json.dumps(answer)!r})"
    for query in (first, "raise SystemExit('asked again')"):  # the answer is kept
        monkeypatch.setattr(type(SERVING_ENGINES["sglang"]), "registry_query", query)
        ((found, text),) = target.check_engine("sglang", "Arch")
        assert found == level
        assert words in text


def test_a_family_that_an_engine_gets_wrong_is_not_called_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = Interpreter(sys.executable, "sglang", "0.5.23", PLUGIN_VERSION)
    monkeypatch.setattr(target, "find_interpreter", lambda engine, python: interpreter)
    ((found, text),) = target.check_engine("sglang", "Gemma3ForCausalLM")
    assert found == "warning"
    assert "without the residual stream" in text


def test_an_engine_that_fails_to_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    interpreter = Interpreter(sys.executable, "vllm", "0.32.0", PLUGIN_VERSION)
    monkeypatch.setattr(type(SERVING_ENGINES["vllm"]), "registry_query", "raise SystemExit('no such library')")
    assert ask_registry(interpreter, "Arch") == (None, "exit code 1: no such library")
    (tmp_path / "specforge_lite").mkdir()
    (tmp_path / "specforge_lite" / "architectures.json").write_text("[not json")
    assert ask_registry(interpreter, "Arch") == (None, "exit code 1: no such library")


def test_an_interpreter_without_the_engine() -> None:
    ((level, text),) = target.check_engine("vllm", "Arch", sys.executable)
    assert level == "warning"
    assert "vllm is not installed there; capture with --target-backend hf works without it" in text


# -------------------------------------------------------------------------------------------------------- installation


def test_installation_of_this_machine(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["verify_installation.py"])
    assert script.main() == 0
    text = capsys.readouterr().out
    for name in installation.CHECKS:
        assert name in text


def test_installation_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation, "REQUIRED", ("torch", "no-such-library"))
    assert list(installation.check_libraries()) == [
        ("broken", "not installed: no-such-library; run `pip install -r requirements.txt`")
    ]
    monkeypatch.setattr(installation, "TMPFS", tmp_path / "absent")
    assert next(installation.check_tmpfs())[0] == "warning"
    monkeypatch.setattr(installation, "WANTED_DISK_BYTES", 1 << 60)
    assert next(installation.check_disk())[0] == "warning"
    monkeypatch.setattr(installation, "_compiles", lambda compiler: "internal compiler error")
    assert next(installation.check_compilers())[0] == "warning"
