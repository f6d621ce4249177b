"""Load test of regeneration: 512 requests in flight against a fake server with latency and faults.

  python benchmarks/bench_regeneration.py                          # 5,000 prompts, about 15 s
  python benchmarks/bench_regeneration.py --num-prompts 100000     # 100,000 prompts, about 4 minutes

Latencies are spread evenly between half and one and a half times --latency. Ideal: every place busy from start to
end, so the sum of all latencies (of repeated requests too) / places, plus one for the last answers. Checked at the end:
every prompt answered once with its own answer, the run at most 1 / 0.9 of the ideal time, memory above the start
bounded. Exit code 1 if one of them does not hold. The fake server is a process of its own; both need half a core free.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from specforge_lite.core.settings import parse_config
from specforge_lite.regenerate.run import run
from specforge_lite.regenerate.settings import RegenerateConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.fake_chat_server import FakeServer, answer_to  # noqa: E402  (the tests' server, not part of the package)

MIN_SHARE_OF_IDEAL = 0.9
MAX_MEMORY_GROWTH_MIB = 150
JITTER = 0.5  # equal latencies would keep all requests in one burst, and measure how fast the fake server parses
FIXED_PROMPT = "Explain in a few sentences why the sky is blue, and say where this explanation stops being right. "


def prompt(number: int) -> str:
    return f"{number}: {FIXED_PROMPT}"


def write_prompts(path: Path, num_prompts: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for i in range(num_prompts):
            message = {"role": "user", "content": prompt(i)}
            file.write(json.dumps({"id": f"r{i}", "conversations": [message]}) + "\n")


def check_output(directory: Path, num_prompts: int) -> int:
    """Number of answered rows; raises AssertionError if one is lost, doubled or has another's answer."""
    seen = bytearray(num_prompts)
    answered = 0
    for path in directory.glob("*_*.jsonl"):
        for line in path.open(encoding="utf-8"):
            row = json.loads(line)
            number = int(row["id"][1:])
            assert not seen[number], f"row {number} is there twice"
            seen[number] = 1
            if path.name.startswith("shard_"):
                question, answer = row["conversations"]
                assert answer["content"] == answer_to(question["content"]), f"row {number}: another row's answer"
                answered += 1
    assert all(seen), f"{seen.count(0)} rows are lost"
    return answered


class MemoryWatch(threading.Thread):
    """Samples this process's resident memory ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.start_bytes = self.peak_bytes = self.process.memory_info().rss
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.1):
            self.peak_bytes = max(self.peak_bytes, self.process.memory_info().rss)

    @property
    def growth_mib(self) -> float:
        return (self.peak_bytes - self.start_bytes) / 2**20


def ideal_seconds(num_prompts: int, places: int, latency: float, fault_share: float) -> float:
    """Time of a run that never leaves a place empty; a prompt whose first request fails takes its latency twice."""
    server = FakeServer(latency, JITTER, fault_share=fault_share)
    texts = map(prompt, range(num_prompts))
    return sum(server.latency_of(text) * (1 + server.fails_first(text)) for text in texts) / places + latency


def start_server(latency: float, fault_share: float) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, str(ROOT / "tests" / "fake_chat_server.py")]
    command += ["--latency", str(latency), "--jitter", str(JITTER), "--fault-share", str(fault_share)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=5000)
    parser.add_argument("--max-concurrency", type=int, default=512)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds per answer")
    parser.add_argument("--fault-share", type=float, default=0.01, help="share of prompts whose first request fails")
    parser.add_argument("--output", type=Path, help="append the figures as a JSON line")
    args = parser.parse_args()
    server, address = start_server(args.latency, args.fault_share)
    try:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            write_prompts(directory / "in.jsonl", args.num_prompts)
            argv = ["--raw-data-file", str(directory / "in.jsonl"), "--output-dir", str(directory / "out")]
            argv += ["--server-address-port", address, "--max-concurrency", str(args.max_concurrency)]
            argv += ["--retry-base-seconds", "0.1"]
            config = parse_config(RegenerateConfig, argv)
            watch = MemoryWatch()
            watch.start()
            cpu_start = time.process_time()
            summary = run(config)
            cpu_seconds = time.process_time() - cpu_start
            watch.stopped.set()
            answered = check_output(directory / "out", args.num_prompts)
    finally:
        server.kill()
        server.wait()
    ideal = ideal_seconds(args.num_prompts, args.max_concurrency, args.latency, args.fault_share)
    figures = {
        "num_prompts": args.num_prompts,
        "answered": answered,
        "given_up": summary.num_errors,
        "rows_per_s": round(args.num_prompts / summary.seconds, 1),
        "share_of_ideal": round(ideal / summary.seconds, 3),
        "cpu_ms_per_row": round(1000 * cpu_seconds / args.num_prompts, 3),
        "memory_growth_mib": round(watch.growth_mib, 1),
        "seconds": round(summary.seconds, 1),
    }
    print(json.dumps(figures))
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    good = figures["share_of_ideal"] >= MIN_SHARE_OF_IDEAL and watch.growth_mib <= MAX_MEMORY_GROWTH_MIB
    return 0 if good and answered + summary.num_errors == args.num_prompts else 1


if __name__ == "__main__":
    sys.exit(main())
