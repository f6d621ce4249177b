"""The decoding benchmark runs, counts what it says it counts, and its systems write the same text."""

from __future__ import annotations

import pytest

from benchmarks.bench_inference import BenchConfig, Contest, table_of


@pytest.fixture(scope="module")
def results():
    config = BenchConfig(targets=("test",), num_prompts=2, max_new_tokens=12, total_token=8, depth=2, top_k=3)
    rows = Contest("test", config).run()
    plain = next(row for row in rows if row.system == "plain")
    return {row.system: row.to_dict(plain) for row in rows}


def test_every_system_writes_the_same_text(results) -> None:
    assert list(results) == ["generate", "assisted", "plain", "chain", "tree"]
    assert all(row["identical"] and row["tokens"] == 24 for row in results.values())


def test_passes_are_counted(results) -> None:
    assert results["generate"]["target_passes"] == results["plain"]["target_passes"] == 24
    assert results["plain"]["draft_passes"] == results["generate"]["draft_passes"] == 0
    for system in ("assisted", "chain", "tree"):
        assert results[system]["target_passes"] <= 24
        assert results[system]["draft_passes"] > 0
    # one draft pass per token of the chain: the first of them reads what was accepted
    chain = results["chain"]
    assert chain["draft_passes"] <= 5 * (chain["target_passes"] - 2)


def test_costs(results) -> None:
    assert results["plain"]["break_even"] == 1
    assert results["tree"]["break_even"] > 1
    assert 0 < results["chain"]["overhead"] < 1
    assert results["generate"]["overhead"] is None
    assert table_of(list(results.values())).row_count == 5
