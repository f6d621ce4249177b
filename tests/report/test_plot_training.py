"""training_curves.png from our metrics and from every form of wandb export: the numbers drawn are the numbers given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.core.errors import DataError
from specforge_lite.report import figures
from specforge_lite.report.training_curves import curves_of, plot_curves, read_rows, recognise
from tests.script_runner import run_in_process

OURS = [
    {"step": 10, "loss": 5.0, "step_losses": [4.0, 4.5], "accuracies": [0.1, 0.05], "learning_rate": 1e-4, "tau": 1.1},
    {"step": 10, "eval/accuracy": [0.15, 0.1], "eval/loss": [3.9, 4.4], "eval/tau_walk": 1.2, "eval/seconds": 3.0},
    {"step": 20, "loss": 3.0, "step_losses": [2.0, 2.5], "accuracies": [0.3, 0.2], "learning_rate": 5e-5, "tau": 1.4},
]
EAGLE = [
    {"_step": 0, "_runtime": 1.5, "train/lr": 1e-5, "train/ploss_0": 8.0, "train/ploss_1": 9.0, "train/acc_0": 0.1},
    {"_step": 1, "_runtime": 2.5, "train/lr": 2e-5, "train/ploss_0": 7.0, "train/ploss_1": 8.5, "train/acc_0": None},
    {"_step": 2, "train/epochacc_0": 0.25, "test/epochacc_0": 0.2},
]
EAGLE_CURVES = {
    "position 0": [(0.0, 8.0), (1.0, 7.0)],
    "position 1": [(0.0, 9.0), (1.0, 8.5)],
    "acc position 0": [(0.0, 0.1)],
    "acc position 0 (epoch)": [(2.0, 0.25)],
    "acc test position 0 (epoch)": [(2.0, 0.2)],
    "lr": [(0.0, 1e-5), (1.0, 2e-5)],
}


def points(path: Path) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for curve in curves_of(read_rows(path), str(path)):
        name = f"acc {curve.label}" if curve.panel == "accuracy" else curve.label
        found[name] = list(zip(curve.x, curve.y))
    return found


def test_our_own_metrics(tmp_path: Path) -> None:
    """The last line may be half written: the run may still be going."""
    lines = "".join(json.dumps(row) + "\n" for row in OURS)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 30, "lo')
    assert points(tmp_path) == {
        "position 0": [(10, 4.0), (20, 2.0)],
        "position 1": [(10, 4.5), (20, 2.5)],
        "eval position 0": [(10, 3.9)],
        "eval position 1": [(10, 4.4)],
        "acc position 0": [(10, 0.1), (20, 0.3)],
        "acc position 1": [(10, 0.05), (20, 0.2)],
        "acc eval position 0": [(10, 0.15)],
        "acc eval position 1": [(10, 0.1)],
        "loss": [(10, 5.0), (20, 3.0)],
        "tau": [(10, 1.1), (20, 1.4)],
        "eval tau_walk": [(10, 1.2)],
        "learning_rate": [(10, 1e-4), (20, 5e-5)],
    }


def as_csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names)] + [",".join("" if row.get(n) is None else str(row[n]) for n in names) for row in rows]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("history.csv", as_csv(EAGLE)),
        ("with-bom.csv", "\ufeff" + as_csv(EAGLE)),
        ("rows.json", json.dumps(EAGLE)),
        ("lines.jsonl", "".join(json.dumps(row) + "\n" for row in EAGLE)),
        ("lines.json", "".join(json.dumps(row) + "\n" for row in EAGLE)),
        (
            "pandas.json",  # DataFrame.to_json(): columns of row numbers
            json.dumps({
                name: {str(i): row.get(name) for i, row in enumerate(EAGLE)}
                for name in dict.fromkeys(name for row in EAGLE for name in row)
            }),
        ),
    ],
)  # fmt: skip
def test_wandb_history(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert points(tmp_path / name) == EAGLE_CURVES


def test_a_chart_exported_from_wandb(tmp_path: Path) -> None:
    """Columns `RUN - METRIC`, with the borders of the shaded band beside each."""
    header = '"Step","my run - train/ploss_0","my run - train/ploss_0__MIN","my run - train/ploss_0__MAX"\n'
    (tmp_path / "chart.csv").write_text(header + '"0","8.5","8.5","8.5"\n"100","4.25","4.0","4.5"\n"200","NaN","",""\n')
    assert points(tmp_path / "chart.csv") == {"my run: position 0": [(0, 8.5), (100, 4.25)]}


@pytest.mark.parametrize(
    ("column", "panel", "position", "held_out"),
    [
        ("step_losses/4", "step_loss", 4, False),
        ("eval/accuracy/2", "accuracy", 2, True),
        ("train/acc_6", "accuracy", 6, False),
        ("test/top_1_acc", "accuracy", None, True),
        ("train/vloss", "loss", None, False),
        ("train/epochploss_1", "step_loss", 1, True),
        ("eval/tau_sampling", "acceptance", None, True),
        ("learning_rate", "learning_rate", None, False),
        ("train/grad_norm", "grad_norm", None, False),
    ],
)
def test_names(column: str, panel: str, position: int | None, held_out: bool) -> None:
    curve = recognise(column)
    assert curve is not None
    assert (curve.panel, curve.position, curve.held_out) == (panel, position, held_out)


def test_other_columns_are_left_alone() -> None:
    assert [recognise(name) for name in ("tokens_per_second", "_runtime", "eval/seconds", "x__MAX", "acc0")] == [
        None
    ] * 5


def test_the_figure_shows_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: shown.append(figure))
    plot_curves(curves_of(OURS, "x"), tmp_path / "c.png", "run")
    drawn = {
        (ax.get_title(), line.get_label()): line.get_xydata().tolist()
        for ax in shown[0].axes
        for line in ax.get_lines()
    }
    assert drawn["loss by position", "position 1"] == [[10, 4.5], [20, 2.5]]
    assert drawn["accuracy by position", "eval position 0"] == [[10, 0.15]]
    assert drawn["learning rate", "learning_rate"] == [[10, 1e-4], [20, 5e-5]]
    assert [ax.get_title() for ax in shown[0].axes] == [
        "loss by position", "accuracy by position", "loss", "estimated acceptance length", "learning rate",
    ]  # fmt: skip


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OURS))
    assert run_in_process("plot_training", [str(tmp_path)]) == 0
    data = (tmp_path / "training_curves.png").read_bytes()
    assert data[:4] == b"\x89PNG"
    assert len(data) > 10_000
    assert "12 curves" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", None, r"x\.csv: no such file; expected a run's directory, metrics\.jsonl or a wandb export"),
        ("x.csv", "a,b\n1,2,3\n", r"x\.csv:2: more values than the header has names"),
        ("x.csv", "a,b\n1,2\n", r"x\.csv: no loss, accuracy or learning rate found; numbers found: a, b"),
        ("x.csv", "", "numbers found: none"),
        ("x.json", '{"loss": 3}', r"x\.json: expected a list of rows or columns of values, found dict"),
        ("x.json", "{bad", r"x\.json:1: not JSON"),
        ("metrics.jsonl", '{"step": 1}\n[]\n', r"metrics\.jsonl:2: expected a JSON object"),
    ],
)
def test_clear_errors(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        run_in_process("plot_training", [str(tmp_path / name)])
    assert not (tmp_path / "training_curves.png").exists()
