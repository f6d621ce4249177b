"""What `train_eagle3_online.py` imports while it trains: few enough lines of ours to read in an afternoon."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.script_runner import load_script
from tests.training_runs import run_ranks

# Importing the script (what --help and a mistyped flag load), and a whole run: tokenizing, the embedded engine,
# training, evaluation, checkpoint. What only some runs use is loaded where it is chosen. They only ever go down.
MAX_LINES_OF_THE_SCRIPT, MAX_LINES_OF_A_RUN = 940, 9_000


def count_lines(words: list[str], all_steps: list[str], out: Path) -> None:
    """In a forked process: run the script as if nothing of ours had been imported, once for each number of steps."""
    for name in [name for name in sys.modules if name.split(".")[0] == "specforge_lite"]:
        del sys.modules[name]
    script = load_script("train_eagle3_online")
    figures = {"script": sum(lines_loaded().values())}
    for steps in all_steps:
        sys.argv = ["train_eagle3_online.py", *words, "--total-steps", steps]
        assert script.main() == 0
    out.write_text(json.dumps({**figures, "run": lines_loaded()}))


def lines_loaded() -> dict[str, int]:
    """Lines of each module of ours."""
    files = {n: getattr(m, "__file__", None) for n, m in sys.modules.items() if n.split(".")[0] == "specforge_lite"}
    return {name: len(Path(f).read_text().splitlines()) for name, f in files.items() if f and f.endswith(".py")}


@pytest.mark.parametrize("source", ["file", "traffic"])
def test_training_loads_few_lines_and_no_room_above_it(tmp_path: Path, tiny_target: Path, source: str) -> None:
    """Runs from the command line on the embedded engine: on a file with evaluation, a checkpoint and a resume behind
    it, and on what a recorder wrote."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c d"}]
    rows = [{"id": str(i), "conversations": turns} for i in range(4)]
    data = tmp_path / "traffic_000001.jsonl"
    if source == "file":
        words = ["--train-data-path", str(data), "--eval-data-path", str(data)]
    else:
        facts = {"model": "tiny_target", "sampling": {}, "recorded_at": "2026-11-28T05:00:00", "finish_reason": "stop"}
        rows = [{**row, **facts} for row in rows]
        words = ["--follow", str(tmp_path)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words += [
        "--target-model-path", str(tiny_target), "--target-backend", "hf", "--output-dir", str(tmp_path / "run"),
        "--cache-dir", str(tmp_path / "cache"), "--max-length", "64", "--ttt-length", "2",
    ]  # fmt: skip
    steps = ["1", "2"] if source == "file" else ["1"]  # the second run resumes
    codes = run_ranks(1, count_lines, (words, steps, tmp_path / "lines.json"), tmp_path / "log")
    log = (tmp_path / "log" / "rank_0.log").read_text()
    assert codes == [0], log
    assert ("resumed from" in log) == (source == "file")
    figures = json.loads((tmp_path / "lines.json").read_text())
    lines = figures["run"]
    rooms: dict[str, int] = {}
    for name, count in lines.items():
        room = name.split(".")[1] if "." in name else ""
        rooms[room] = rooms.get(room, 0) + count
    assert sum(lines.values()) <= MAX_LINES_OF_A_RUN, rooms
    assert figures["script"] <= MAX_LINES_OF_THE_SCRIPT
    assert not {"inference", "regenerate", "evaluation", "benchmark", "report", "doctor"} & rooms.keys()
