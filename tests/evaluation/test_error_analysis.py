"""Error analysis: guesses against the training pass, kinds of token typed by hand, every number of a hand-made case."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from specforge_lite.core.errors import DataError
from specforge_lite.evaluation import error_analysis
from specforge_lite.evaluation.error_analysis import ErrorAnalysis, place_group
from specforge_lite.evaluation.token_classes import classify, is_in_fence
from specforge_lite.inference.output import token_texts
from specforge_lite.model.draft import DraftConfig, TTTSettings
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.report.errors import error_tables, shown, write_errors
from specforge_lite.report.page import write_report
from tests.inference_drafts import random_draft
from tests.predictions import predict_tokens
from tests.training_runs import make_head

HIDDEN, VOCAB = 16, 48


# ------------------------------------------------------------------------------------------------------------- guesses


def random_batch(lengths: list[int], hidden: int, vocab: int) -> Any:
    from specforge_lite.types import DraftBatch

    generator = torch.Generator().manual_seed(3)
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    ids = torch.randint(0, vocab, (offsets[-1],), generator=generator)
    mask = torch.rand(offsets[-1], generator=generator) < 0.7
    names = [str(i) for i in range(len(lengths))]
    return DraftBatch(ids, mask, offsets, randn(offsets[-1], 3 * hidden), randn(offsets[-1], hidden), names)


@pytest.mark.parametrize(("algorithm", "bias"), [("eagle3", False), ("eagle1", False), ("eagle1", True)])
def test_guesses_hit_where_the_training_pass_hits(algorithm: str, bias: bool) -> None:
    """bias: drafts of SafeAILab's EAGLE-1 have one in `fc`."""
    head = make_head()
    hidden, vocab = head.lm_head_VH.shape[1], len(head.lm_head_VH)
    num_draft = vocab if algorithm == "eagle1" else vocab // 2
    config = DraftConfig(hidden, 24, 4, 2, vocab, num_draft, algorithm=algorithm)
    ids = torch.arange(vocab)[:: vocab // num_draft][:num_draft]
    t2d = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
    draft = build_draft(config, ids - torch.arange(num_draft), t2d).eval()
    init_random(draft, 5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # so that attention and position matter
    if bias:
        generator = torch.Generator().manual_seed(1)
        draft.fc.bias = torch.nn.Parameter(torch.randn(hidden, generator=generator))  # type: ignore[union-attr]
    batch = random_batch([9, 2, 400, 600], hidden, vocab)
    if algorithm == "eagle3":  # it does not read last_NH, so the target can be made to say what the draft guesses
        guesses_NK = predict_tokens(draft, head, batch, 4)
        for row in range(4, len(batch)):
            k = row % 4
            batch.last_NH[row] = head.lm_head_VH[guesses_NK[row - 1 - k, k].clamp(min=0)]
    with torch.no_grad():
        output = draft(batch, head, TTTSettings(num_steps=4, collect_rows=True))
    guesses_NK = predict_tokens(draft, head, batch, 4)
    assert output.supervised_NK is not None
    assert output.guess_NK is not None
    rows, steps = output.supervised_NK.nonzero().T
    assert torch.equal(output.guess_NK[rows, steps], guesses_NK[rows, steps])
    expected = head.logits(batch.last_NH).argmax(-1)[rows + 1 + steps]
    assert torch.equal(guesses_NK[rows, steps] == expected, output.correct_NK[rows, steps])
    # hits at every step, or nothing would be compared
    assert (output.correct_NK.sum(0) > (50 if algorithm == "eagle3" else 1)).all()
    assert guesses_NK[8].tolist() == [-1] * 4  # the last row of a document has no next token
    assert (guesses_NK[7] >= 0).tolist() == [True, False, False, False]


# -------------------------------------------------------------------------------------------------------- token classes


@pytest.mark.parametrize(
    ("piece", "before", "after", "in_code", "kind"),
    [
        ("2", "Tom has 1", "3 apples", False, "number"),
        (" 0x1F", "x =", "", True, "number"),
        ("5", "layer", ".weight", True, "name"),
        (" ", "x", "y", False, "whitespace"),
        ("\n", "x", "y", False, "whitespace"),
        (" +", "1", " 2", False, "punctuation"),
        ("):", "def f(", "\n", True, "punctuation"),
        (" Tom", "He met", " there", False, "name"),
        ("om", "He met T", " there", False, "name"),
        (" Tom", "It was. ", " there", False, "word"),  # a sentence starts with a capital in any case
        ("He", "assistant\n", " met", False, "word"),
        (" I", "and then", " went", False, "word"),
        (" apples", "12", "", False, "word"),
        (" for", "waits", " us", False, "word"),
        (" for", "waits", " us", True, "keyword"),
        (" for", "x = 1  # waits", " us", True, "word"),
        ("urn", "    ret", " x", True, "keyword"),
        (" my", "call", "_function", False, "name"),
        ("Name", "the get", "", False, "name"),
        ("value", "self.", "", True, "name"),
    ],
)
def test_kinds_by_hand(piece: str, before: str, after: str, in_code: bool, kind: str) -> None:
    assert classify(piece, before, after, in_code) == kind


def test_fences() -> None:
    assert is_in_fence("so:\n```python\nfor")
    assert not is_in_fence("so:\n```python\nfor\n```\nand")


def test_places_in_the_answer() -> None:
    assert [place_group(place) for place in (0, 1, 3, 4, 15, 16, 63, 64, 1000)] == [0, 1, 1, 2, 2, 3, 3, 4, 5]


def test_token_texts_of_a_long_text(tiny_target: Path) -> None:
    """Decoded in pieces, with characters of several tokens across their borders: the same as decoding every prefix."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    ids = tokenizer.encode("Größe: 5 €, naïve 🦊🦊 words and 雪 " * 12)
    texts = token_texts(tokenizer, ids)
    assert len(ids) > 300
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
    prefixes = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    ends = [len("".join(texts[: i + 1])) for i in range(len(ids))]
    assert all(prefix[:end] == "".join(texts)[:end] for prefix, end in zip(prefixes, ends))
    whole = [not prefix.endswith("\ufffd") for prefix in prefixes]
    assert [len(prefix) == end for prefix, end in zip(prefixes, ends)] == whole


# ------------------------------------------------------------------------------------------------------ hand-made case


class Words:
    """A tokenizer of whole words; id 0 is a control token."""

    vocabulary = ("<end>", "Tom", " has", " 3", " apples", " <b>", "\n", " 4")
    all_special_ids = (0,)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.vocabulary[i] for i in ids)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> ErrorAnalysis:
    """Document "Tom has 3 apples <b>Tom<end>", answer from token 1 on. The target agrees with the text but at token
    3, where it says " <b>". Guesses of step 0 for tokens 2..6: right, " 4" for " <b>" (wrong), " <b>" right, " 4" for
    "Tom" (wrong), right. Step 1 for tokens 3..6: all right but the last. Token 5 is outside the draft vocabulary."""
    ids = [1, 2, 3, 4, 5, 1, 0]
    expected = [2, 3, 5, 5, 1, 0, 0]  # at place u: the target's token after it
    guesses = torch.full((7, 2), -1)
    guesses[:5, 0] = torch.tensor([3, 7, 5, 7, 0])
    guesses[:4, 1] = torch.tensor([5, 5, 1, 7])
    correct = torch.zeros(7, 2, dtype=torch.bool)
    correct[:5, 0] = torch.tensor([True, False, True, False, True])
    correct[:4, 1] = torch.tensor([True, True, True, False])
    supervised = torch.zeros(7, 2, dtype=torch.bool)
    supervised[:5, 0] = supervised[:4, 1] = True
    monkeypatch.setattr(error_analysis, "fim_token_ids", lambda _: set())
    draft = SimpleNamespace(t2d=torch.tensor([True] * 5 + [False] + [True] * 2))
    head = SimpleNamespace(logits=lambda states: torch.nn.functional.one_hot(states[:, 0].long(), 8).float())
    analysis = ErrorAnalysis(draft, head, Words(), num_steps=2)  # type: ignore[arg-type]
    batch = SimpleNamespace(
        input_ids_N=torch.tensor(ids),
        loss_mask_N=torch.tensor([False] + [True] * 6),
        doc_offsets=[0, 7],
        last_NH=torch.tensor(expected)[:, None].float(),
        sample_ids=["doc"],
    )
    output = SimpleNamespace(correct_NK=correct, supervised_NK=supervised, guess_NK=guesses)
    analysis(output, batch)  # type: ignore[arg-type]
    return analysis


def test_numbers_by_hand(by_hand: ErrorAnalysis) -> None:
    found = by_hand.to_dict()
    assert (found["num_samples"], found["num_tokens"], found["num_missed"]) == (1, 5, 2)
    assert [(p["position"], p["total"], p["missed"]) for p in found["positions"]] == [(0, 5, 2), (1, 4, 1)]
    classes = {c["class"]: (c["total"], c["missed"], c["share_of_misses"]) for c in found["classes"]}
    # Tokens 2..6 as the target has them: " 3" number, " <b>" and " <b>" words (a letter in them), "Tom", <end>
    assert classes == {"number": (1, 0, 0.0), "name": (1, 1, 0.5), "word": (2, 1, 0.5), "control": (1, 0, 0.0)}
    assert {c["class"]: c["outside_draft_vocabulary"] for c in found["classes"]}["word"] == 1
    # Token u stands at place u - 1 of the answer: 2 and 3 and 4 among places 1..3, 5 and 6 among 4..15
    assert [(p["from"], p["total"], p["missed"]) for p in found["answer_places"]] == [(1, 3, 1), (4, 2, 1)]
    assert [(t["token"], t["total"], t["missed"], t["guessed_instead"]) for t in found["tokens"]] == [
        ("Tom", 1, 1, [{"guessed": " 4", "count": 1}]),
        (" <b>", 2, 1, [{"guessed": " 4", "count": 1}]),
    ]
    assert [t["in_draft_vocabulary"] for t in found["tokens"]] == [True, False]
    assert {(c["before"], c["total"], c["missed"]) for c in found["contexts"]} == {
        (" has 3", 1, 1),
        (" apples <b>", 1, 1),
    }
    assert [(p["expected"], p["guessed"], p["count"]) for p in found["pairs"]] == [("Tom", " 4", 1), (" <b>", " 4", 1)]
    samples = {m["place"]: m for m in found["samples"]}
    assert samples[3] == {
        "sample_id": "doc", "place": 3, "kind": "word", "before": "Tom has 3", "expected": " <b>", "guessed": " 4",
    }  # fmt: skip
    assert samples[5]["before"] == "Tom has 3 apples <b>"


def test_files_are_complete_and_safe(by_hand: ErrorAnalysis, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = write_errors(tmp_path / "out", by_hand, "<script>alert(1)</script>")
    html = page.read_text()
    assert "<script>" not in html
    assert "<b>" not in html.replace("<b>2</b>", "")
    assert "·&lt;b&gt;" in html
    errors = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert errors == by_hand.to_dict()
    assert "Tokens with most misses" in capsys.readouterr().out
    report = write_report(tmp_path / "report.html", title="t", errors=errors).read_text()
    assert "Where the draft fails" in report
    assert "·&lt;b&gt;" in report
    with pytest.raises(DataError, match="not written by evaluate_draft"):
        error_tables({"accuracy": [0.5]})


def test_shown_spaces() -> None:
    assert [shown(text) for text in (" a b ", "\n", "  ", "x\ty")] == ["·a b·", "↵", "··", "x⇥y"]


def test_the_script_writes_it(tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture) -> None:
    from specforge_lite.checkpoints.export import export_draft
    from tests.script_runner import run_in_process

    exported = export_draft(random_draft(128, 4096, 500), tmp_path / "draft", dtype="float32")
    rows = [
        {"id": "chat", "conversations": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "Tom has 12 apples.\n```python\nfor x in y:\n    print(x)\n```\n"},
        ]},
    ]  # fmt: skip
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--target-model-path", str(tiny_target), "--draft-model-path", str(exported), "--testpath",
        str(tmp_path / "eval.jsonl"), "--cache-dir", str(tmp_path / "cache"), "--max-length", "128", "--target-dtype",
        "float32", "--target-backend", "hf", "--device", "cpu", "--ttt-length", "3", "--error-analysis",
        str(tmp_path / "errors"), "--save-results", str(tmp_path / "results.json"),
    ]  # fmt: skip
    assert run_in_process("evaluate_draft", words) == 0
    errors = json.loads((tmp_path / "errors" / "errors.json").read_text())
    results = json.loads((tmp_path / "results.json").read_text())
    assert [p["accuracy"] for p in errors["positions"]] == pytest.approx(results["accuracy"])
    assert errors["num_tokens"] == results["num_supervised"]
    kinds = {c["class"] for c in errors["classes"]}
    assert kinds <= {"number", "name", "punctuation", "whitespace", "keyword", "word", "control"}
    assert len(kinds) > 2
    assert (tmp_path / "errors" / "errors.html").exists()
