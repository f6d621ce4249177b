"""What EAGLE's users write in Python, and its test.py's command line, on the shipped target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from specforge_lite.checkpoints.export import export_draft
from specforge_lite.core.errors import ConfigError
from specforge_lite.inference import EaModel
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.registry import build_draft
from tests.eagle_states import write_deepspeed_state
from tests.inference_drafts import random_vocabulary
from tests.script_runner import run_in_process

ROWS = [
    {"id": str(i), "conversations": [
        {"role": "user", "content": f"Tom has {i} apples and buys 4 more. How many?"},
        {"role": "assistant", "content": f"He has {i + 4} apples."},
    ]}
    for i in range(4)
]  # fmt: skip


@pytest.fixture(scope="module")
def draft(tiny_target: Path) -> Draft:
    torch.manual_seed(0)
    config = DraftConfig.from_target(AutoConfig.from_pretrained(tiny_target), 300).replace(aux_layer_ids=(1, 3, 4))
    return build_draft(config, *random_vocabulary(300, 4096)).eval().requires_grad_(False)


@pytest.mark.parametrize("stored", ["exported", "state_39", "state_39/pytorch_model.bin"])
def test_ea_model(draft: Draft, tiny_target: Path, tmp_path: Path, stored: str) -> None:
    """The lines of EAGLE's README, with every name they use."""
    if stored == "exported":
        export_draft(draft, tmp_path / stored, dtype="float32")
    else:
        write_deepspeed_state(tmp_path / "state_39", draft, torch.float32)
    model = EaModel.from_pretrained(
        base_model_path=str(tiny_target),
        ea_model_path=str(tmp_path / stored),
        torch_dtype=torch.float32,
        low_cpu_mem_usage=True,
        device_map="cpu",
        total_token=-1,
        use_eagle3=True,
    )
    assert model.eval() is model
    ids = model.tokenizer("Tom has 3 apples and", return_tensors="pt")["input_ids"].to(model.device)
    expected = model.base_model.generate(ids, max_new_tokens=12, do_sample=False).tolist()
    assert model.eagenerate(ids, temperature=0.0, top_p=0.9, max_new_tokens=12).tolist() == expected
    assert model.naivegenerate(ids, max_new_tokens=12).tolist() == expected
    inputs = model.tokenizer("Tom has 3 apples and", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=12).tolist() == expected
    assert model.generate(**inputs, max_new_tokens=12, do_sample=False).tolist() == expected
    output, new_tokens, index = model.eagenerate(ids, max_new_tokens=12, log=True)
    assert new_tokens == output.shape[1] - ids.shape[1]
    assert index >= 0
    sampled = model.eagenerate(ids, temperature=1.0, top_p=0.9, max_new_tokens=12)
    assert sampled[0, : ids.shape[1]].tolist() == ids[0].tolist()
    assert isinstance(model.ea_model, Draft)
    with pytest.raises(ConfigError, match="unknown argument 'top_q'; did you mean 'top_p'"):
        model.generate(**inputs, top_q=0.5)
    with pytest.raises(ConfigError, match="unknown argument 'ea_path'"):
        EaModel.from_pretrained(str(tiny_target), ea_path="x")


def test_the_command_line_of_test_py(
    draft: Draft, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_deepspeed_state(tmp_path / "checkpoints" / "state_39", draft, torch.float32)
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [
        "--model_path", str(tmp_path / "checkpoints/state_39/pytorch_model.bin"), "--basepath", str(tiny_target),
        "--testpath", str(data), "--batch_size", "2", "--save_results", str(tmp_path / "results"),
    ]  # fmt: skip
    run_in_process("evaluate_draft", [*words, "--cache-dir", str(tmp_path / "cache"), "--target-backend", "hf"])
    results: dict[str, Any] = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["batch_size"] == 2
    printed = capsys.readouterr().out
    assert f"{100 * results['accuracy'][0]:.2f}%" in printed
