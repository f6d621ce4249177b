"""Estimated acceptance (teacher-forced) against decoded acceptance, position by position."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specforge_lite.capture.hf import HfEngine
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.data.cache import open_dataset
from specforge_lite.evaluation.acceptance import Acceptance, decode_answers, disagreement
from specforge_lite.evaluation.run import TargetFiles, evaluate_draft, position_rows
from specforge_lite.evaluation.settings import MeasureSection
from specforge_lite.inference import SpeculativeModel
from specforge_lite.inference.speculative import GenerationSettings
from specforge_lite.model.draft import Draft, DraftConfig, TTTSettings
from specforge_lite.model.initialize import init_from_target, init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead, load_target_head
from specforge_lite.training.dataloader import BatchMaker
from specforge_lite.training.evaluate import answers_of, batch_row, result_of
from specforge_lite.types import TokenizedSample
from tests.inference_drafts import random_vocabulary
from tests.script_runner import run_in_process

CHAIN = 4


def test_answers_are_runs_of_supervised_tokens() -> None:
    assert answers_of([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert answers_of([False, False]) == []


def walk_over(correct: torch.Tensor, mask: list[bool], chain_length: int) -> Acceptance:
    num_steps = correct.shape[1]
    output = SimpleNamespace(correct_NK=correct, supervised_NK=torch.ones_like(correct))
    for name in ("loss_sum_K", "counted_K", "supervised_K", "correct_K", "alpha_sum_K"):
        setattr(output, name, torch.ones(num_steps))
    batch = SimpleNamespace(doc_offsets=[0, len(mask)], loss_mask_N=torch.tensor(mask), sample_ids=["a"])
    row = batch_row(output, batch, chain_length)  # type: ignore[arg-type]
    return Acceptance.estimated(result_of([row], num_steps, chain_length))


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


def batch_output(loss: list[float], counted: list[float], supervised: list[float], correct: list[float]):
    """A batch of one 4-token document, with the sums of two steps as given."""
    flags = torch.zeros(4, 2, dtype=torch.bool)
    sums = {"loss_sum_K": loss, "counted_K": counted, "supervised_K": supervised, "correct_K": correct}
    output = SimpleNamespace(correct_NK=flags, supervised_NK=flags, alpha_sum_K=torch.zeros(2))
    for name, values in sums.items():
        setattr(output, name, torch.tensor(values))
    return output, SimpleNamespace(doc_offsets=[0, 4], loss_mask_N=torch.zeros(4, dtype=torch.bool), sample_ids=["a"])


def test_table_by_hand() -> None:
    """Position 0: accuracies 3/4, 1/2, 1/4, losses 8/4, 3/1, 4/4. Position 1: the third batch has no position at all,
    so it counts in neither column; accuracies 1/2 and 1, losses 1 and 2."""
    batches = [
        batch_output([8.0, 2.0], [4.0, 2.0], [4.0, 2.0], [3.0, 1.0]),
        batch_output([3.0, 2.0], [1.0, 1.0], [2.0, 1.0], [1.0, 1.0]),
        batch_output([4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [1.0, 0.0]),
    ]
    rows = position_rows(result_of([batch_row(*batch, 5) for batch in batches], 2, 5))  # type: ignore[arg-type]
    half = 0.5**0.5
    assert [list(row.values()) for row in rows] == [
        pytest.approx([0, 0.5, 0.25, 2.0, 1.0]),
        pytest.approx([1, 0.75, 0.5 * half, 1.5, half]),
    ]


@pytest.fixture(scope="module")
def answered(tiny_target: Path):
    """Greedy answers of the target: (engine, head, samples)."""
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
    engine = HfEngine(str(tiny_target), (1, 3, 4), dtype="float32", device="cpu")  # the figures below are of these
    head = load_target_head(tiny_target, engine.model.config).to("cpu", torch.float32)
    return engine, head, samples


@pytest.fixture(scope="module")
def trained(tiny_target: Path, answered):
    """A draft trained for some seconds on them: (draft, engine, head, samples)."""
    engine, head, samples = answered
    config = DraftConfig.from_target(engine.model.config, 2048).replace(aux_layer_ids=engine.info.aux_layer_ids)
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
        count = output.counted_K[0] if output.weight_sum is None else output.weight_sum
        (output.loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_estimated_and_decoded_acceptance_agree(trained) -> None:
    """Both per position and in tokens per pass: within 5%, and in fact all but equal."""
    draft, engine, head, samples = trained
    to_batch = BatchMaker(head, 3, torch.device("cpu"), torch.float32)
    rows = []
    with torch.no_grad():
        for pair in (samples[:4], samples[4:]):
            batch = to_batch(pair, engine.capture(pair))
            output = draft(batch, head, TTTSettings(num_steps=CHAIN, collect_rows=True))
            rows.append(batch_row(output, batch, CHAIN))
    decoded = decode_answers(SpeculativeModel(engine.model, draft), samples, CHAIN)
    assert decoded.reproduced_share == 1
    estimated, real = Acceptance.estimated(result_of(rows, CHAIN, CHAIN)), decoded
    assert 1.3 < real.tokens_per_pass < CHAIN + 0.5  # neither hopeless nor perfect, or nothing would be compared
    assert estimated.num_tokens == real.num_tokens == sum(int(s.loss_mask_L.sum()) - 1 for s in samples)
    assert disagreement(estimated, real) < 0.05
    assert estimated.per_position == pytest.approx(real.per_position, abs=0.05)


@pytest.mark.parametrize(("kind", "block_size"), [("dspark", 4), ("dflash", 6)])
def test_the_walk_over_blocks_is_what_they_decode(answered, kind: str, block_size: int) -> None:
    """Neither kind drafts as many tokens as --ttt-length says. A batch accepts what its prompts do alone; a cut chain
    accepts less and says the same."""
    engine, head, samples = answered
    samples = samples[:3]
    is_dspark = kind == "dspark"
    config = DraftConfig.from_target(engine.model.config, None, kind).replace(
        aux_layer_ids=engine.info.aux_layer_ids, num_hidden_layers=2, block_size=block_size, mask_token_id=0,
        markov_rank=16 if is_dspark else 0, confidence_head=is_dspark,
    )  # fmt: skip
    size = config.vocab_size
    draft = build_draft(config, torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool))
    init_random(draft, seed=0)
    train(draft, engine, head, samples, num_steps=60)
    files = TargetFiles(Path(), engine.model.config, head, torch.device("cpu"))
    result = evaluate_draft(draft, files, samples, engine, MeasureSection())
    chain = block_size - (not is_dspark)
    assert (result.chain_length, len(result.accuracy)) == (chain, chain)
    model = SpeculativeModel(engine.model, draft)
    decoded = decode_answers(model, samples, chain)
    estimated, real = Acceptance.estimated(result), decoded
    assert decoded.reproduced_share == 1
    assert 1.3 < real.tokens_per_pass < chain
    assert disagreement(estimated, real) < 0.05
    assert estimated.per_position == pytest.approx(real.per_position, abs=0.05)
    prompts = [sample.input_ids_L[~sample.loss_mask_L].tolist() for sample in samples]
    whole = model.run(prompts, GenerationSettings(max_new_tokens=56))
    assert whole.stats.verification_passes == real.num_passes
    if is_dspark:
        for threshold in (0.5, 1.0):  # nothing is surer than 1: no token is drafted
            cut = model.run(prompts, GenerationSettings(max_new_tokens=56, confidence_threshold=threshold))
            assert [a.tokens for a in cut.answers] == [a.tokens for a in whole.answers]
            assert cut.stats.tokens_per_pass < whole.stats.tokens_per_pass
        assert cut.stats.tokens_per_pass == 1
    else:
        with pytest.raises(ConfigError, match=r"confidence_threshold 0\.5: this dflash draft has no confidence head"):
            model.run(prompts, GenerationSettings(confidence_threshold=0.5))


def test_the_script_reports_both(
    trained, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from specforge_lite.checkpoints.export import export_draft

    draft, engine, head, samples = trained
    tokenizer = load_tokenizer(tiny_target)
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
        "--save-results", str(tmp_path / "out" / "results.json"), "--batch-size", "2",
    ]  # fmt: skip
    assert run_in_process("evaluate_draft", words) == 0
    printed = capsys.readouterr().out
    assert "share of verification passes that accepted drafted token k" in printed
    assert "mean and standard deviation over batches" in " ".join(printed.split())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_samples"] == len(samples)
    assert len(results["accuracy"]) == 7
    data = DataSection(eval_data_path=str(tmp_path / "eval.jsonl"), cache_dir=tmp_path / "cache", max_length=256)
    dataset = open_dataset(data.eval_data_path, TargetSection(target_model_path=str(tiny_target)), data)
    expected = positions_by_hand(draft, engine, head, [dataset[i] for i in range(len(dataset))], batch_size=2)
    for row, row_by_hand in zip(results["positions"], expected, strict=True):
        assert row == pytest.approx(row_by_hand, abs=1e-4)
    assert results["tau_walk"] == pytest.approx(results["estimated"]["tokens_per_pass"])
    assert results["estimated"]["tokens_per_pass"] == pytest.approx(results["decoded"]["tokens_per_pass"], rel=0.05)
    assert results["decoded"]["reproduced_share"] > 0.95


def positions_by_hand(draft: Draft, engine: HfEngine, head: TargetHead, samples: list, batch_size: int) -> list[dict]:
    """Each batch by itself, then numpy's mean and standard deviation (n - 1)."""
    to_batch = BatchMaker(head, 3, torch.device("cpu"), torch.float32)
    accuracies, losses = [], []
    for first in range(0, len(samples), batch_size):
        part = samples[first : first + batch_size]
        with torch.no_grad():
            output = draft(to_batch(part, engine.capture(part)), head, TTTSettings(num_steps=7))
        accuracies.append((output.correct_K / output.supervised_K).numpy())
        losses.append((output.loss_sum_K / output.counted_K).numpy())
    columns = [np.mean(accuracies, 0), np.std(accuracies, 0, ddof=1), np.mean(losses, 0), np.std(losses, 0, ddof=1)]
    names = ("position", "accuracy_mean", "accuracy_std", "loss_mean", "loss_std")
    return [dict(zip(names, (k, *(float(column[k]) for column in columns)))) for k in range(7)]


def test_the_script_needs_data_and_the_right_layers(trained, tiny_target: Path, tmp_path: Path) -> None:
    from specforge_lite.checkpoints.export import export_draft

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
