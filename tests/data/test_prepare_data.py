"""prepare_data: from files of any form to training files, all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.data import prepare as prepare_module
from specforge_lite.data.conversations import to_conversation
from specforge_lite.data.fim import is_fim_row
from specforge_lite.data.prepare import PrepareOptions, PrepareReport, output_files, prepare
from specforge_lite.data.sources import PRESETS, Source, choose_source

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "prepare_data.py")]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(path: Path | str, output: Path, **options: Any) -> PrepareReport:
    source = choose_source(str(path), None, None)
    return prepare(source, output_files(output, source, bool(options.get("split_eval"))), PrepareOptions(**options))


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "question": f"q{i}", "answer": f"a{i}"} for i in range(count)]


def test_the_whole_script(tmp_path: Path) -> None:
    """As a person calls it: shipped sample, no network, one line of result per file."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    flags = ["--dataset", "gsm8k-sample", "--output-path", str(tmp_path), "--split-eval", "0.05", "--sample-size=200"]
    result = subprocess.run([*SCRIPT, *flags], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "1,319 rows read, 190 written for training, 10 for evaluation" in result.stdout
    train, evaluation = (read_rows(tmp_path / f"gsm8k-sample_{part}.jsonl") for part in ("train", "eval"))
    assert (len(train), len(evaluation)) == (190, 10)
    assert not {row["id"] for row in train} & {row["id"] for row in evaluation}
    for row in train:
        assert set(row) == {"id", "conversations"}
        assert [message["role"] for message in row["conversations"]] == ["user", "assistant"]


def test_a_preset_from_a_local_copy(tmp_path: Path) -> None:
    asset = ROOT / "specforge_lite" / "assets" / "prompts" / "gsm8k_test.jsonl"
    source = choose_source("gsm8k", asset, None)
    report = prepare(source, output_files(tmp_path, source, split=False), PrepareOptions())
    assert (report.num_rows, report.num_train) == (1319, 1319)
    assert (tmp_path / "gsm8k.jsonl").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_a_directory_and_never_the_network(tmp_path: Path, name: str) -> None:
    (tmp_path / "copy" / "deep").mkdir(parents=True)
    write_rows(tmp_path / "copy" / "deep" / "b.jsonl", questions(2))
    (tmp_path / "copy" / "a.json").write_text(json.dumps(questions(3)))
    source = choose_source(name, tmp_path / "copy", None)
    report = prepare(source, output_files(tmp_path / "out", source, split=False), PrepareOptions())
    assert (report.num_rows, report.num_train) == (5, 3)  # the other two are the same
    assert report.rejected == Counter(duplicate=2)


def test_a_hub_data_set_out_of_reach(tmp_path: Path) -> None:
    """With the hub switched off (conftest) the error says what to do, and nothing is left behind."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    source = choose_source("alpaca", None, None)
    with pytest.raises(DataError) as caught:
        prepare(source, output_files(tmp_path / "out", source, split=False), PrepareOptions())
    assert str(caught.value).startswith("tatsu-lab/alpaca: cannot read it from the hub after 0 rows (")
    assert str(caught.value).endswith("); give a local copy with --data-path")
    assert len(str(caught.value).splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(DataError, match="--dataset gsm8: no such file, directory or data set; did you mean 'gsm8k'"):
        choose_source("gsm8", None, None)


# ------------------------------------------------------------------------------------------------- sample, split, seed


def test_sample_and_split(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", questions(100))
    results = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        report = run(data, tmp_path / name, sample_size=40, split_eval=0.25, seed=seed)
        assert (report.num_train, report.num_eval) == (30, 10)
        parts = [(tmp_path / name / f"d_{part}.jsonl").read_text() for part in ("train", "eval")]
        results[name] = parts
        ids = [[int(json.loads(line)["id"]) for line in part.splitlines()] for part in parts]
        assert len(set(ids[0] + ids[1])) == 40
        assert ids[0] == sorted(ids[0])  # the order of the source
    assert results["a"] == results["b"] != results["c"]


def test_splits_have_both_halves(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", questions(2))
    report = run(data, tmp_path / "out", split_eval=0.01)
    assert (report.num_train, report.num_eval) == (1, 1)
    report = run(data, tmp_path / "out", split_eval=0.99)
    assert (report.num_train, report.num_eval) == (1, 1)
    with pytest.raises(DataError, match="split_eval: needs at least two rows"):
        run(write_rows(tmp_path / "e.jsonl", questions(1)), tmp_path / "out", split_eval=0.5)


def test_an_old_evaluation_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "d.jsonl", questions(9))
    run(data, tmp_path, split_eval=0.5)
    assert "left from an earlier run" not in capsys.readouterr().err
    run(data, tmp_path)
    assert "d_eval.jsonl is left from an earlier run" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- what is left out


def test_rejected_rows_are_counted_and_shown(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [
        json.dumps({"id": "same", "question": "q", "answer": "a"}),
        '{"question": "q", ',
        json.dumps({"question": "q", "answer": "a", "id": "other"}),
        json.dumps({"messages": [{"role": "king", "content": "<b>\n"}]}),
        json.dumps({"id": "same", "question": "q2", "answer": "a"}),
        json.dumps({"question": " ", "answer": "a"}),
        json.dumps({"question": "", "answer": "a"}),
    ]
    data.write_text("\n".join(rows))
    report = run(data, tmp_path / "out")
    assert report.rejected == Counter({"empty-turn": 2, "not-json": 1, "duplicate": 1, "unknown-role": 1})
    assert report.summary() == (
        "7 rows read, 2 written for training, 0 for evaluation;"
        " left out: 2 empty-turn, 1 not-json, 1 duplicate, 1 unknown-role"
    )
    rejected = read_rows(tmp_path / "out" / "d_rejected.jsonl")
    assert [(row["place"], row["reason"]) for row in rejected] == [
        (f"{data}:2", "not-json"),
        (f"{data}:3", "duplicate"),
        (f"{data}:4", "unknown-role"),
        (f"{data}:6", "empty-turn"),
        (f"{data}:7", "empty-turn"),
    ]
    assert json.loads(rejected[2]["row"])["messages"][0]["role"] == "king"
    train = read_rows(tmp_path / "out" / "d.jsonl")
    assert train[0]["id"] == "same"
    assert train[1]["id"].startswith("same-")  # ids are unique afterwards
    summary = json.loads((tmp_path / "out" / "d_summary.json").read_text())
    assert (summary["rows_read"], summary["train"], summary["rejected"]["empty-turn"]) == (7, 2, 2)


def test_nothing_usable(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"text": "x"}, 7])
    with pytest.raises(DataError, match=r"d\.jsonl: no usable row of 2; first: .*d\.jsonl:1: found keys text"):
        run(data, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "d.jsonl", questions(9))

    def full_disk(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "_copy", full_disk)
    with pytest.raises(DataError, match="No space left on device"):
        run(data, tmp_path / "out", split_eval=0.5)
    assert list((tmp_path / "out").iterdir()) == []


def test_output_names(tmp_path: Path) -> None:
    files = output_files(tmp_path / "x.jsonl", Source("d"), split=True)
    assert [path.name for path in (files.train, files.evaluation, files.rejected, files.summary)] == [
        "x.jsonl",
        "x_eval.jsonl",
        "x_rejected.jsonl",
        "x_summary.json",
    ]
    with pytest.raises(ConfigError, match=r"expected a directory or a name ending in \.jsonl"):
        output_files(tmp_path / "x.json", Source("d"), split=True)


def test_names_go_by_the_data_set_and_never_hit_what_is_read(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "sharegpt.jsonl", questions(9))
    for split, directory, train in (
        (False, tmp_path / "out", "sharegpt.jsonl"),
        (True, tmp_path / "out", "sharegpt_train.jsonl"),
        (False, tmp_path, "sharegpt_train.jsonl"),  # sharegpt.jsonl is the file to read
    ):
        assert output_files(directory, Source("sharegpt", path=data), split).train == directory / train
    with pytest.raises(ConfigError, match=r"sharegpt\.jsonl: that is the file to read; give another name"):
        output_files(data, Source("sharegpt", path=data), split=False)


def test_fields_without_effect_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    run(write_rows(tmp_path / "d.jsonl", [{**row, "loss_mask": [0, 1]}]), tmp_path / "out")
    assert "fields without effect: loss_mask of the row (1 rows)" in capsys.readouterr().err
    assert read_rows(tmp_path / "out" / "d.jsonl")[0]["conversations"][1]["weight"] == 0


# ----------------------------------------------------------------------------------------------------------------- FIM


def test_fim_from_source_code(tmp_path: Path) -> None:
    for number in range(10):
        body = "".join(f"    x = {number} + {i}\n" for i in range(8))
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"f{number}.py").write_text(f"def f{number}(x):\n{body}    return x\n")
    (tmp_path / "src" / "bad.py").write_text("def f(:\n")
    source = choose_source("fim", None, tmp_path / "src")
    report = prepare(source, output_files(tmp_path / "out", source, split=True), PrepareOptions(split_eval=0.3))
    assert report.rejected["syntax-error"] == 1
    train, evaluation = (read_rows(tmp_path / "out" / f"fim_{part}.jsonl") for part in ("train", "eval"))
    sources = [{row["source"] for row in rows} for rows in (train, evaluation)]
    assert not sources[0] & sources[1]  # by file, never by row
    assert len(sources[0] | sources[1]) == 10
    assert all(is_fim_row(row) for row in train + evaluation)


def test_fim_and_chat_in_one_source(tmp_path: Path) -> None:
    fim = {"prefix": "a", "middle": "b", "suffix": "c"}
    data = write_rows(tmp_path / "d.jsonl", [fim, questions(1)[0]])
    with pytest.raises(
        DataError, match=r"d\.jsonl:2: a chat row among fim rows \(since .*d\.jsonl:1\); expected one format"
    ):
        run(data, tmp_path / "out")
    with pytest.raises(DataError, match=r"d\.jsonl:1: a fim row among chat rows; expected one format"):
        run(data, tmp_path / "out", data_format="chat")
    assert list((tmp_path / "out").iterdir()) == []


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--dataset fim: needs --source-dir DIR"):
        choose_source("fim", None, None)
    with pytest.raises(DataError, match="--source-dir goes with --dataset fim, found --dataset alpaca"):
        choose_source("alpaca", None, tmp_path)
    with pytest.raises(DataError, match="--data-path goes with the name of a data set"):
        choose_source(str(tmp_path), tmp_path, None)
    with pytest.raises(DataError, match="no data file in it"):
        run(tmp_path, tmp_path / "out")


def test_normal_form_comes_out_as_it_went_in(tmp_path: Path) -> None:
    rows = [
        {
            "id": "t",
            "conversations": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                    "reasoning_content": "r",
                },
                {"role": "tool", "content": "2", "tool_call_id": "c"},
                {"role": "assistant", "content": "a"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        }
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    run(data, tmp_path / "out")
    assert read_rows(tmp_path / "out" / "d.jsonl") == rows
    assert to_conversation(rows[0]).tools == rows[0]["tools"]
