"""All checkpoints of a run: the numbers of evaluate_draft.py, the best marked, nothing done twice, clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.core.errors import CheckpointError, ConfigError, DataError
from specforge_lite.evaluation.checkpoints import METRICS, best_entry
from specforge_lite.report import figures
from tests.script_runner import run_in_process

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def trained(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of four steps, saved every two."""
    root = tmp_path_factory.mktemp("checkpoints")
    rows = [
        {"id": str(i), "conversations": [
            {"role": "user", "content": f"Tom has {i} apples and buys {i + 2} more. How many?"},
            {"role": "assistant", "content": f"He has {i}+{i + 2}={2 * i + 2} apples."},
        ]}
        for i in range(8)
    ]  # fmt: skip
    for name, part in (("train", rows), ("eval", rows[:5])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    words = [
        "--target-model-path", str(tiny_target), "--train-data-path", str(root / "train.jsonl"), "--eval-data-path",
        str(root / "eval.jsonl"), "--output-dir", str(root / "run"), "--target-backend", "hf", "--target-dtype",
        "float32", "--cache-dir", str(root / "cache"), "--batch-size", "2", "--max-length", "96", "--learning-rate",
        "1e-2", "--ttt-length", "2", "--total-steps", "4", "--save-interval", "2", "--draft-vocab-size", "300",
        "--eval-interval", "0",
    ]  # fmt: skip
    run_in_process("train_eagle3_online", words)
    return root / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluate(run: Path, *words: str) -> dict[str, Any]:
    common = ["--ttt-length", "3", "--batch-size", "2", "--device", "cpu"]
    assert run_in_process("evaluate_checkpoints", [str(run), *common, *words]) == 0
    results: dict[str, Any] = json.loads((run / "evaluation" / "checkpoints.json").read_text())
    return results


def test_numbers_are_those_of_evaluate_draft(
    run: Path, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Target and data come from the run's own config."""
    results = evaluate(run)
    printed = capsys.readouterr().out
    assert "2 checkpoints, 0 evaluated before" in printed
    assert [entry["name"] for entry in results["checkpoints"]] == ["step_2", "step_4"]
    config = json.loads((run / "step_4" / "config.json").read_text())
    run_in_process(
        "evaluate_draft",
        ["--target-model-path", str(tiny_target), "--draft-model-path", str(run / "step_4"), "--eval-data-path",
         config["data"]["eval_data_path"], "--cache-dir", config["data"]["cache_dir"], "--max-length", "96",
         "--target-backend", "hf", "--target-dtype", "float32", "--ttt-length", "3", "--batch-size", "2", "--device",
         "cpu", "--save-results", str(tmp_path / "single.json")],
    )  # fmt: skip
    single = json.loads((tmp_path / "single.json").read_text())
    last = results["checkpoints"][-1]
    for key in ("positions", "accuracy", "loss", "tau_walk", "tau_sampling", "num_samples"):
        assert last[key] == single[key], key
    assert results["best"] == best_entry(results["checkpoints"], "tau_walk")["name"]  # type: ignore[index]
    assert f"best by tau_walk: {results['best']}" in printed
    assert (run / "evaluation" / "checkpoints.png").read_bytes()[:8] == PNG_MAGIC


def test_what_is_done_is_not_done_again(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = evaluate(run, "--metric", "loss")
    assert before["best"] == min(before["checkpoints"], key=lambda entry: entry["loss"][0])["name"]
    shutil.copytree(run / "step_4", run / "step_6")
    capsys.readouterr()
    after = evaluate(run)
    assert "3 checkpoints, 2 evaluated before" in capsys.readouterr().out
    assert after["checkpoints"][:2] == before["checkpoints"]
    assert after["checkpoints"][2]["accuracy"] == after["checkpoints"][1]["accuracy"]

    shutil.rmtree(run / "step_4")  # another run's step_4: other weights under the same name
    shutil.copytree(run / "step_2", run / "step_4")
    again = evaluate(run)
    assert "3 checkpoints, 2 evaluated before" in capsys.readouterr().out
    assert [entry["name"] for entry in again["checkpoints"]] == ["step_2", "step_4", "step_6"]
    assert again["checkpoints"][1]["loss"] == again["checkpoints"][0]["loss"]

    evaluate(run, "--eval-max-samples", "3")
    assert "of other settings or data; evaluating all" in capsys.readouterr().out


def test_interrupted_evaluation_keeps_what_it_has(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specforge_lite.evaluation.checkpoints import CheckpointResults

    add = CheckpointResults.add

    def stop_after_first(self: CheckpointResults, *arguments: Any) -> None:
        add(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointResults, "add", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run)
    kept = json.loads((run / "evaluation" / "checkpoints.json").read_text())
    assert [entry["name"] for entry in kept["checkpoints"]] == ["step_2"]
    whole = evaluate(run)
    assert whole["checkpoints"][0] == kept["checkpoints"][0]
    assert len(whole["checkpoints"]) == 2


def test_damaged_checkpoints_are_left_out(run: Path, capsys: pytest.CaptureFixture) -> None:
    with (run / "step_2" / "draft.safetensors").open("r+b") as file:
        file.truncate(100)
    results = evaluate(run)
    assert [entry["name"] for entry in results["checkpoints"]] == ["step_4"]
    assert "left out:" in capsys.readouterr().err
    shutil.rmtree(run / "step_4")
    with pytest.raises(CheckpointError, match=r"run: 1 checkpoint\(s\), all damaged"):
        evaluate(run)


def test_clear_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target_model_path: required"):
        evaluate(tmp_path / "nowhere")
    target = ["--target-model-path", "x"]
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        evaluate(tmp_path / "nowhere", *target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: no step_N and no state_N here"):
        evaluate(tmp_path / "empty", *target)
    with pytest.raises(CheckpointError, match=r"step_4: is one checkpoint; give the run's directory"):
        evaluate(run / "step_4", *target)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "checkpoints.json").write_text("[]")
    with pytest.raises(DataError, match=r"checkpoints\.json: not a file of evaluate_checkpoints\.py"):
        evaluate(run)


@pytest.mark.parametrize(("metric", "place"), [("tau_walk", 4.0), ("loss", 2.0)])
def test_the_best_is_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, metric: str, place: float) -> None:
    """step_4 walks farther, step_2 has the smaller loss."""
    shown: list[Any] = []
    save = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: (shown.append(figure), save(figure, path)))
    common = {"tau_chain": 1.2, "tau_sampling": 1.1, "accuracy": [0.5, 0.25]}
    entries: list[dict[str, Any]] = [
        {"name": "step_2", "step": 2, "tau_walk": 1.5, "loss": [2.0, 3.0], **common},
        {"name": "step_4", "step": 4, "tau_walk": 1.75, "loss": [2.5, 3.0], **common},
    ]
    figures.plot_checkpoints(tmp_path / "c.png", entries, metric, "run")
    axes = shown[0].axes
    walk = axes[0].get_lines()[0]
    assert walk.get_xydata().tolist() == [[2, 1.5], [4, 1.75]]
    assert axes[2].get_lines()[1].get_ydata().tolist() == [3.0, 3.0]
    for ax in axes:
        assert [line.get_xdata() for line in ax.get_lines() if str(line.get_label()).startswith("best")] == [
            [place] * 2
        ]
    assert (tmp_path / "c.png").read_bytes()[:8] == PNG_MAGIC


def test_of_equals_the_earliest_is_best() -> None:
    entries = [{"name": name, "tau_walk": 2.0, "loss": [1.0]} for name in ("a", "b")]
    assert [best_entry(entries, metric)["name"] for metric in ("tau_walk", "loss")] == ["a", "a"]  # type: ignore[index]
    assert best_entry([], "loss") is None
    assert set(METRICS) == {"tau_walk", "tau_chain", "tau_sampling", "accuracy", "loss", "served"}


def test_served_acceptance_picks_the_best(run: Path, capsys: pytest.CaptureFixture) -> None:
    """In our own decoder, on the questions of the held-out data; a second start serves nothing again."""
    words = ["--served", "hf", "--served-prompts", "3", "--served-point", "2/0", "--max-new-tokens", "12"]
    results = evaluate(run, *words)
    assert results["metric"] == "served"
    assert "best by served" in capsys.readouterr().out
    served = {entry["name"]: entry["served"] for entry in results["checkpoints"]}
    assert set(served) == {"step_2", "step_4"}
    assert served[results["best"]] == max(served.values()) >= 1.0
    rows = [json.loads(line) for line in (run / "evaluation" / "served-hf.jsonl").read_text().splitlines()]
    assert {row["draft"]: row["acc_length"] for row in rows if row["steps"]} == served
    assert evaluate(run, *words)["checkpoints"] == results["checkpoints"]
    assert "2 checkpoints, 2 evaluated before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="metric served: needs --served"):
        evaluate(run, "--metric", "served")
