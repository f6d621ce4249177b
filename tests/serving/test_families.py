"""What is refused before anything is launched, and the table of docs/engines.md."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from specforge_lite.capture.base import TargetInfo
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.engine import Engine
from specforge_lite.serving.environment import PLUGIN_DIR, SERVING_ENGINES, Interpreter
from specforge_lite.serving.families import FAMILIES, check_target, support_of

ROOT = Path(__file__).resolve().parents[2]
SGLANG, VLLM = SERVING_ENGINES["sglang"], SERVING_ENGINES["vllm"]


def check(
    engine: Engine,
    directory: Path,
    config: dict[str, object],
    aux: tuple[int, ...] = (1, 3, 4),
    interpreter: Interpreter | None = None,
    **settings: object,
) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    target = TargetSection(target_model_path=str(directory), target_backend=engine.name, **settings)
    check_target(engine, target, TargetInfo(engine.name, 8, 32, 100, 64, aux), interpreter)


def deepseek(**more: object) -> dict[str, object]:
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 8, **more}


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"])
def test_gemma_3_is_refused(architecture: str, tmp_path: Path) -> None:
    kind = "gemma3_text" if architecture == "Gemma3ForCausalLM" else "gemma3"
    config = {"architectures": [architecture], "model_type": kind}
    expected = rf"target_backend sglang: {architecture} .*without the residual stream.*; use --target-backend hf$"
    with pytest.raises(ConfigError, match=expected):
        check(SGLANG, tmp_path, config)
    with pytest.raises(ConfigError, match=r"target_backend vllm: .* no aux hidden states; use --target-backend hf$"):
        check(VLLM, tmp_path, config)


def test_layer_ids_of_deepseek_must_start_at_1_in_sglang(tmp_path: Path) -> None:
    check(SGLANG, tmp_path, deepseek(), (1, 3, 5))
    expected = (
        r"aux_layer_ids \[2, 4, 6\]: it captures the outputs of layers \[1, 3, 5\] instead,.* --aux-layer-ids 1 4 6"
    )
    with pytest.raises(ConfigError, match=expected):
        check(SGLANG, tmp_path, deepseek(), (2, 4, 6))
    glm = {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"}
    with pytest.raises(ConfigError, match=r"aux_layer_ids \[0, 2, 3\]"):
        check(SGLANG, tmp_path, glm, (0, 2, 3))
    check(SGLANG, tmp_path, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, (2, 4, 6))


@pytest.mark.parametrize(
    ("dtype", "stored", "refused"),
    [("float16", "bfloat16", True), ("auto", "float16", True), ("bfloat16", "float16", False)],
)
def test_a_model_whose_stream_vllm_divides_in_float16(dtype: str, stored: str, refused: bool, tmp_path: Path) -> None:
    config = {"architectures": ["UnlistedForCausalLM"], "model_type": "glm4_moe", "dtype": stored}
    divided = pytest.raises(ConfigError, match="in float16 it divides the hidden states by routed_scaling_factor")
    with divided if refused else nullcontext():
        check(VLLM, tmp_path, config, target_dtype=dtype)


@pytest.mark.parametrize(
    ("engine", "argument"),
    [(VLLM, "pipeline-parallel-size=2"), (VLLM, "pp=2"), (SGLANG, "pp_size=2"), (SGLANG, "pipeline-parallel-size=4")],
)
def test_pipeline_parallel_is_refused(engine: Engine, argument: str, tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    with pytest.raises(ConfigError, match=r"--engine-arg .*=[24]: .* pipeline rank"):
        check(engine, tmp_path, config, engine_arg=(argument,))
    check(engine, tmp_path, config, engine_arg=(argument[:-1] + "1",))


def test_the_registry_is_asked_about_models_that_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    interpreter = Interpreter(sys.executable, "sglang", "0.5.23", "x")
    for answer, version in (
        ('{"known": true, "eagle3": false}', "0.5.23"),
        ('{"known": false, "eagle3": false}', "0.5.24"),
    ):
        monkeypatch.setattr(type(SGLANG), "registry_query", f"print('{answer}')")
        interpreter = Interpreter(sys.executable, "sglang", version, "x")
        if "true" in answer:
            with pytest.raises(ConfigError, match=r"GPT2LMHeadModel .*sglang 0.5.23 hands out no aux hidden states"):
                check(SGLANG, tmp_path, config, interpreter=interpreter)
        else:
            check(SGLANG, tmp_path, config, interpreter=interpreter)
    assert "has no model GPT2LMHeadModel of its own" in capsys.readouterr().err
    kept = json.loads((tmp_path / "cache" / "specforge_lite" / "architectures.json").read_text())
    assert set(kept) == {"sglang 0.5.23 GPT2LMHeadModel", "sglang 0.5.24 GPT2LMHeadModel"}
    # A listed family is asked about in a newer version only.
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    monkeypatch.setattr(type(SGLANG), "registry_query", """print('{"known": true, "eagle3": false}')""")
    check(SGLANG, tmp_path, llama, interpreter=Interpreter(sys.executable, "sglang", "0.5.23.post1", "x"))
    with pytest.raises(ConfigError, match="hands out no aux hidden states"):
        check(SGLANG, tmp_path, llama, interpreter=Interpreter(sys.executable, "sglang", "0.5.25", "x"))


def test_every_family_has_a_line_for_every_engine() -> None:
    for engine in SERVING_ENGINES.values():
        assert set(engine.support) == set(FAMILIES)
        assert all(cell.note for cell in engine.support.values() if cell.status == "refused")
    members = [name for names in FAMILIES.values() for name in names]
    assert len(members) == len(set(members))
    assert support_of(SGLANG, "NobodysForCausalLM") is None


def support_table() -> str:
    """The table of docs/engines.md, rendered from the code."""
    engines = list(SERVING_ENGINES.values())
    rows = [["target family", *(f"{engine.name} {engine.versions[0]}" for engine in engines)], ["---"] * 3]
    words = {"run": "works (run)", "read": "works (read)", "refused": "refused"}
    for family in FAMILIES:
        cells = [engine.support[family] for engine in engines]
        rows.append([family, *(": ".join(filter(None, (words[cell.status], cell.note))) for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def test_the_table_of_the_docs_is_the_one_in_the_code() -> None:
    assert support_table() in (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


def test_the_sglang_plugin_reports_what_the_model_captures_not_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN_DIR))
    from specforge_capture.sglang_plugin import _captured_layer_ids

    inner = torch.nn.Module()
    model = torch.nn.ModuleDict({"model": inner})
    inner.layers_to_capture = []
    with pytest.raises(RuntimeError, match="ModuleDict keeps no record of the layers it captures"):
        _captured_layer_ids(model)
    inner.layers_to_capture = [2, 29, 57]  # what DeepSeek-V3 makes of `--return-aux-hidden-state-layer-ids 2 29 57`
    assert _captured_layer_ids(model) == [1, 28, 56]
    inner.layers_to_capture = [2, 30, 58]  # and of `1 29 57`
    assert _captured_layer_ids(model) == [1, 29, 57]


def test_documents_and_lists_name_the_versions_that_the_code_supports() -> None:
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "engine_envs").glob("*.txt")]
    for name, engine in SERVING_ENGINES.items():
        found = {
            match
            for file in files
            for match in re.findall(rf"\b{name}(?:-cpu)?(?:==| )(\d+\.\d+\.\d+)\b", file.read_text(encoding="utf-8"))
        }
        assert found == {engine.versions[0]}
