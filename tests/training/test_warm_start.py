"""`--init PATH`: what is copied from another draft, what is mapped, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_lite.checkpoints.export import export_draft
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft
from specforge_lite.training.warm_start import copy_source
from tests.inference_drafts import random_draft
from tests.script_runner import run_in_process

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"
CONFIG = DraftConfig(16, 40, 4, 2, 50, 20, head_dim=6, aux_layer_ids=(1, 2, 4))


def draft_of(tokens: list[int], seed: int, **changes: Any) -> Draft:
    config = CONFIG.replace(draft_vocab_size=len(tokens), **changes)
    t2d = torch.zeros(50, dtype=torch.bool)
    t2d[tokens] = True
    draft = build_draft(config, torch.tensor(tokens) - torch.arange(len(tokens)), t2d)
    init_random(draft, seed)
    return draft


def weights_of(draft: Draft) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}


def test_rows_go_by_the_targets_token() -> None:
    source, draft = draft_of([0, 3, 7, 8, 40], 1), draft_of([3, 4, 8, 49], 2)
    before = weights_of(draft)
    copy_source(draft, source, "d", False)
    after, stored = weights_of(draft), weights_of(source)
    head, own, theirs = (w.pop("lm_head.weight") for w in (after, before, stored))
    assert torch.equal(head, torch.stack([theirs[1], own[1], theirs[3], own[3]]))  # 3, 4, 8, 49
    assert after.keys() == stored.keys()
    for name in after:
        assert torch.equal(after[name], stored[name])


def test_other_aux_layers_are_refused_or_start_fc_anew() -> None:
    source, draft = draft_of([1, 2], 1), draft_of([1, 2], 2, aux_layer_ids=(1, 2, 3))
    with pytest.raises(ConfigError, match=r"reads layers \[1, 2, 4\], this run captures \[1, 2, 3\].*--init-partial"):
        copy_source(draft, source, "d", False)
    before = weights_of(draft)["fc.weight"]
    copy_source(draft, source, "d", True)
    assert torch.equal(weights_of(draft)["fc.weight"], before)
    assert torch.equal(weights_of(draft)["norm.weight"], weights_of(source)["norm.weight"])


def test_other_shapes_are_refused_by_name() -> None:
    source, draft = draft_of([1, 2], 1), draft_of([1, 2], 2, intermediate_size=48)
    with pytest.raises(ConfigError, match=r"midlayer.mlp.gate_proj.weight \(40, 16\).*does not fit"):
        copy_source(draft, source, "d", False)


def test_a_weight_without_a_place_is_refused_unless_it_is_zero() -> None:
    source, draft = draft_of([1, 2], 1), draft_of([1, 2], 2)
    source.fc.bias = torch.nn.Parameter(torch.zeros(16))  # type: ignore[union-attr]
    copy_source(draft, source, "d", False)
    source.fc.bias.data[3] = 1.0  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match=r"fc.bias \(16,\) does not fit"):
        copy_source(draft, source, "d", False)


def test_eagle3_becomes_eagle31() -> None:
    source, draft = draft_of([1, 2], 1), draft_of([1, 2], 2, fc_norm=True, norm_output=True)
    copy_source(draft, source, "d", False)
    after, stored = weights_of(draft), weights_of(source)
    norms = {name for name in after if name.startswith("fc_norm.")}
    assert after.keys() - norms == stored.keys()
    assert all(bool((after[name] == 1).all()) for name in norms)
    assert all(torch.equal(after[name], stored[name]) for name in stored)


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text, "response": text * 3}) + "\n" for text in texts))
    return path


def test_a_run_starts_from_an_exported_draft_with_another_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--target-model-path", str(TARGET), "--target-backend", "hf", "--cache-dir", str(tmp_path / "cache")]
    words += ["--max-length", "64", "--ttt-length", "2", "--report-to", "none", "--train-data-path"]
    first = [*words, str(rows(tmp_path / "a.jsonl", ["one two ", "red blue "])), "--output-dir", str(tmp_path / "a")]
    first += ["--aux-layer-ids", "1", "2", "5", "--draft-vocab-size", "300", "--total-steps", "2"]
    assert not run_in_process("train_eagle3_online", first)
    run_in_process("export_draft", ["--checkpoint", str(tmp_path / "a"), "--output-dir", str(tmp_path / "draft")])
    second = [*words, str(rows(tmp_path / "b.jsonl", ["if then ", "red green "])), "--output-dir", str(tmp_path / "b")]
    second += ["--init", str(tmp_path / "draft"), "--draft-vocab-size", "200", "--total-steps", "1", "--lr", "1e-12"]
    capsys.readouterr()
    assert not run_in_process("train_eagle3_online", second)
    assert re.search(r"warm start from .*draft; \d+ tokens that it does not have keep", capsys.readouterr().out)
    source, draft = load_draft(tmp_path / "draft"), load_draft(tmp_path / "b")
    assert draft.config.aux_layer_ids == (1, 2, 5)  # the source's, not the target's default
    assert draft.config.draft_vocab_size == 200
    ours, theirs = draft.target_ids.tolist(), source.target_ids.tolist()
    shared = sorted(set(ours) & set(theirs))
    assert 20 < len(shared) < 200
    after, stored = weights_of(draft), weights_of(source)
    for token in shared:
        difference = after["lm_head.weight"][ours.index(token)] - stored["lm_head.weight"][theirs.index(token)]
        assert float(difference.abs().max()) < 1e-6
    for name in stored.keys() - {"lm_head.weight"}:
        assert torch.allclose(after[name], stored[name].float(), atol=1e-6)
    third = [str(tmp_path / "c") if word == str(tmp_path / "b") else word for word in second]
    third += ["--init-kind", "eagle3.1"]
    assert not run_in_process("train_eagle3_online", third)
    converted = load_draft(tmp_path / "c")
    assert (converted.config.norm_output, converted.config.fc_norm) == (True, True)
    assert all(bool((norm.weight - 1).abs().max() < 1e-6) for norm in converted.fc_norm)  # type: ignore[union-attr]
    assert torch.allclose(weights_of(converted)["fc.weight"], stored["fc.weight"].float(), atol=1e-6)


def test_conversions_without_sense_are_refused_by_name(tmp_path: Path) -> None:
    export_draft(random_draft(128, 4096, algorithm="eagle1"), tmp_path / "eagle1")
    export_draft(random_draft(128, 4096), tmp_path / "eagle3")
    export_draft(random_draft(128, 4096, norm_output=True, fc_norm=True), tmp_path / "eagle3.1")
    data = rows(tmp_path / "a.jsonl", ["one two "])
    words = ["--target-model-path", str(TARGET), "--target-backend", "hf", "--train-data-path", str(data)]
    words += ["--output-dir", str(tmp_path / "a"), "--cache-dir", str(tmp_path / "cache")]
    for source, kind, more in (
        ("eagle1", "eagle3", []), ("eagle1", "eagle3.1", []), ("eagle3", "eagle1", []), ("eagle3.1", "eagle3", []),
        ("eagle3", "dflash", []), ("eagle1", "dspark", ["--draft-kind", "dspark"]),
    ):  # fmt: skip
        named = rf"init_kind {kind}: .*{source} is a draft of kind {source}, .*can be converted: eagle3 -> eagle3\.1$"
        with pytest.raises(ConfigError, match=named):
            run_in_process(
                "train_eagle3_online", [*words, "--init", str(tmp_path / source), "--init-kind", kind, *more]
            )
    convert = [*words, "--init", str(tmp_path / "eagle3"), "--init-kind", "eagle3.1"]
    with pytest.raises(ConfigError, match=r"init_kind eagle3\.1: needs fc_norm, given as False"):
        run_in_process("train_eagle3_online", [*convert, "--fc-norm", "false"])
    with pytest.raises(ConfigError, match=r"init_kind eagle3\.1: needs --init PATH, found init target"):
        run_in_process("train_eagle3_online", [*words, "--init-kind", "eagle3.1"])
    assert not (tmp_path / "cache").exists()


def test_a_path_that_is_no_draft_is_refused_before_the_target_is_loaded(tmp_path: Path) -> None:
    data = rows(tmp_path / "a.jsonl", ["one two "])
    words = ["--target-model-path", str(TARGET), "--target-backend", "hf", "--train-data-path", str(data)]
    words += ["--output-dir", str(tmp_path / "a"), "--cache-dir", str(tmp_path / "cache"), "--init"]
    with pytest.raises((CheckpointError, ConfigError), match="no such directory"):
        run_in_process("train_eagle3_online", [*words, str(tmp_path / "gone")])
    with pytest.raises(ConfigError, match="init tagret: no such draft; expected target, random or a path"):
        run_in_process("train_eagle3_online", [*words, "tagret"])
    with pytest.raises(ConfigError, match="a block draft starts from random weights"):
        run_in_process("train_eagle3_online", [*words, "target", "--draft-kind", "dspark"])
