"""What `train_eagle3_online.py` imports while it trains: few enough lines of ours to read in an afternoon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 9_000
COUNT = """
import json, sys
sys.path.insert(0, "scripts")
import train_eagle3_online
assert train_eagle3_online.main() == 0
files = {n: getattr(m, "__file__", None) for n, m in list(sys.modules.items()) if n.split(".")[0] == "specforge_lite"}
lines = {n: sum(1 for _ in open(f)) for n, f in files.items() if f and f.endswith(".py")}
print("LINES " + json.dumps(lines))
"""


def test_training_loads_at_most_nine_thousand_lines(tmp_path: Path, tiny_target: Path) -> None:
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
    for steps in ("1", "2"):
        command = [sys.executable, "-c", COUNT, *words, "--total-steps", steps]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    lines = json.loads(done.stdout.split("LINES ")[1])
    rooms: dict[str, int] = {}
    for name, count in lines.items():
        room = name.split(".")[1] if "." in name else ""
        rooms[room] = rooms.get(room, 0) + count
    assert sum(lines.values()) <= MAX_LINES, rooms
    assert not {"inference", "regenerate", "evaluation", "benchmark", "report", "doctor"} & rooms.keys()
