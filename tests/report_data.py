"""Typed-in numbers for report tests."""

from __future__ import annotations

from typing import Any

EVALUATION: dict[str, Any] = {
    "accuracy": [0.6, 0.5, 0.4],
    "tau_walk": 2.1,
    "tau_chain": 2.3,
    "tau_sampling": 1.8,
}


def _row(benchmark: str, batch_size: int, config: tuple[int, int, int], speedup: float) -> dict[str, Any]:
    steps, topk, verified = config
    return {
        "benchmark": benchmark,
        "batch_size": batch_size,
        "steps": steps,
        "topk": topk,
        "num_draft_tokens": verified,
        "acc_length": 1.0 if steps == 0 else 2.0 + 0.1 * steps,
        "throughput": 100.0 * batch_size * speedup,
        "speedup": speedup,
        "speedup_interval": [0.9 * speedup, 1.1 * speedup],
        "latency_per_token_ms": 10 / speedup,
    }


SPEEDUP_ROWS = [
    _row(benchmark, batch_size, config, speedup)
    for benchmark in ("gsm8k", "mtbench")
    for batch_size in (1, 4)
    for config, speedup in (((0, 0, 0), 1.0), ((3, 1, 4), 1.6), ((7, 10, 60), 1.9))
]


def metric_rows() -> list[dict[str, Any]]:
    """Twenty training rows of three draft steps and two evaluations."""
    rows: list[dict[str, Any]] = []
    for step in range(10, 210, 10):
        rows.append(
            {
                "step": step,
                "loss": 8.0 - step / 40,
                "step_losses": [6.0 - step / 60 + 0.5 * k for k in range(3)],
                "accuracies": [0.002 * step / (1 + k) for k in range(3)],
                "acc0": 0.002 * step,
                "tau": 1 + step / 200,
                "grad_norm": 0.5,
                "learning_rate": 1e-4 * step / 200,
                "tokens_per_second": 5000.0 + step,
                "memory_bytes": 1.5e9,
            }
        )
        if step % 100 == 0:
            vectors = {"eval/accuracy": [0.3, 0.2, 0.1], "eval/loss": [5.0, 5.5, 6.0]}
            rows.append({"step": step, **vectors, "eval/tau_walk": 1.5, "eval/tau_chain": 1.6})
    return rows
