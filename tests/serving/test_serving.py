"""Command lines of serving sessions, what engines say about acceptance, and the verdict over it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import socket
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.evaluation.compare_serving import ServingComparison
from specforge_lite.serving.engine import Launch
from specforge_lite.serving.environment import SERVING_ENGINES, Interpreter
from specforge_lite.serving.launch import start_server
from specforge_lite.serving.session import Acceptance, ServingOptions, ServingSession
from specforge_lite.serving.vllm import CPU_PLUGIN


@pytest.fixture
def draft(tmp_path: Path) -> str:
    config = {"architectures": ["LlamaForCausalLMEagle3"], "vocab_size": 900, "draft_vocab_size": 900}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def words(backend: str, options: ServingOptions, gpu: bool = False) -> str:
    launch = Launch(**{**vars(options), "port": 30000}, python="py", host="127.0.0.1", gpu=gpu)
    return " ".join(SERVING_ENGINES[backend].serving_command(launch))


def test_sglang_names_the_algorithm_and_the_shape(draft: str) -> None:
    options = ServingOptions("sglang", "M", draft, num_steps=5, topk=4, num_draft_tokens=16, mem_frac=0.7)
    command = words("sglang", options, gpu=True)
    assert f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {draft}" in command
    assert "--speculative-num-steps 5 --speculative-eagle-topk 4 --speculative-num-draft-tokens 16" in command
    assert "--mem-fraction-static 0.7" in command
    assert "intel_amx" not in command
    assert "--decode-attention-backend intel_amx" in words("sglang", options)


def test_a_port_in_use_is_reported_before_anything_starts(tmp_path: Path) -> None:
    def never(launch: Launch) -> list[str]:
        raise AssertionError

    with socket.create_server(("127.0.0.1", 0)) as stranger:
        options = ServingOptions("vllm", "M", port=stranger.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"port {options.port}: in use on 127.0.0.1; give another"):
            start_server(
                SERVING_ENGINES["vllm"], options, Interpreter("py", "vllm", "0", None), never,
                what="x", log_name="x", parent=tmp_path,
            )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_vllm_drafts_chains_only(draft: str) -> None:
    command = words("vllm", ServingOptions("vllm", "M", draft, 3, 1, 4))
    assert json.dumps({"method": "eagle3", "model": draft, "num_speculative_tokens": 3}) in command
    for topk, num_draft_tokens in ((2, 4), (1, 3)):
        with pytest.raises(ConfigError, match="vllm drafts chains only"):
            words("vllm", ServingOptions("vllm", "M", draft, 3, topk, num_draft_tokens))


def test_vllm_cuts_no_prompt_into_chunks_on_a_cpu() -> None:
    """There a seeded request whose prompt is cut would end the engine."""
    for longest, batched in ((1024, 2048), (8192, 8192)):
        options = ServingOptions("vllm", "M", max_length=longest)
        assert f"--no-enable-chunked-prefill --max-num-batched-tokens {batched}" in words("vllm", options)
        assert "chunked" not in words("vllm", options, gpu=True)


def test_drafts_are_sampled_as_they_were_trained_where_sampling_is_served(draft: str) -> None:
    for temperature, sampled in ((0.0, False), (0.7, True)):
        chain = ServingOptions("sglang", "M", draft, 3, 1, 4, temperature=temperature)
        assert ("--speculative-use-rejection-sampling" in words("sglang", chain, gpu=True)) == sampled
        assert "rejection" not in words("sglang", chain)  # the CPU engine verifies greedily
        chain = replace(chain, backend="vllm")
        assert ('"draft_sample_method": "probabilistic"' in words("vllm", chain)) == sampled
    tree = ServingOptions("sglang", "M", draft, 3, 4, 8, temperature=0.7)
    assert "rejection" not in words("sglang", tree, gpu=True)


def test_sglang_would_not_start_with_rejection_sampling_over_a_reduced_vocabulary(draft: str) -> None:
    config = json.loads((Path(draft) / "config.json").read_text()) | {"draft_vocab_size": 300}
    (Path(draft) / "config.json").write_text(json.dumps(config))
    chain = ServingOptions("sglang", "M", draft, 3, 1, 4, temperature=0.7)
    assert "rejection" not in words("sglang", chain, gpu=True)
    assert "300 of 900 tokens" in str(SERVING_ENGINES["sglang"].sampling_problem(config, 1, True))
    assert "draft_sample_method" in words("vllm", replace(chain, backend="vllm"))


def test_block_drafts_are_served_with_the_length_they_were_trained_with(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3DSparkModel"], "block_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = str(tmp_path)
    options = ServingOptions("sglang", "M", path, 7, 1, 8, temperature=0.7)
    command = words("sglang", options, gpu=True)
    assert "--speculative-algorithm DSPARK" in command
    assert command.endswith("--speculative-num-draft-tokens 8")
    assert "--speculative-num-steps" not in command
    command = words("vllm", replace(options, backend="vllm"), gpu=True)
    speculative = {"method": "dspark", "model": path, "num_speculative_tokens": 7}
    assert json.dumps({**speculative, "draft_sample_method": "probabilistic"}) in command
    with pytest.raises(ConfigError, match="a dspark draft of 7 tokens a block: num_steps 5 and topk 1 asked for"):
        words("vllm", ServingOptions("vllm", "M", path, 5, 1, 6), gpu=True)
    for backend in ("sglang", "vllm"):
        with pytest.raises(ConfigError, match="on a GPU only"):
            words(backend, replace(options, backend=backend))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DFlashDraftModel"], "block_size": 8}))
    assert words("sglang", options, gpu=True).endswith("--speculative-dflash-block-size 8")
    assert '"method": "dflash"' in words("vllm", replace(options, backend="vllm"))


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_no_steps_is_plain_decoding(backend: str, draft: str) -> None:
    for options in (ServingOptions(backend, "M", draft, num_steps=0), ServingOptions(backend, "M")):
        assert not options.speculative
        assert "speculative" not in words(backend, options)
        assert "127.0.0.1" in words(backend, options)


def test_unknown_drafts_and_backends_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not an exported draft"):
        words("sglang", ServingOptions("sglang", "M", str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLMEagle4"]}))
    with pytest.raises(ConfigError, match="did you mean 'LlamaForCausalLMEagle"):
        words("vllm", ServingOptions("vllm", "M", str(tmp_path)))
    with pytest.raises(ConfigError, match="backend 'sgland': cannot serve; did you mean 'sglang'"):
        ServingSession(ServingOptions("sgland", "M"))


def test_acceptance_of_sglang_comes_with_each_reply() -> None:
    facts = {"spec_verify_ct": 10, "spec_num_correct_drafts": 15, "spec_correct_drafts_histogram": [2, 3, 3, 2]}
    found = SERVING_ENGINES["sglang"].read_generation([{"output_ids": [5, 6], "meta_info": facts}], True)
    assert found.token_ids == (5, 6)
    assert (found.passes, found.accepted_at) == (10, (8, 5, 2))
    assert Acceptance(10, (8, 5, 2)).length == 2.5
    plain = SERVING_ENGINES["sglang"].read_generation([{"output_ids": [5], "meta_info": {}}], True)
    assert (plain.passes, plain.accepted_at) == (0, ())


def test_acceptance_of_vllm_is_summed_over_its_engines() -> None:
    text = """# HELP vllm:spec_decode_num_drafts_total Number of drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 150.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 50.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 450.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 3.0e+02
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 140.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 1.6e+02
vllm:spec_decode_num_accepted_tokens_created{engine="0"} 1.7e+09
"""
    assert SERVING_ENGINES["vllm"].read_metrics(text) == Acceptance(200, (140, 160))
    assert SERVING_ENGINES["vllm"].read_metrics(text).length == 2.5
    assert SERVING_ENGINES["vllm"].read_metrics("") == Acceptance()


def test_counts_add_and_subtract() -> None:
    assert Acceptance(10, (7, 3)) + Acceptance(1, (1,)) - Acceptance(5, (2, 1)) == Acceptance(6, (6, 2))


def compared(acceptance_length: float, num_identical: int = 8) -> ServingComparison:
    return ServingComparison("sglang", 8, num_identical, acceptance_length, 2.0, 100.0)


@pytest.mark.parametrize(
    ("served", "ours", "causes", "level", "words"),
    [
        ((0.62, 0.4, 0.2), (0.6, 0.4, 0.25), (), "ok", "8 answers equal plain decoding"),
        (
            (0.1, 0.0, 0.0),
            (0.6, 0.4, 0.25),
            ("a", "b"),
            "broken",
            "first drafted token is wrong, as .* mistake: a; or b",
        ),
        (
            (0.47, 0.4, 0.3),
            (0.6, 0.4, 0.25),
            (),
            "broken",
            r"the first drafted token is wrong, as with no .*\(template\)",
        ),
        ((0.6, 0.3), (0.6, 0.4, 0.25), (), "broken", r"the first 1 agree .* \(norm_output\)"),
        ((0.6, 0.4, 0.0), (0.6, 0.4, 0.02), (), "ok", "0% of 2%"),  # 20 tokens: chance
        ((0.0,), (0.01,), (), "warning", "nothing is proven"),
        ((0.05,), (0.05,), ("a",), "broken", "our decoder accepts more of it when it is read otherwise: a"),
    ],
)
def test_the_live_verdict_names_the_likely_cause(
    served: tuple, ours: tuple, causes: tuple, level: str, words: str
) -> None:
    found = ServingComparison("vllm", 8, 8, 1.0, 1.0, 100.0, served, ours, 1000, causes).finding()
    assert found.level == level
    assert re.search(words, found.message)


def test_a_live_verdict_of_other_answers_is_a_warning() -> None:
    found = ServingComparison("vllm", 8, 7, 1.0, 1.0, 100.0, (0.6,), (0.6,), 1000).finding()
    assert (found.level, "1 of 8 answers differ" in found.message) == ("warning", True)


def test_the_verdict(tmp_path: Path) -> None:
    for length in (1.91, 2.0, 2.09):
        compared(length).check()
    for length in (1.89, 2.11):
        with pytest.raises(EngineError, match=r"5\.5% apart, expected at most 5%"):
            compared(length).check()
    with pytest.raises(EngineError, match="1 of 8 greedy answers differ"):
        compared(2.0, 7).check()
    compared(2.0).write(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["acceptance_length"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_vllm_on_a_cpu_gives_each_drafted_token_its_request_s_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = types.ModuleType("vllm.utils.cpu_triton_utils")
    utils = types.ModuleType("vllm.utils")
    utils.cpu_triton_utils = kernels  # type: ignore[attr-defined]
    for name, module in (("vllm", types.ModuleType("vllm")), ("vllm.utils", utils), (kernels.__name__, kernels)):
        monkeypatch.setitem(sys.modules, name, module)
    (entry,) = importlib.metadata.Distribution.discover(name="vllm-on-cpu", path=[str(CPU_PLUGIN)])
    monkeypatch.syspath_prepend(CPU_PLUGIN)
    next(iter(entry.entry_points.select(group="vllm.general_plugins"))).load()()
    out = torch.full((6,), -1.0)
    kernels._expand_kernel_impl(out, torch.tensor([0.7, 0.0, 1.5]), torch.tensor([2, 2, 6], dtype=torch.int32), 0, 1, 8)
    assert torch.equal(out, torch.tensor([0.7, 0.7, 1.5, 1.5, 1.5, 1.5]))
    kernels._expand_kernel_impl(out[:1], torch.tensor([0.0]), torch.tensor([1], dtype=torch.int32), 0, 1)
    assert out[0] == 1.0
