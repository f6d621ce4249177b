"""What `train_eagle3_online.py` imports while it trains: few enough lines of ours to read in an afternoon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Importing the script (what --help and a mistyped flag load), and a whole run: tokenizing, the embedded engine,
# training, evaluation, checkpoint. What only some runs use is loaded where it is chosen. They only ever go down.
MAX_LINES_OF_THE_SCRIPT, MAX_LINES_OF_A_RUN = 940, 9_000
COUNT = """
import json, sys
sys.path.insert(0, "scripts")
import train_eagle3_online
before = sum(sum(1 for _ in open(m.__file__)) for n, m in list(sys.modules.items())
             if n.startswith("specforge_lite") and m.__file__.endswith(".py"))
print("SCRIPT", before)
for steps in sys.argv[-1].split(","):  # a second run resumes
    sys.argv[-1] = steps
    assert train_eagle3_online.main() == 0
files = {n: getattr(m, "__file__", None) for n, m in list(sys.modules.items()) if n.split(".")[0] == "specforge_lite"}
lines = {n: sum(1 for _ in open(f)) for n, f in files.items() if f and f.endswith(".py")}
print("LINES " + json.dumps(lines))
"""


@pytest.mark.parametrize("source", ["file", "traffic"])
def test_training_loads_few_lines_and_no_room_above_it(tmp_path: Path, tiny_target: Path, source: str) -> None:
    """Runs from the command line on the embedded engine: on a file with evaluation, a checkpoint and a resume behind
    it, and on what a recorder wrote."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c d"}]
    rows = [{"id": str(i), "conversations": turns} for i in range(4)]
    data = tmp_path / "traffic_000001.jsonl"
    if source == "file":
        words = ["--train-data-path", str(data), "--eval-data-path", str(data), "--total-steps", "1,2"]
    else:
        facts = {"model": "tiny_target", "sampling": {}, "recorded_at": "2026-11-28T05:00:00", "finish_reason": "stop"}
        rows = [{**row, **facts} for row in rows]
        words = ["--follow", str(tmp_path), "--total-steps", "1"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, "-c", COUNT, "--target-model-path", str(tiny_target), "--target-backend", "hf",
        "--output-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), "--max-length", "64",
        "--ttt-length", "2", *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("resumed from" in done.stdout) == (source == "file")
    lines = json.loads(done.stdout.split("LINES ")[1])
    rooms: dict[str, int] = {}
    for name, count in lines.items():
        room = name.split(".")[1] if "." in name else ""
        rooms[room] = rooms.get(room, 0) + count
    assert sum(lines.values()) <= MAX_LINES_OF_A_RUN, rooms
    assert int(done.stdout.split("SCRIPT ")[1].split()[0]) <= MAX_LINES_OF_THE_SCRIPT
    assert not {"inference", "regenerate", "evaluation", "benchmark", "report", "doctor"} & rooms.keys()
