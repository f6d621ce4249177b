"""Estimated acceptance (teacher-forced) against decoded acceptance, position by position."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specforge_lite.drafts import Draft, DraftConfig, TTTSettings, build_draft, init_from_target
from specforge_lite.drafts.initialize import init_random
from specforge_lite.engines.hf import HfEngine
from specforge_lite.evaluation import Acceptance, Walk, answers_of, decode_answers, disagreement
from specforge_lite.inference import SpeculativeModel
from specforge_lite.nn.target_head import TargetHead, load_target_head
from specforge_lite.training.evaluate import walk_document
from specforge_lite.training.feed import BatchMaker
from specforge_lite.types import TokenizedSample
from tests.inference_drafts import random_vocabulary
from tests.script_runner import run_in_process

CHAIN = 4


def test_answers_are_runs_of_supervised_tokens() -> None:
    assert answers_of([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert answers_of([False, False]) == []


def walk_over(correct: torch.Tensor, mask: list[bool], chain_length: int) -> Acceptance:
    walk = Walk(chain_length)
    output = SimpleNamespace(correct_NK=correct, supervised_NK=torch.ones_like(correct))
    batch = SimpleNamespace(doc_offsets=[0, len(mask)], loss_mask_N=torch.tensor(mask))
    walk.add(output, batch)  # type: ignore[arg-type]
    return walk.acceptance


def test_walk_by_hand() -> None:
    """Prompt of 2 tokens, answer 2..7. Row 1 (it reads token 2) is right once; so the pass gives tokens 3 and 4. Row 3
    is wrong: token 5. Row 4 is right three times, but two tokens are left: 6 and 7, both drafted."""
    right = torch.zeros(8, 3, dtype=torch.bool)
    right[1, 0] = right[1, 2] = True  # a later guess after a wrong one does not count
    right[4] = True
    acceptance = walk_over(right, [False] * 2 + [True] * 6, 3)
    assert (acceptance.num_passes, acceptance.num_tokens) == (3, 5)
    assert acceptance.accepted_at == [2, 1, 0]
    assert acceptance.tokens_per_pass == 5 / 3
    assert acceptance.per_position == [2 / 3, 1 / 3, 0]


def test_walk_agrees_with_the_trainers() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in range(2, 40):
        correct = torch.rand(length, 5, generator=generator) < 0.6
        mask = (torch.rand(length, generator=generator) < 0.8).tolist()
        acceptance = walk_over(correct, mask, CHAIN)
        tokens, jumps = walk_document(correct, torch.ones_like(correct), torch.tensor(mask), CHAIN)
        assert (acceptance.num_tokens, acceptance.num_passes) == (tokens, jumps)


@pytest.fixture(scope="module")
def trained(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory):
    """A draft trained for some seconds on greedy answers of the target; (draft, engine, head, samples)."""
    model = SpeculativeModel.from_pretrained(str(tiny_target), dtype="float32", device="cpu")
    names = ("Tom", "Ann", "Kim", "Leo", "Eva", "Max")
    chats = [
        f"<|im_start|>user\n{name} has {i + 3} apples and buys {i + 5} more. How many apples has {name}?<|im_end|>\n"
        "<|im_start|>assistant\n"
        for i, name in enumerate(names)
    ]
    answers = model.generate(chats, max_new_tokens=56).answers
    samples = [
        TokenizedSample(
            str(i),
            torch.tensor(answer.all_tokens),
            torch.tensor([False] * len(answer.prompt) + [True] * len(answer.tokens)),
        )
        for i, answer in enumerate(answers)
    ]
    engine = HfEngine(str(tiny_target), dtype="float32", device="cpu")
    config = DraftConfig.from_target(engine.model.config, 2048).replace(aux_layer_ids=engine.info.aux_layer_ids)
    head = load_target_head(tiny_target, engine.model.config).to("cpu", torch.float32)
    d2t, t2d = random_vocabulary(2048, 4096)
    used = torch.cat([sample.input_ids_L for sample in samples]).unique()
    if not bool(t2d[used].all()):  # every token of the answers can be drafted
        chosen = torch.cat([used, t2d.nonzero().flatten()]).tolist()
        ids = torch.tensor(sorted(dict.fromkeys(chosen[: 2048 + len(used)]))[:2048])
        d2t, t2d = ids - torch.arange(len(ids)), torch.zeros(4096, dtype=torch.bool)
        t2d[ids] = True
    draft = build_draft(config, d2t, t2d)
    init_random(draft, seed=0)
    init_from_target(draft, tiny_target, engine.model.config, head)
    train(draft, engine, head, samples, num_steps=30)
    return draft, engine, head, samples


def train(draft: Draft, engine: HfEngine, head: TargetHead, samples: list[TokenizedSample], num_steps: int) -> None:
    to_batch = BatchMaker(head, 3, torch.device("cpu"), torch.float32)
    batch = to_batch(samples, engine.capture(samples))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=2e-3)
    for _ in range(num_steps):
        output = draft(batch, head, TTTSettings(num_steps=CHAIN))
        (output.loss / output.counted_K[0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_estimated_and_decoded_acceptance_agree(trained) -> None:
    """Both per position and in tokens per pass: within 5%, and in fact all but equal."""
    draft, engine, head, samples = trained
    walk = Walk(CHAIN)
    to_batch = BatchMaker(head, 3, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for pair in (samples[:4], samples[4:]):
            batch = to_batch(pair, engine.capture(pair))
            walk.add(draft(batch, head, TTTSettings(num_steps=CHAIN, collect_rows=True)), batch)
    decoded = decode_answers(SpeculativeModel(engine.model, draft), samples, CHAIN)
    assert decoded.reproduced_share == 1
    estimated, real = walk.acceptance, decoded.acceptance
    assert 1.3 < real.tokens_per_pass < CHAIN + 0.5  # neither hopeless nor perfect, or nothing would be compared
    assert estimated.num_tokens == real.num_tokens == sum(int(s.loss_mask_L.sum()) - 1 for s in samples)
    assert disagreement(estimated, real) < 0.05
    assert estimated.per_position == pytest.approx(real.per_position, abs=0.05)


def test_the_script_reports_both(
    trained, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from specforge_lite.export import export_draft

    draft, engine, _head, samples = trained
    tokenizer = engine.tokenizer
    rows = []
    for sample in samples:
        text = tokenizer.decode(sample.input_ids_L.tolist())
        user, answer = text.split("<|im_end|>\n<|im_start|>assistant\n")
        conversation = [
            {"role": "user", "content": user.removeprefix("<|im_start|>user\n")},
            {"role": "assistant", "content": answer.removesuffix("<|im_end|>")},
        ]
        rows.append(json.dumps({"id": sample.sample_id, "conversations": conversation}))
    (tmp_path / "eval.jsonl").write_text("\n".join(rows) + "\n")
    exported = export_draft(draft, tmp_path / "draft", dtype="float32")
    words = [
        "--target-model-path", str(tiny_target), "--draft-model-path", str(exported), "--eval-data-path",
        str(tmp_path / "eval.jsonl"), "--cache-dir", str(tmp_path / "cache"), "--max-length", "256", "--target-dtype",
        "float32", "--target-backend", "hf", "--decode", "--chain-length", str(CHAIN), "--device", "cpu",
        "--save-results", str(tmp_path / "out" / "results.json"),
    ]  # fmt: skip
    assert run_in_process("evaluate_draft", words) == 0
    printed = capsys.readouterr().out
    assert "share of verification passes that accepted drafted token k" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_samples"] == len(samples)
    assert len(results["accuracy"]) == 7
    assert results["tau_walk"] == pytest.approx(results["estimated"]["tokens_per_pass"])
    assert results["estimated"]["tokens_per_pass"] == pytest.approx(results["decoded"]["tokens_per_pass"], rel=0.05)
    assert results["decoded"]["reproduced_share"] > 0.95


def test_the_script_needs_data_and_the_right_layers(trained, tiny_target: Path, tmp_path: Path) -> None:
    from specforge_lite.errors import ConfigError
    from specforge_lite.export import export_draft

    exported = export_draft(trained[0], tmp_path / "draft")
    words = ["--target-model-path", str(tiny_target), "--draft-model-path", str(exported)]
    with pytest.raises(ConfigError, match="eval_data_path: required"):
        run_in_process("evaluate_draft", words)
    (tmp_path / "eval.jsonl").write_text(
        '{"id": "a", "conversations": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
    )
    words += [
        "--eval-data-path",
        str(tmp_path / "eval.jsonl"),
        "--cache-dir",
        str(tmp_path / "c"),
        "--max-length",
        "64",
    ]
    with pytest.raises(ConfigError, match=r"aux_layer_ids \[0, 1, 2\]: the draft was trained on \[1, 3, 4\]"):
        run_in_process("evaluate_draft", [*words, "--aux-layer-ids", "0", "1", "2", "--target-backend", "hf"])
