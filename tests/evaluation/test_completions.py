"""Code completion with and without the draft: figures by hand, greedy answers of transformers, the walk-through."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_lite.core.errors import ConfigError, DataError, EngineError
from specforge_lite.data.fim import FimRow
from specforge_lite.data.prompts import ChatEncoder, Prompt
from specforge_lite.evaluation.compare_generation import compare_generation
from specforge_lite.evaluation.completions import (
    CompletionSettings,
    complete,
    first_line,
    quality_of,
    read_fim_file,
)
from specforge_lite.inference import SpeculativeModel
from specforge_lite.inference.output import DecodeStats
from specforge_lite.inference.speculative import GenerationSettings
from specforge_lite.inference.tree import TreeShape
from tests.inference_drafts import random_draft
from tests.script_runner import load_script, run_in_process

ROWS = [
    FimRow("a", "def add(a, b):\n", "    return a + b\n", "\nprint(add(1, 2))\n", "a.py"),
    FimRow("b", "for i in range(10):\n", "    print(i)\n", "", "a.py"),
    FimRow("c", "import os\n\ndef f(path):\n", "    x = 1\n    return x\n", "\nf('x')\n", "b.py"),
]


def test_quality_by_hand() -> None:
    """BLEU of "a b c d" against "a b c e": 3/4, 2/3, 1/2, and a half of a match smoothed in for 0/1."""
    assert quality_of(["a b c d"], ["a b c e"]).bleu == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    quality = quality_of([" return x\n", "y = 1\nz = 2", "w"], ["    return x\n\n", "y = 1\nz = 3", "v"])
    assert quality.exact_match == pytest.approx(1 / 3)
    assert quality.first_line_match == pytest.approx(2 / 3)
    same = [row.middle for row in ROWS] + ["one two three four five"]
    assert (quality_of(same, same).bleu, quality_of(same, same).exact_match) == (pytest.approx(100), 1)
    assert [first_line(text) for text in ("\n  a b \n c", "", "\n")] == ["a b", "", ""]


def test_counts_of_calls_add_up() -> None:
    total, one = DecodeStats(num_tokens=3, seconds=0.5, accepted_at=[2]), DecodeStats(4, 5, accepted_at=[1, 1])
    total.add(one)
    assert (total.num_prompts, total.num_tokens, total.seconds, total.accepted_at) == (4, 8, 0.5, [3, 1])
    assert one.accepted_at == [1, 1]


def test_the_comparison_of_prompts(tiny_target: Path) -> None:
    """`compare_generation` counts what the calls it makes count."""
    plain = SpeculativeModel.from_pretrained(str(tiny_target), dtype="float32", device="cpu")
    model = SpeculativeModel(plain.target.model, random_draft(128, 4096, 500), plain.tokenizer)
    questions = [Prompt("", "", (text,)) for text in ("How many?", "Tom has 3 apples.")]
    prompts = ChatEncoder(plain.tokenizer).encode_all(questions, 1024)
    result = compare_generation(model, prompts, GenerationSettings(6, eos_token_id=[], shape=TreeShape.chain(2)))
    assert (result.num_prompts, result.num_tokens, result.num_identical) == (2, 12, 2)
    assert result.num_passes_without == 12
    assert result.num_passes is not None
    assert 4 <= result.num_passes <= 12
    assert [len(sample.token_texts) for sample in result.samples] == [6, 6]


def test_completions_are_the_targets_own(tiny_target: Path) -> None:
    """Token for token those of transformers, prompted by hand; the draft changes the number of passes only."""
    model = SpeculativeModel.from_pretrained(str(tiny_target), dtype="float32", device="cpu")
    speculative = SpeculativeModel(model.target.model, random_draft(128, 4096, 500), model.tokenizer)
    result = complete(speculative, ROWS, CompletionSettings(12, 128, shape=TreeShape.chain(3)))
    tokenizer = model.tokenizer
    assert tokenizer is not None
    texts, num_tokens = [], 0
    for row in ROWS:
        before, after, hole = tokenizer.convert_tokens_to_ids(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
        ids = [before, *tokenizer.encode(row.prefix), after, *tokenizer.encode(row.suffix), hole]
        answer = model.target.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
        num_tokens += len(answer)
    assert [sample["completion"] for sample in result.samples] == texts
    assert (result.num_rows, result.num_files, result.num_identical, result.num_tokens) == (3, 2, 3, num_tokens)
    assert result.with_draft == result.without_draft == quality_of(texts, [row.middle for row in ROWS])
    assert result.target_passes_without == num_tokens
    assert 1 <= result.acceptance_length <= 4
    assert result.tokens_per_pass == pytest.approx(1 + sum(result.accepted_per_position))


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for text, message in (
        ("", r"rows\.jsonl: empty"),
        ('{"prefix": "a", "middle": "b", "suffix": "c"}\n{"prompt": "x"}\n', r"rows\.jsonl:2: expected an object with"),
        ("{bad\n", r"rows\.jsonl:1: not-json"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_fim_file(file)
    with pytest.raises(DataError, match="no such file"):
        read_fim_file(tmp_path / "none")
    file.write_text("".join(json.dumps(row.to_row()) + "\n" for row in ROWS))
    assert read_fim_file(file, 2) == ROWS[:2]


# -------------------------------------------------------------------------------------------------------- walk-through


@pytest.fixture
def small_walkthrough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with its stages run in this process; returns a function of further flags."""
    module = load_script("fim_walkthrough")
    ran: list[str] = []

    def run(done: Path, script: str, *words: str) -> None:
        if not done.exists():
            ran.append(script)
            run_in_process(script, list(words))

    def start(*words: str) -> list[str]:
        ran.clear()
        common = [
            "--output-dir", str(tmp_path / "out"), "--source-dir", str(Path(ast.__file__).parent / "json"),
            "--exclude-dirs", "tests", "--num-rows", "18", "--split-eval", "0.3", "--num-eval", "3", "--total-steps",
            "3", "--batch-size", "2", "--max-new-tokens", "8", "--max-context-chars", "200", "--max-length", "192",
            "--draft-vocab-size", "300", "--num-draft-tokens", "2",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["fim_walkthrough.py", *common, *words])
        monkeypatch.setattr(module, "run", run)
        module.main()
        return list(ran)

    return start


def test_the_walkthrough(small_walkthrough: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stages = ["prepare_data", "generate_data_by_target", "train_eagle3_online", "export_draft", "evaluate_completions"]
    assert small_walkthrough() == stages
    result = capsys.readouterr().out.splitlines()[-1]
    values = json.loads((tmp_path / "out" / "completions.json").read_text())
    assert result.startswith(f"RESULT acceptance_length={values['acceptance_length']:.2f} exact_match=")
    assert result.endswith("identical=yes")
    assert values["num_identical"] == values["num_rows"] == 3
    assert values["with_draft"] == values["without_draft"]
    parts = [
        {json.loads(line)["source"] for line in (tmp_path / "out" / "data" / f"fim_{part}.jsonl").open()}
        for part in ("train", "eval")
    ]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert small_walkthrough() == []  # what is done is not done again

    values["num_identical"] = 2
    (tmp_path / "out" / "completions.json").write_text(json.dumps(values))
    with pytest.raises(EngineError, match="2 of 3 completions are the target's own"):
        small_walkthrough()
    shared = (tmp_path / "out" / "data" / "fim_eval.jsonl").read_text().splitlines()[0]
    with (tmp_path / "out" / "data" / "fim_train.jsonl").open("a") as file:
        file.write(shared + "\n")
    with pytest.raises(ConfigError, match=r"is in training and in held-out data"):
        small_walkthrough()
