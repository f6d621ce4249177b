"""What `train_eagle3_online.py` imports while it trains: few enough lines of ours to read in an afternoon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Importing the script (what --help and a mistyped flag load), and a whole run: tokenizing, the embedded engine,
# training, evaluation, checkpoint. What only some runs use is loaded where it is chosen. They only ever go down.
MAX_LINES_OF_THE_SCRIPT, MAX_LINES_OF_A_RUN = 950, 9_080
COUNT = """
import json, sys
sys.path.insert(0, "scripts")
import train_eagle3_online
before = sum(sum(1 for _ in open(m.__file__)) for n, m in list(sys.modules.items())
             if n.startswith("specforge_lite") and m.__file__.endswith(".py"))
print("SCRIPT", before)
for steps in ("1", "2"):  # the second run resumes
    sys.argv[-1] = steps
    assert train_eagle3_online.main() == 0
files = {n: getattr(m, "__file__", None) for n, m in list(sys.modules.items()) if n.split(".")[0] == "specforge_lite"}
lines = {n: sum(1 for _ in open(f)) for n, f in files.items() if f and f.endswith(".py")}
print("LINES " + json.dumps(lines))
"""


def test_training_loads_few_lines_and_no_room_above_it(tmp_path: Path, tiny_target: Path) -> None:
    """A run from the command line on the embedded engine, with evaluation, a checkpoint and a resume behind it."""
    rows = [
        {"id": str(i), "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c d"}]}
        for i in range(4)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--target-model-path", str(tiny_target), "--target-backend", "hf", "--train-data-path", str(data),
        "--eval-data-path", str(data), "--output-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"),
        "--max-length", "64", "--ttt-length", "2",
    ]  # fmt: skip
    command = [sys.executable, "-c", COUNT, *words, "--total-steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed from" in done.stdout
    lines = json.loads(done.stdout.split("LINES ")[1])
    rooms: dict[str, int] = {}
    for name, count in lines.items():
        room = name.split(".")[1] if "." in name else ""
        rooms[room] = rooms.get(room, 0) + count
    assert sum(lines.values()) <= MAX_LINES_OF_A_RUN, rooms
    assert int(done.stdout.split("SCRIPT ")[1].split()[0]) <= MAX_LINES_OF_THE_SCRIPT
    assert not {"inference", "regenerate", "evaluation", "benchmark", "report", "doctor"} & rooms.keys()
