"""A stand-in for a trainer that gets killed: launches a server with two tensor-parallel ranks, stores what it captured
for the test to check, and goes on capturing until somebody ends it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from live_suite import LENGTHS, MAX_LENGTH, sample

from specforge_lite.capture.prefetch import Prefetcher
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.registry import open_engine


def main() -> None:
    name, model, shm, out = sys.argv[1:]
    target = TargetSection(
        target_model_path=model, target_backend=name, target_dtype="float32", tp_size=2, transport_dir=Path(shm)
    )
    engine = open_engine(target, MAX_LENGTH, log_dir=Path(out), wait_minutes=5)
    samples = [sample(f"length {n}", n) for n in LENGTHS] + [sample(f"repeat {i}", 90 + i % 2) for i in range(8)]
    with Prefetcher(engine, iter([[s] for s in samples]), depth=16) as stream:
        states = [states[0] for _, states in stream]
    answers = {
        s.sample_id: {"ids": s.input_ids_L, "aux": s.aux_LAH, "last": s.last_LH, "normed": s.last_is_normed}
        for s in states
    }
    torch.save(answers, Path(out) / "part.pt")
    os.replace(Path(out) / "part.pt", Path(out) / "ready.pt")
    while True:
        engine.capture(samples[:8])


if __name__ == "__main__":
    main()
