"""The sweep: cells, resuming after a cut-off line, refusal to mix, one real cell, table and plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sweep
from benchmarks.sweep import Result, SweepConfig, grouped, plan_cells, read_results, table_of, train_config
from specforge_lite.core.errors import ConfigError
from specforge_lite.training.settings import TrainConfig


def test_every_factor_changes_one_thing_and_every_cell_is_a_training_config(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    config = SweepConfig(output_dir=tmp_path)
    cells = plan_cells(config)
    settings = [cell.setting for cell in cells if cell.seed == 0]
    assert settings[0] == "base"
    assert len(set(settings)) == len(settings) == len(cells) / 3
    assert {"learning_rate 0.001", "ttt_length 7", "draft_vocab_size 512", "loss_mask_alignment eagle",
            "step_decay 1", "EAGLE-3.1", "loss lk"} <= set(settings)  # fmt: skip
    base = train_config(config, cells[0], tmp_path / "run")
    for cell in cells[1 : len(settings)]:
        trained = train_config(config, cell, tmp_path / "run")
        assert isinstance(trained, TrainConfig)
        changed = {
            key
            for name in ("draft", "training", "optimizer")
            for key, value in getattr(trained, name)
            if value != getattr(getattr(base, name), key)
        }
        assert changed == set(cell.changes), cell.setting


def test_an_unknown_factor_is_named() -> None:
    with pytest.raises(ConfigError, match="only: unknown factor 'los'; did you mean 'loss'"):
        plan_cells(SweepConfig(only=("los",)))


def test_a_line_that_a_crash_cut_off_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    results = [Result("base", "base", seed, 1.5, 1.2, 1.5, 9.0) for seed in (0, 1)]
    for result in results:
        sweep.append_result(path, result)
    with path.open("a") as file:
        file.write('{"factor": "base", "sett')
    assert read_results(path) == results
    assert len(path.read_text().splitlines()) == 2


def test_table_of_results_typed_by_hand(tmp_path: Path) -> None:
    values = {"base": (2.0, 2.2, 2.4), "loss lk": (2.1, 2.3, 2.5)}
    results = [
        Result("loss" if "loss" in setting else "base", setting, seed, chain, 1.5, 2.0, 10.0)
        for setting, chains in values.items()
        for seed, chain in enumerate(chains)
    ]
    table = table_of(SweepConfig(), results[::-1])
    assert "| base | 2.200 ± 0.200 |  | 2.000 | 1.500 ± 0.000 | 3 | 10 |" in table
    assert "| loss lk | 2.300 ± 0.200 | +0.100 |" in table
    assert list(grouped(results[::-1])) == ["base", "loss lk"]
    sweep.plot(SweepConfig(), results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_runs_stops_and_continues(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    turns = [("How many is 2 + 3?", "2 + 3 is 5.\n#### 5"), ("What is 4 * 4?", "4 * 4 = 16\n#### 16")]
    rows = [
        {"conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns * 2
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["sweep.py", "--target-model-path", str(tiny_target), "--train-data-path", str(data), "--eval-data-path",
             str(data), "--output-dir", str(tmp_path / "out"), "--total-steps", "2", "--batch-size", "2",
             "--num-prompts", "2", "--max-new-tokens", "8", "--seeds", "0", "--only", "base"]  # fmt: skip

    def run(*more: str) -> list[Result]:
        monkeypatch.setattr("sys.argv", [*flags, *more])
        assert sweep.main() == 0
        return read_results(tmp_path / "out" / "cells.jsonl")

    first = run()
    assert [(r.setting, r.seed) for r in first] == [("base", 0)]
    assert 1 <= first[0].chain <= 6
    assert 1 <= first[0].sampled <= 6
    assert first[0].walk >= 1
    again = run("loss", "--time-budget", "0.0001")  # the first cell uses up the budget, the second one is not begun
    assert again[0] == first[0]
    assert [r.setting for r in again] == ["base", "loss lk"]
    assert "3 cells, 1 of them are done" in capsys.readouterr().out
    assert "| base |" in (tmp_path / "out" / "sweep_cpu.md").read_text()
    assert not (tmp_path / "out" / "run").exists()
    with pytest.raises(ConfigError, match="its cells were run with total_steps 2, asked for 4"):
        run("--total-steps", "4")
